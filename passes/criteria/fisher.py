"""Fisher: units whose masks cost the loss the least, to second order, together."""

from __future__ import annotations

import numpy as np

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.scales import in_order
from fxprune.passes.statistics import Scores, Statistics


@criterion("fisher", needs=["mask_gradients"])
def fisher(group: Group, statistics: Statistics, *, rearrange: bool = True) -> Scores:
    """How much the loss grows to second order when the unit's mask goes to zero: 1/2 E[(dL/dm)^2].

    The expectation is over samples; m is a factor on the unit where it is read. With `rearrange`, units go one after
    another, each time the one with which those removed cost the least together: 1/2 sum over u, v of E[g_u g_v]. Scores
    are growth of the loss, and comparable across groups as they are. Kwon et al., "A Fast Post-Training Pruning
    Framework for Transformers" (2022), who rearrange for one number of units; this does for all at once.

    Args:
        rearrange: whether units that do the same count together; without it each counts alone.
    """
    gradients = statistics.mask_gradient(group)
    matrix = gradients.T @ gradients / len(gradients)
    if not rearrange:
        alone: Scores = 0.5 * matrix.diagonal()
        return alone
    costs, order, paid = 0.5 * matrix.diagonal(), np.zeros(group.size, dtype=np.int64), np.zeros(group.size)
    left = np.ones(group.size, dtype=bool)
    for i in range(group.size):
        unit = int(np.argmin(np.where(left, costs, np.inf)))
        order[i], paid[i], left[unit] = unit, costs[unit], False
        costs = costs + matrix[unit]
    return in_order(order, paid)
