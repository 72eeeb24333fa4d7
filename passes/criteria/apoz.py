"""APoZ: units that are zero most of the time go first."""

from __future__ import annotations

import numpy as np

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.statistics import Scores, Statistics


@criterion("apoz", needs=["activations"])
def apoz(group: Group, statistics: Statistics) -> Scores:
    """How often the unit is on: one less the average percentage of zeros.

    That is the share of its entries above zero where it is read, over samples, positions, its channels and all places;
    of what ReLU gives, these are all that are not zero. A share, in [0, 1], which is comparable across groups as it is.
    Hu et al., "Network Trimming" (2016).
    """
    total, count = np.zeros(group.size), np.zeros(group.size)
    for place in statistics.places(group):
        x, dim = statistics.activation(*place), statistics.dim(*place)
        total += statistics.by_unit(group, dim, x.positive / x.count)
        count += statistics.by_unit(group, dim, np.ones(len(x.positive)))
    return total / np.maximum(count, 1)
