"""Knapsack: the widths that lose the least within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fxprune.axes import Axis
from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import Group
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.allocate.uniform import uniform
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores

Floats = npt.NDArray[np.float64]

#: The budget is divided into so many parts; costs are rounded up to whole ones.
BUCKETS = 8000


def cheapest(
    losses: Sequence[Floats], costs: Sequence[Floats], budget: float, buckets: int = BUCKETS
) -> list[int] | None:
    """Choose one option of each item: the least total loss whose total cost stays within the budget, or None.

    The multiple-choice knapsack by dynamic programming over the budget in `buckets` parts, O(options * buckets); costs
    are rounded up, so that the budget holds. Frantar and Alistarh, "SPDY" (2022), section 3.

    >>> cheapest([np.array([0.0, 1.0]), np.array([0.0, 5.0])], [np.array([4.0, 1.0]), np.array([4.0, 1.0])], 5.0)
    [1, 0]
    """
    floors = [float(c.min()) for c in costs]
    room = budget - sum(floors)
    if room < -1e-9 * max(1.0, abs(budget)):
        return None
    unit = max(room, 0.0) / buckets
    best = np.zeros(buckets + 1)
    chosen = np.zeros((len(losses), buckets + 1), dtype=np.int32)
    weights = []
    for i, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        extra = cost - floors[i]
        parts = np.ceil(extra / unit - 1e-9) if unit > 0 else np.where(extra > 0, buckets + 1, 0)
        parts = np.minimum(parts, buckets + 1).astype(np.int64)
        weights.append(parts)
        after = np.full(buckets + 1, np.inf)
        for option in np.lexsort((loss, parts)):
            steps = int(parts[option])
            if steps > buckets:
                continue
            value = np.full(buckets + 1, np.inf)
            value[steps:] = best[: buckets + 1 - steps] + loss[option]
            better = value < after
            after[better] = value[better]
            chosen[i, better] = option
        best = after
    if not np.isfinite(best[-1]):
        return None
    left, result = buckets, []
    for i in reversed(range(len(losses))):
        option = int(chosen[i, left])
        result.append(option)
        left -= int(weights[i][option])
    return result[::-1]


def losses(group: Group, scores: Scores, counts: Sequence[int]) -> Floats:
    """What a group loses at each of its widths: the sum of the scores of all but the best."""
    ascending = np.concatenate([[0.0], np.cumsum(np.sort(scores))])
    return np.array([ascending[group.size - n] for n in counts])


@ALLOCATORS.register("knapsack")
def knapsack(
    groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget, *, rounds: int = 24
) -> dict[str, int]:
    """The widths with the least total score removed that stay within the budget.

    Scores have to be losses that add up (those of criterion `obs` do). What a width costs depends on the widths of
    other groups that share a layer; each round solves the knapsack exactly for the costs at the current widths, as far
    as a step bound allows that halves when a round wins nothing, and the true cost decides. Groups that share no layer
    are solved exactly by the first round. Compare Shen et al., "HALP" (2022), and Sun et al., "MDP" (2025).
    """
    options = {g.name: widths([g], budget) for g in groups}
    loss = {g.name: losses(g, scores[g.name], options[g.name]) for g in groups}
    allowed = budget.share * costs.of(budget.kind, {})
    lowest = {g.axis: options[g.name][0] for g in groups}
    if costs.of(budget.kind, lowest) > allowed:
        climb(lowest, [], costs, budget)  # says so
        raise TargetError("the target cannot be reached")

    def total(counts: Mapping[Axis, int]) -> float:
        return sum(float(loss[g.name][options[g.name].index(counts[g.axis])]) for g in groups)

    start = uniform(groups, scores, costs, budget)
    current = {g.axis: min(options[g.name], key=lambda n, g=g: abs(n - start[g.name])) for g in groups}  # type: ignore[misc]
    if costs.of(budget.kind, current) > allowed:
        current = dict(lowest)
    best, reach, margin = total(current), 1.0, 1.0
    for _ in range(rounds):
        found = _step(groups, options, loss, costs, budget, current, allowed, reach, margin)
        if found is not None and found != current and costs.of(budget.kind, found) > allowed:
            found, margin = None, margin * 0.7
        elif found is not None:
            margin = 1.0
        value = total(found) if found is not None else np.inf
        if found is not None and value < best - 1e-15:
            current, best = found, value
        else:
            reach /= 2
            if reach * max((g.size for g in groups), default=0) < 1:
                break
    fill(groups, options, loss, costs, budget, current, allowed)
    return {g.name: current[g.axis] for g in groups}


def _step(
    groups: list[Group],
    options: Mapping[str, list[int]],
    loss: Mapping[str, Floats],
    costs: Costs,
    budget: Budget,
    current: Mapping[Axis, int],
    allowed: float,
    reach: float,
    margin: float,
) -> dict[Axis, int] | None:
    """The best widths within reach of the current ones, if costs were linear around these."""
    near: list[list[int]] = []
    for g in groups:
        bound = max(reach * g.size, budget.step[g.name])
        near.append([i for i, n in enumerate(options[g.name]) if abs(n - current[g.axis]) <= bound])
    growth = [
        np.array([float(costs.change(budget.kind, {g.axis: options[g.name][i]}, current)) for i in places])
        for g, places in zip(groups, near, strict=True)
    ]
    room = (allowed - costs.of(budget.kind, current)) * margin
    picked = cheapest([loss[g.name][p] for g, p in zip(groups, near, strict=True)], growth, room)
    if picked is None:
        return None
    return {g.axis: options[g.name][p[i]] for g, p, i in zip(groups, near, picked, strict=True)}


def fill(
    groups: list[Group],
    options: Mapping[str, list[int]],
    loss: Mapping[str, Floats],
    costs: Costs,
    budget: Budget,
    current: dict[Axis, int],
    allowed: float,
) -> None:
    """Widen single groups as long as the budget lasts, those first that win the most for what they cost."""
    spent = float(costs.of(budget.kind, current))
    while True:
        best: tuple[float, Axis, int, float] | None = None
        for g in groups:
            place = options[g.name].index(current[g.axis])
            if place + 1 == len(options[g.name]):
                continue
            wider = options[g.name][place + 1]
            growth = costs.change(budget.kind, {g.axis: wider}, current)
            if spent + growth > allowed:
                continue
            rate = float(loss[g.name][place] - loss[g.name][place + 1]) / max(float(growth), 1e-12)
            if best is None or rate > best[0]:
                best = (rate, g.axis, wider, float(growth))
        if best is None:
            return
        current[best[1]] = best[2]
        spent += best[3]
