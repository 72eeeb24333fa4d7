"""The steps of an optimizer: what is done before and after each, with mixed precision and closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import InputError


def follow(
    optimizer: torch.optim.Optimizer, before: Callable[[Tensor | float | None], None], after: Callable[[], None]
) -> list[Any]:
    """Call functions around each step of an optimizer that is made; return the hooks.

    Args:
        before: gets the loss where a closure returns it; gradients are there, and unscaled.
        after: is called when weights have moved.

    Raises:
        InputError: the optimizer evaluates its closure several times a step, with weights that move between.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS moves weights several times within a step, and what stays cannot be chosen between: take an "
            "optimizer that moves them once (SGD, Adam, ...), or call the hooks around its steps yourself"
        )
    skipped = False

    def first(opt: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal skipped
        # A fused optimizer under a GradScaler unscales and skips by itself, within its step.
        found = getattr(opt, "found_inf", None)
        skipped = found is not None and bool(found > 0)
        if skipped:
            return None
        scale = getattr(opt, "grad_scale", None)
        if scale is not None:
            _unscale(opt, scale)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            before(None)
            return None

        def evaluated() -> Any:
            loss = closure()
            before(loss)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluated}
        return (args[0], evaluated, *args[2:]), kwargs

    def second(*_: Any) -> None:
        if not skipped:
            after()

    return [optimizer.register_step_pre_hook(first), optimizer.register_step_post_hook(second)]


@torch.no_grad()
def _unscale(optimizer: Any, scale: Tensor) -> None:
    """Divide the gradients by the scale now, and let the step know."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None
