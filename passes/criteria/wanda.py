"""Wanda: units that are small, or read with small weights, go first."""

from __future__ import annotations

import numpy as np

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics


@criterion("wanda", needs=["activations"])
def wanda(group: Group, statistics: Statistics, *, normalize: str = "mean") -> Scores:
    """What is read of the unit: the sum of |W_ij| |x_j| over all weights that read it.

    |x_j| is the root of the mean square of input j. Queries and keys weigh each other: |q_u| |k_u|; what is read
    without weights has the weight 1. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models"
    (2024), equation 1, summed over all rows i and the inputs j of the unit.

    Args:
        normalize: what scores are divided by to be comparable across groups: the group's mean, max, or none.
    """
    scores = np.zeros(group.size)
    for read in statistics.reads(group):
        power, dim = statistics.activation(read.operand, read.dim).power, statistics.dim(read.operand, read.dim)
        if read.other is not None:
            other = statistics.by_unit(group, statistics.dim(*read.other), statistics.activation(*read.other).power)
            scores += np.sqrt(statistics.by_unit(group, dim, power) * other)
        else:
            weight = statistics.column_power(read.by, 1) if read.by is not None else np.ones(len(power))
            scores += statistics.by_unit(group, dim, weight * np.sqrt(power))
    return normalised(scores, normalize, "wanda")
