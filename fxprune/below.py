"""Dispatch modes that look below the operator that is being recorded: where it is batched, or where types are cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Below(TorchDispatchMode):
    """Hands every operator that reaches the backend to `record`: those that `torch.vmap` and its like turn one into."""

    def __init__(self, record: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the operator on plain tensors."""
        return self.record(func, args, kwargs or {})


class Casts(TorchDispatchMode):
    """Notes which tensors are cast to which type on the way down: what autocast does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; note it where it is a cast."""
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and result.dtype != args[0].dtype:
            self.casts[id(args[0])] = result.dtype
        return result


def transformed() -> bool:
    """Whether a function transform of `torch.func` is at work."""
    return _functorch.peek_interpreter_stack() is not None


def wrapped(tensor: Any) -> bool:
    """Whether the tensor stands for a batch of tensors, or for one that is differentiated (`torch.func`)."""
    return isinstance(tensor, Tensor) and bool(_functorch.is_functorch_wrapped_tensor(tensor))
