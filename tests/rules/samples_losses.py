"""Samples for losses: hidden units can be cut, what is compared with a target cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.rules.losses import LOSSES
from rules import Net, Sample, aten, sample


def _classes(x: Tensor) -> Tensor:
    """A class for each row, from 0 to 2."""
    return (x[:, 0] > 0).to(torch.int64) + (x[:, 1] > 0).to(torch.int64)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x[:, :4] > 0, 1.0, -1.0)


#: Name -> its operands after the predictions (N, 4); most take a target like the predictions.
_OPERANDS: dict[str, Callable[[Tensor, Tensor], list[Any]]] = {
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "multi_margin_loss"), lambda x, y: [_classes(x)]),
    "nll_loss2d": lambda x, y: [_classes(x)[:, None, None].expand(-1, 2, 2)],
    **dict.fromkeys(("soft_margin_loss", "hinge_embedding_loss"), lambda x, y: [_sign(x)]),
    "multilabel_margin_loss": lambda x, y: [torch.stack([_classes(x), *[torch.full_like(_classes(x), -1)] * 3], 1)],
    "margin_ranking_loss": lambda x, y: [y.cos(), _sign(x)],
    "cosine_embedding_loss": lambda x, y: [y.cos(), _sign(x)[:, 0]],
    "triplet_margin_loss": lambda x, y: [y.cos(), y.sin()],
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), lambda x, y: [(x[:, :4] > 0).to(y)]),
    "kl_div": lambda x, y: [x[:, :4].softmax(-1)],
    "poisson_nll_loss": lambda x, y: [x[:, :4].abs(), True, False, 1e-8, 1],
}


def _predictions(name: str, y: Tensor) -> Tensor:
    if name == "binary_cross_entropy":
        return y.sigmoid()
    if name == "nll_loss2d":
        return y.log_softmax(1)[:, :, None, None].expand(-1, -1, 2, 2)
    return y.log_softmax(-1) if name in ("nll_loss", "nll_loss_nd", "kl_div") else y


def _sample(name: str) -> Sample:
    target = getattr(aten, name).default

    def function(net: Net, x: Tensor) -> Tensor:
        y = net.linear(net.linear(x, 8).tanh(), 4)
        loss: Tensor = target(_predictions(name, y), *_OPERANDS.get(name, lambda x, y: [x[:, :4]])(x, y))
        return loss

    return sample(target, function, groups=[8])


SAMPLES = [_sample(name) for name in LOSSES.split()]
