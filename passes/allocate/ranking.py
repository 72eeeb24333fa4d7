"""Global ranking: units of all groups compete by score."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores


@ALLOCATORS.register("global")
def ranking(groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget) -> dict[str, int]:
    """The best units of the whole model stay, whichever group they are in.

    Units come in runs of one step; a run counts by its mean score, never above the run before it in its group.
    Scores must be comparable across groups (see the criterion's `normalize`), else whole layers shrink to their floor.
    """
    rungs = []
    lowest = {}
    for i, group in enumerate(groups):
        ranked = np.sort(scores[group.name])[::-1]
        ceiling, counts = np.inf, widths([group], budget)
        lowest[group.axis] = counts[0]
        for before, count in itertools.pairwise(counts):
            ceiling = min(ceiling, float(ranked[before:count].mean()))
            rungs.append((-ceiling, i, count, {group.axis: count}))
    kept = climb(lowest, [r[-1] for r in sorted(rungs, key=lambda r: r[:3])], costs, budget)
    return {g.name: kept[g.axis] for g in groups}
