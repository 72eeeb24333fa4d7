"""A model's attributes as they are, put back after a forward pass that may write to some of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def eval_with(state: ModelState, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Put `tensors` in the place of the model's own, every module into eval mode; afterwards restore all attributes."""
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = state.modules[path]
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor
        for module in state.modules.values():
            module.training = False
        yield
    finally:
        state.restore()


class ModelState:
    """Every attribute of every module as it is now, to be put back after a forward pass has written to some."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))  # a shared module has several names
        unique = {id(m): m for m in self.modules.values()}.values()
        self._before = [(m, dict(vars(m)), list(_containers(vars(m)))) for m in unique]

    def restore(self) -> None:
        """Put everything back."""
        for module, attributes, contents in self._before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, copy in contents:
                if not _same(container, copy):  # some, as a frozen configuration, refuse to be written to
                    container.clear()
                    container.extend(copy) if isinstance(container, list) else container.update(copy)


def _same(container: Any, copy: Any) -> bool:
    """Whether both hold the same objects in the same order."""
    if isinstance(container, set):
        return bool(container == copy)
    if isinstance(container, dict):
        container, copy = [*container, *container.values()], [*copy, *copy.values()]
    return len(container) == len(copy) and all(a is b for a, b in zip(container, copy, strict=True))


def _containers(state: dict[Any, Any] | list[Any]) -> Iterator[tuple[Any, Any]]:
    """Every dict, list and set inside, at any depth, with a copy of it: caches that `forward` may write to."""
    seen: dict[int, Any] = {}
    left = [state]
    while left:
        container = left.pop()
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, dict | list | set) and id(value) not in seen:
                seen[id(value)] = value
                yield value, value.copy()
                if not isinstance(value, set):
                    left.append(value)
