"""FLAP: units that hardly change go first, because a bias can stand in for them."""

from __future__ import annotations

import numpy as np

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics


@criterion("flap", needs=["activations"])
def flap(group: Group, statistics: Statistics, *, normalize: str = "mean") -> Scores:
    """How much what is read of the unit fluctuates: the sum of var(x_j) W_ij^2 over all weights that read it.

    The variance is over samples and positions. Queries and keys weigh each other: var(q_u k_u) as if they were
    independent; what is read without weights has the weight 1. What the mean of the unit gave is lost unless biases are
    refitted, as every `reconstruction` but "none" does. An et al., "Fluctuation-based Adaptive Structured Pruning for
    Large Language Models" (2024).

    Args:
        normalize: how scores become comparable across groups: divided by the group's mean or max, or none; "zscore"
            takes the mean away and divides by the standard deviation, as in the paper.
    """
    scores = np.zeros(group.size)
    for read in statistics.reads(group):
        x, dim = statistics.activation(read.operand, read.dim), statistics.dim(read.operand, read.dim)
        if read.other is not None:
            y, across = statistics.activation(*read.other), statistics.dim(*read.other)
            scores += statistics.by_unit(group, dim, x.variance) * statistics.by_unit(group, across, y.power)
            scores += statistics.by_unit(group, dim, x.mean**2) * statistics.by_unit(group, across, y.variance)
        else:
            weight = statistics.column_power(read.by, 2) if read.by is not None else np.ones(len(x.total))
            scores += statistics.by_unit(group, dim, weight * x.variance)
    if normalize == "zscore":
        standard: Scores = (scores - scores.mean()) / max(float(scores.std()), 1e-300)
        return standard
    return normalised(scores, normalize, "flap")
