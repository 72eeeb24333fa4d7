"""Uniform: every group keeps the same share of its units."""

from __future__ import annotations

from collections.abc import Mapping

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.ladder import Rung, climb, widths
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores


@ALLOCATORS.register("uniform")
def uniform(groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget) -> dict[str, int]:
    """The largest common share, in steps of each group, that stays within the budget."""
    rungs = [(n / g.size, i, Rung(g, n)) for i, g in enumerate(groups) for n in widths(g, budget)[1:]]
    return climb(groups, [r for _, _, r in sorted(rungs, key=lambda r: r[:2])], costs, budget)
