"""Taylor: units whose removal changes the loss the least, to first order."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fxprune.errors import RecipeError
from fxprune.groups import Group
from fxprune.passes.criteria.bn_scale import scales
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics

Form = Literal["weight", "activation", "bn"]


def _needs(*, form: Form = "weight", **_: object) -> list[str]:
    return ["mask_gradients"] if form == "activation" else ["gradients"]


@criterion("taylor", needs=_needs)
def taylor(
    group: Group,
    statistics: Statistics,
    *,
    form: Form = "weight",
    reduce: Literal["abs", "sum"] = "abs",
    normalize: str = "none",
) -> Scores:
    """How much the loss changes to first order when the unit goes: weights times gradients.

    g is the loss's gradient, a mean over all samples. Scores are changes of the loss, and comparable across groups as
    they are.

    - weight: sum of |w g| over all weights that the unit cuts, or |sum of w g| (Molchanov et al., "Importance
      Estimation for Neural Network Pruning", 2019, without the square).
    - activation: the mean over samples of |sum over positions of x dL/dx|, where the unit is read (Molchanov et al.,
      "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017). It needs no loss.
    - bn: |gamma dL/dgamma + beta dL/dbeta| of the group's batch norms, or of other scales (the gates of 2019). Groups
      without any are ranked by weight.

    Args:
        form: weight, activation or bn.
        reduce: of weights: "abs" adds up sizes, "sum" takes the size of the sum.
        normalize: scores can be divided by the group's mean, max or norm (root of the sum of squares), or none.
    """
    if form == "activation":
        scores: Scores = np.abs(statistics.mask_gradient(group)).mean(0)
    elif form == "bn" and scales(group, statistics):
        scores = _norms(group, statistics)
    elif form in ("weight", "bn") and reduce == "abs":
        scores = statistics.weight_sum(group, lambda n: (statistics.weight(n) * statistics.gradient(n)).abs())
    elif form in ("weight", "bn") and reduce == "sum":
        scores = np.abs(statistics.weight_sum(group, lambda n: statistics.weight(n) * statistics.gradient(n)))
    else:
        raise RecipeError(
            f"criterion 'taylor': form is weight, activation or bn, and reduce abs or sum, not {form!r} and {reduce!r}"
        )
    return normalised(scores, normalize, "taylor", norm=float(np.linalg.norm(scores)))


def _norms(group: Group, statistics: Statistics) -> Scores:
    total = np.zeros(group.size)
    for pair in scales(group, statistics):
        names = [n for n in pair if n is not None]
        change = sum(statistics.weight(n).double().cpu() * statistics.gradient(n) for n in names)
        assert not isinstance(change, int)
        total += statistics.by_unit(group, statistics.analysis.tensors[names[0]][0], change.abs().numpy())
    return total
