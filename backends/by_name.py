"""The tensors of a call of a file that came without a module: in the order of its inputs, or by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fxprune.errors import BackendError


class ByName:
    """The inputs of a file; any text may be a name.

    >>> import torch
    >>> given = ByName(["input.1", "mask"], "the file").of((torch.zeros(1),), {"mask": torch.ones(2)})
    >>> {name: tuple(tensor.shape) for name, tensor in given.items()}
    {'input.1': (1,), 'mask': (2,)}
    """

    def __init__(self, names: Sequence[str], what: str) -> None:
        """`what` is the subject of the message where a call does not fit."""
        self.names = list(names)
        self._what = what

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a call by name.

        Raises BackendError where they are others than the inputs of the file.
        """
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if given.keys() != set(self.names) or len(args) + len(kwargs) != len(self.names):
            raise BackendError(
                f"{self._what} takes {', '.join(self.names)}, but was given {len(args)} tensors in order and "
                f"{', '.join(kwargs) or 'none'} by name"
            )
        return given
