"""SPDY: a knapsack whose losses are weighted per group, the weights found by trying what the whole model loses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.knapsack import knapsack
from fxprune.passes.registries import ALLOCATORS, Budget, needs_error
from fxprune.passes.statistics import Scores


@ALLOCATORS.register("spdy")
def spdy(
    groups: list[Group],
    scores: Mapping[str, Scores],
    costs: Costs,
    budget: Budget,
    *,
    trials: int = 80,
    spread: float = 0.7,
) -> dict[str, int]:
    """The knapsack's widths for the loss weights at which the assembled model loses the least.

    Layer losses add up only roughly. Each trial multiplies the scores of some groups by random factors, solves the
    knapsack and measures the output's error on calibration data; the best factors are the centre of the next trials,
    which change fewer groups as time goes on. Frantar and Alistarh, "SPDY" (2022), section 3.2, with log-normal factors
    around the scores instead of uniform ones around nothing.

    Args:
        trials: how many models are tried; a quarter as many for a further budget, from the factors of the one before.
        spread: standard deviation of the factors' logarithm.
    """
    error = needs_error("spdy", budget)
    generator = np.random.default_rng(budget.seed)
    factors = budget.memory.get("spdy", np.zeros(len(groups)))
    trials = trials // 4 if "spdy" in budget.memory else trials
    known: dict[tuple[int, ...], float] = {}

    def solve(at: np.ndarray) -> tuple[float, dict[str, int]]:
        weighted = {g.name: scores[g.name] * np.exp(f) for g, f in zip(groups, at, strict=True)}
        counts = knapsack(groups, weighted, costs, budget)
        key = tuple(counts[g.name] for g in groups)
        if key not in known:
            known[key] = error(counts)
        return known[key], counts

    best, result = solve(factors)
    for number in range(trials):
        share = max(0.6 * (1 - number / trials), 0.1)
        changed = generator.random(len(groups)) < share
        if not changed.any():
            changed[generator.integers(len(groups))] = True
        candidate = factors + changed * generator.normal(0, spread, len(groups))
        value, counts = solve(candidate)
        if value < best:
            best, result, factors = value, counts, candidate
    budget.memory["spdy"] = factors
    return result
