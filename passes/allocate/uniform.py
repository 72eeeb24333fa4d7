"""Uniform: every group keeps the same share of its units, and groups of the same form the same number."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores


def alike(groups: list[Group], limits: Mapping[str, tuple[int, int]] | None = None) -> list[list[Group]]:
    """Return the groups in sets of the same form and limits: the same layer repeated, the heads of one size."""
    sets: dict[object, list[Group]] = {}
    for group in groups:
        sets.setdefault((group.form, (limits or {}).get(group.name)), []).append(group)
    return list(sets.values())


@ALLOCATORS.register("uniform")
def uniform(groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget) -> dict[str, int]:
    """The largest common share that stays within the budget, rounded to the nearest step of each set of one form."""
    sets = [(members, widths(members, budget)) for members in alike(groups, budget.limits)]
    lowest = {g.axis: counts[0] for members, counts in sets for g in members}
    rungs = [
        ((before + n) / (2 * members[0].size), i, {g.axis: n for g in members})
        for i, (members, counts) in enumerate(sets)
        for before, n in itertools.pairwise(counts)
    ]
    kept = climb(lowest, [r for _, _, r in sorted(rungs, key=lambda r: r[:2])], costs, budget)
    return {g.name: kept[g.axis] for g in groups}
