"""Magnitude: units with small weights go first."""

from __future__ import annotations

from typing import Literal

from fxprune.errors import RecipeError
from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics


@criterion("magnitude")
def magnitude(
    group: Group,
    statistics: Statistics,
    *,
    p: float = 2,
    normalize: Literal["mean", "max", "size", "none"] = "mean",
) -> Scores:
    """The L_p norm of all weights that the unit cuts, over every coupled tensor: (sum |w|^p)^(1/p).

    Li et al., "Pruning Filters for Efficient ConvNets" (2017), summed over the group as in Fang et al., "DepGraph"
    (2023). It needs no data, and knows nothing of how much a small weight is used: accuracy usually has to be
    recovered by fine-tuning.

    Args:
        p: 1 or 2 (any positive number).
        normalize: what scores are divided by to be comparable across groups: the group's mean, its maximum, the root of
            the number of weights in a unit, or nothing.
    """
    if not p > 0:
        raise RecipeError(f"criterion 'magnitude': p must be positive, not {p}")
    scores: Scores = statistics.weight_power(group, p) ** (1 / p)
    return normalised(scores, normalize, "magnitude", size=statistics.weight_count(group) ** (1 / p))
