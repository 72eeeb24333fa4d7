"""Evolution: units move from one group to another as long as the assembled model loses less."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.knapsack import knapsack
from fxprune.passes.allocate.ladder import widths
from fxprune.passes.registries import ALLOCATORS, Budget, needs_error
from fxprune.passes.statistics import Scores


@ALLOCATORS.register("evolution")
def evolution(
    groups: list[Group],
    scores: Mapping[str, Scores],
    costs: Costs,
    budget: Budget,
    *,
    generations: int = 12,
    offspring: int = 8,
) -> dict[str, int]:
    """From the knapsack's widths, swaps that keep within the budget and lose less on calibration data.

    In each generation offspring widen one to three groups by a step and narrow others of the same kind until the budget
    holds; the best of parent and offspring goes on. Sieberling et al., "EvoPress" (2024); Tang et al., "DarwinLM"
    (2025).
    """
    error = needs_error("evolution", budget)
    generator = np.random.default_rng(budget.seed)
    options = {g.name: widths([g], budget) for g in groups}
    parent = knapsack(groups, scores, costs, budget)
    parent = {g.name: min(options[g.name], key=lambda n, g=g: abs(n - parent[g.name])) for g in groups}  # type: ignore[misc]
    best = error(parent)
    allowed = max(
        budget.share * costs.of(budget.kind, {}), costs.of(budget.kind, {g.axis: parent[g.name] for g in groups})
    )

    def child() -> dict[str, int] | None:
        made = dict(parent)
        for _ in range(min(int(generator.integers(1, 4)), int(generator.integers(1, 4)))):
            wider = groups[generator.integers(len(groups))]
            place = options[wider.name].index(made[wider.name])
            if place + 1 < len(options[wider.name]):
                made[wider.name] = options[wider.name][place + 1]
            others = [g for g in groups if g is not wider and g.kind == wider.kind]
            for _ in range(8):
                if costs.of(budget.kind, {g.axis: made[g.name] for g in groups}) <= allowed or not others:
                    break
                other = others[generator.integers(len(others))]
                place = options[other.name].index(made[other.name])
                made[other.name] = options[other.name][max(place - 1, 0)]
        fits = costs.of(budget.kind, {g.axis: made[g.name] for g in groups}) <= allowed
        return made if fits and made != parent else None

    for _ in range(generations):
        children = [c for c in (child() for _ in range(offspring)) if c is not None]
        for made in children:
            value = error(made)
            if value < best:
                best, parent = value, made
    return parent
