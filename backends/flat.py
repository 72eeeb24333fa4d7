"""Modules for exporters: tensors in, a list of tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.backends.base import tensors_of


class FlatModule(nn.Module):
    """A module as exporters handle it without special cases for nesting and constants, which are baked in."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        leaves, self._structure = pytree.tree_flatten((args, dict(kwargs)))
        # The class stands where a tensor goes.
        self._leaves = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Return the module's output tensors."""
        given = iter(tensors)
        leaves = [next(given) if leaf is Tensor else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return tensors_of(self.module(*args, **kwargs))
