"""Copies of modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def copied(module: M, shared: Mapping[int, Any] | None = None) -> M:
    """Return a copy of a module, graph modules included.

    Args:
        shared: id -> object, of what the copy shares with the module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # copyreg about torch's own pytree specifications
        return copy.deepcopy(module, dict(shared or {}))
