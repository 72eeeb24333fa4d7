"""Losses, where a model returns one: what is compared with a target stays whole."""

from __future__ import annotations

import operator
from typing import Any

from fxprune.rules.core import Site, aten, register_rule

LOSSES = """
l1_loss mse_loss smooth_l1_loss huber_loss poisson_nll_loss kl_div binary_cross_entropy
binary_cross_entropy_with_logits soft_margin_loss cross_entropy_loss hinge_embedding_loss nll_loss nll_loss_nd
nll_loss2d multi_margin_loss multilabel_margin_loss margin_ranking_loss cosine_embedding_loss triplet_margin_loss
"""


def loss(site: Site, *args: Any, **_: Any) -> Any:
    """Means over predictions: they, their targets and weights stay whole."""
    for dims in args:
        for d in dims if isinstance(dims, tuple) else ():
            site.freeze(d, "a loss compares it with a target")
    return site.outputs("a loss")


for _name in LOSSES.split():
    register_rule(operator.attrgetter(_name)(aten), loss)
