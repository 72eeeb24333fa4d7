"""Isomorphic: units compete within sets of groups of the same form, and every set keeps the same share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.allocate.uniform import alike
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores


@ALLOCATORS.register("isomorphic")
def isomorphic(groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget) -> dict[str, int]:
    """The best units of each set of groups of one form stay; sets are cut alike, groups within them are not.

    Fang et al., "Isomorphic Pruning for Vision Models" (2024). Scores of different forms are never compared.
    """
    lowest, rungs = {}, []
    for number, members in enumerate(alike(groups, budget.limits)):
        steps = []
        for i, group in enumerate(members):
            ranked = np.sort(scores[group.name])[::-1]
            ceiling, counts = np.inf, widths([group], budget)
            lowest[group.axis] = counts[0]
            for before, count in itertools.pairwise(counts):
                ceiling = min(ceiling, float(ranked[before:count].mean()))
                steps.append((-ceiling, i, count, count - before, group.axis))
        steps.sort(key=lambda s: s[:3])
        total = sum(g.size for g in members)
        taken = sum(lowest[g.axis] for g in members)
        for _, _, count, grown, axis in steps:
            rungs.append(((taken + grown / 2) / total, number, {axis: count}))
            taken += grown
    kept = climb(lowest, [r for _, _, r in sorted(rungs, key=lambda r: r[:2])], costs, budget)
    return {g.name: kept[g.axis] for g in groups}
