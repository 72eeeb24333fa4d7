"""SNIP: units whose connections the loss is least sensitive to go first."""

from __future__ import annotations

from torch import Tensor

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.statistics import Scores, Statistics


@criterion("snip", needs=["gradients"])
def snip(group: Group, statistics: Statistics) -> Scores:
    """How sensitive the loss is to the unit's connections: the sum of |w g|, relative to that of all weights.

    g is the loss's gradient, a mean over all samples. The sum over all weights of the model is 1, so that groups are
    comparable as they are. Lee et al., "SNIP" (2019), summed over the weights that the unit cuts.
    """

    def sensitivity(name: str) -> Tensor:
        return (statistics.weight(name).double().cpu() * statistics.gradient(name)).abs()

    total = statistics.once("snip", lambda: sum(float(sensitivity(n).sum()) for n in statistics.differentiated))
    return statistics.weight_sum(group, sensitivity) / (total or 1.0)
