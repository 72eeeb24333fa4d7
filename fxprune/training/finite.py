"""Whether what a step is made of is finite: the loss, gradients, weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def infinite(model: nn.Module, loss: float | None, sharded: bool) -> str | None:
    """Return what is NaN or infinite, the loss or a gradient; None where all is well.

    Args:
        sharded: parameters are spread over processes, of which all stop where one does: else they would wait for it.
    """
    if loss is not None and not math.isfinite(loss):
        return "the loss"
    found = [(_plainly(n), p.grad) for n, p in model.named_parameters() if p.grad is not None]
    if not found:
        return None
    flags = ~torch.isfinite(torch.stack(torch._foreach_norm([_local(g).detach() for _, g in found])))
    if sharded:
        numbers = flags.to(torch.int32)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        flags = numbers.bool()
    return f"the gradient of '{found[int(flags.nonzero()[0])][0]}'" if bool(flags.any()) else None


def infinite_weight(model: nn.Module) -> str | None:
    """Return the name of a parameter that holds NaN or infinite numbers, None where none does."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            return _plainly(name)
    return None


def _plainly(name: str) -> str:
    """The name of a parameter without its mask."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return getattr(tensor, "_local_tensor", tensor)
