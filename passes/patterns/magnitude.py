"""Masks by the size of the weights alone, and by that and the size of what they are multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.passes.patterns.registry import Weight, method


@method("magnitude", data=False)
def magnitude(weight: Weight) -> tuple[Tensor, Tensor]:
    """The largest weights stay: |w|."""
    return _masked(weight, weight.matrix[:, : weight.width].abs())


@method("asp", data=False, refit=False)
def asp(weight: Weight) -> tuple[Tensor, Tensor]:
    """The largest weights stay as they are, to be trained again: Mishra et al., "Accelerating Sparse DNNs" (2021)."""
    return magnitude(weight)


@method("wanda", data=True)
def wanda(weight: Weight) -> tuple[Tensor, Tensor]:
    """The largest |w| |x| stay: Sun et al., "A Simple and Effective Pruning Approach for LLMs" (2024), equation 1."""
    norms = torch.diagonal(weight.known())[: weight.width].sqrt()
    return _masked(weight, weight.matrix[:, : weight.width].abs() * norms)


def _masked(weight: Weight, scores: Tensor) -> tuple[Tensor, Tensor]:
    mask = weight.pattern.mask(scores)
    return weight.matrix * weight.whole(mask), mask
