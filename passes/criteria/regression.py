"""Channel selection by least squares: the units stay that together explain best what reads the group."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fxprune.groups import Group
from fxprune.passes.consumers import Contraction
from fxprune.passes.registries import criterion
from fxprune.passes.scales import in_order
from fxprune.passes.statistics import Scores, Statistics


@criterion("regression", needs=["moments", "activations"])
def regression(group: Group, statistics: Statistics) -> Scores:
    """What the unit adds to the best fit, by factors on units, of what reads the group.

    The dense results Y = sum of Z_u, Z_u = W_u x_u, are fitted by sum of b_u Z_u. Units are chosen one after the other,
    each time the one that lowers E|Y - sum of b_u Z_u|^2 the most with all factors b fitted anew; a unit's score is by
    how much. Errors are relative to E|Y|^2 and averaged over the contractions that read the group, and thereby
    comparable across groups. He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (2017), equation
    2, by greedy forward selection instead of LASSO. Where no contraction reads a group, as of queries and keys, a score
    is the unit's share of the mean squares.
    """
    consumers = statistics.consumers(group)
    if not consumers:
        return _share(group, statistics)
    grams = [_gram(group, statistics, c) for c in consumers]
    order, gains = _forward(np.mean([g / max(float(g.sum()), 1e-300) for g in grams], axis=0))
    return in_order(order[::-1], gains[::-1])


def _gram(group: Group, statistics: Statistics, c: Contraction) -> Scores:
    """E[Z_u . Z_v] of one contraction, (units, units)."""
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    matrices = c.matrix(statistics.weight(c.weight)).double().cpu()
    for matrix, moment, units in zip(matrices, statistics.moment(c), statistics.units(group, c), strict=True):
        inside = torch.from_numpy(np.flatnonzero(units >= 0))
        index, weight = torch.from_numpy(units)[inside], matrix[:, inside]
        products = weight.T @ weight * moment[inside][:, inside]
        rows = torch.zeros(group.size, len(inside), dtype=torch.float64).index_add_(0, index, products)
        total.index_add_(1, index, rows)
    return total.numpy()


def _forward(gram: Scores) -> tuple[npt.NDArray[np.int64], Scores]:
    """The units in the order in which they are chosen, and by how much each lowers the error.

    A Cholesky factorisation that pivots on what is gained: O(units^3).
    """
    size = len(gram)
    spread, tied = gram.diagonal().copy(), gram.sum(1)  # of what is not explained yet: E|Z_u|^2, E[Z_u . Y]
    negligible = 1e-12 * max(float(spread.max()), 1e-300)
    factor, left = np.zeros((size, size)), np.ones(size, dtype=bool)
    order, gains = np.zeros(size, dtype=np.int64), np.zeros(size)
    for i in range(size):
        gain = np.where(spread > negligible, tied**2 / np.maximum(spread, negligible), 0.0)
        unit = int(np.argmax(np.where(left, gain, -1.0)))
        order[i], gains[i], left[unit] = unit, gain[unit], False
        if gain[unit] > 0:
            factor[:, i] = (gram[unit] - factor[:, :i] @ factor[unit, :i]) / np.sqrt(spread[unit])
            tied = tied - factor[:, i] * (tied[unit] / np.sqrt(spread[unit]))
            spread = spread - factor[:, i] ** 2
    return order, gains


def _share(group: Group, statistics: Statistics) -> Scores:
    power = np.ones(group.size)
    for place in statistics.places(group):
        power *= statistics.by_unit(group, statistics.dim(*place), statistics.activation(*place).power)
    return power / max(float(power.sum()), 1e-300)
