"""Sensitivity: every group is pruned alone to a few widths, and what the whole model loses then decides."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.knapsack import knapsack
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.registries import ALLOCATORS, Budget, needs_error
from fxprune.passes.statistics import Scores

Floats = npt.NDArray[np.float64]


def curves(
    groups: Sequence[Group], budget: Budget, points: int = 4, name: str = "sensitivity"
) -> dict[str, list[tuple[int, float]]]:
    """Return (units kept, error of the whole model) of each group pruned alone, from all its units down to the floor.

    Errors are made monotone: fewer units never lose less.
    """
    error = needs_error(name, budget)
    whole = {g.name: g.size for g in groups}
    result: dict[str, list[tuple[int, float]]] = {}
    for group in groups:
        options = widths([group], budget)
        places = sorted({round(i * (len(options) - 1) / max(points, 1)) for i in range(points + 1)}, reverse=True)
        curve, worst = [], 0.0
        for place in places:
            count = options[place]
            worst = max(worst, error({**whole, group.name: count}) if count < group.size else 0.0)
            curve.append((count, worst))
        result[group.name] = curve
    return result


def scores_from(curve: Sequence[tuple[int, float]], scores: Scores) -> Scores:
    """Return scores in the given order of units whose sums are the curve's errors, interpolated between its points."""
    size = len(scores)
    counts, errors = zip(*sorted(curve), strict=True)
    lost = np.interp(np.arange(size + 1), counts, errors)  # by units kept
    marginal = np.maximum(lost[:-1] - lost[1:], 0.0)[::-1]  # of the first unit removed, the second, ...
    result = np.empty(size)
    result[np.argsort(scores, kind="stable")] = np.maximum.accumulate(marginal)
    result *= lost[0] / max(float(result.sum()), 1e-300)
    return result


@ALLOCATORS.register("sensitivity")
def sensitivity(
    groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget, *, points: int = 4
) -> dict[str, int]:
    """The knapsack on losses that were measured, one group at a time, instead of predicted from scores.

    Args:
        points: widths tried for each group beside its full one.
    """
    found = curves(groups, budget, points)
    measured = {g.name: scores_from(found[g.name], scores[g.name]) for g in groups}
    return knapsack(groups, measured, costs, budget)


@ALLOCATORS.register("equal_loss")
def equal_loss(
    groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget, *, points: int = 4
) -> dict[str, int]:
    """Every group is cut until it alone loses as much as any other: the smallest such loss that meets the budget.

    The greedy ratio selection of AIMET (Qualcomm): losses of single groups on a grid, made monotone and interpolated,
    widths rounded to their steps, one common loss found by bisection over the candidate widths.
    """
    found = curves(groups, budget, points, "equal_loss")
    rungs, lowest = [], {}
    for i, group in enumerate(groups):
        options = widths([group], budget)
        lowest[group.axis] = options[0]
        counts, errors = zip(*sorted(found[group.name]), strict=True)
        for before, count in itertools.pairwise(options):
            rungs.append((-float(np.interp(before, counts, errors)), i, count, {group.axis: count}))
    kept = climb(lowest, [r[-1] for r in sorted(rungs, key=lambda r: r[:3])], costs, budget)
    return {g.name: kept[g.axis] for g in groups}
