"""Wrappers of models: those that are looked through, and those that a Pruner has to come before."""

from __future__ import annotations

from torch import nn

from fxprune.errors import InputError


def inner(model: nn.Module) -> nn.Module:
    """Return the module that wrappers hold: what is parametrised.

    Raises:
        InputError: it is wrapped in DistributedDataParallel, which would wait for gradients that no longer come (its
            hooks are on parameters as they were before they had parametrisations), or sharded already.
    """
    while isinstance(model, nn.DataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError(
            "the model is in DistributedDataParallel already: make the Pruner before, of the model that it wraps"
        )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise InputError(
                f"'{name}' is sharded already (fully_shard): make the Pruner before, of the whole model, and shard it "
                "afterwards"
            )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise InputError(
            "the model is in FullyShardedDataParallel, which flattens parameters: make the Pruner of the whole model, "
            "and shard that with torch.distributed.fsdp.fully_shard"
        )
    return model
