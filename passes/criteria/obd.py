"""Optimal brain damage: units whose weights the loss is least curved in go first."""

from __future__ import annotations

from fxprune.groups import Group
from fxprune.passes.registries import criterion
from fxprune.passes.statistics import Scores, Statistics


@criterion("obd", needs=["sample_gradients"])
def obd(group: Group, statistics: Statistics) -> Scores:
    """How much the loss grows to second order without the unit's weights: the sum of 1/2 w^2 E[g^2].

    E[g^2], the mean over samples of each weight's squared gradient, stands for the diagonal of the Hessian: it is the
    empirical Fisher, or without a loss the Gauss-Newton matrix of the output's squared error. All weights that the unit
    cuts count. Scores are growth of the loss, and comparable across groups as they are. LeCun et al., "Optimal Brain
    Damage" (1990).
    """
    return 0.5 * statistics.weight_sum(
        group, lambda name: statistics.weight(name).double().cpu().square() * statistics.squared_gradient(name)
    )
