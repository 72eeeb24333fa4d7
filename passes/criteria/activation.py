"""Activation: units that are small go first."""

from __future__ import annotations

import numpy as np

from fxprune.errors import RecipeError
from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics


@criterion("activation", needs=["activations"])
def activation(group: Group, statistics: Statistics, *, p: int = 2, normalize: str = "mean") -> Scores:
    """How large the unit is where it is read: the root of the sum of E[x^2] over its channels, or the sum of E|x|.

    The mean is over samples and positions; what is read in several places counts in each. Muralidharan et al., "Compact
    Language Models via Pruning and Knowledge Distillation" (Minitron, 2024), where means of |x| over positions are
    squared over samples, which is between the two.

    Args:
        p: 2 or 1.
        normalize: what scores are divided by to be comparable across groups: the group's mean, max, or none.
    """
    if p not in (1, 2):
        raise RecipeError(f"criterion 'activation': p is 1 or 2, not {p!r}")
    scores = np.zeros(group.size)
    for place in statistics.places(group):
        x, dim = statistics.activation(*place), statistics.dim(*place)
        if p == 2:
            scores += np.sqrt(statistics.by_unit(group, dim, x.power))
        else:
            scores += statistics.by_unit(group, dim, x.absolute / x.count)
    return normalised(scores, normalize, "activation")
