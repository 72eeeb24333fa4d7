"""LAMP: magnitude, relative to what would be left of the group."""

from __future__ import annotations

import numpy as np

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.statistics import Scores, Statistics


@criterion("lamp")
def lamp(group: Group, statistics: Statistics) -> Scores:
    """The unit's squared weights, relative to those of all units of the group that are not smaller.

    |w_u|^2 / sum over v of |w_v|^2 with |w_v| >= |w_u|, in (0, 1]; the largest unit of every group has 1, so that
    groups are comparable as they are, and none vanishes. |w_u|^2 is over all matrices and kernels that the unit cuts.
    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (2021), on units instead of weights.
    """
    power = statistics.weight_power(group, 2)
    order = np.argsort(power, kind="stable")
    left = np.cumsum(power[order][::-1])[::-1]
    scores: Scores = np.zeros(group.size)
    scores[order] = power[order] / np.where(left > 0, left, 1.0)
    return scores
