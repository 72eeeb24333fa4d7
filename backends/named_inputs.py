"""The tensors of a call, by the names that an exported file gives them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxprune.backends.base import bind_arguments, call_arguments
from fxprune.backends.dynamic import named_leaves, split
from fxprune.errors import BackendError


class NamedInputs:
    """The tensors among the arguments of a module's `forward`, by their names (`fxprune.input_names`)."""

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the arguments that the model is built for, as `call_arguments` returns them."""
        self._signature = signature
        tensors, self._constants = split(named_leaves(signature, args, kwargs))
        self.names = list(tensors)
        self._plain = all(isinstance(value, Tensor) for value in args) and not kwargs

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a call.

        Raises BackendError where they are others than those that the model was built for, or a constant is another.
        """
        # The usual call, nothing but tensors in order, must cost nothing beside the model that is being timed.
        if self._plain and not kwargs and len(args) == len(self.names) and all(isinstance(arg, Tensor) for arg in args):
            return dict(zip(self.names, args, strict=True))
        # However a caller writes them: by position where they can be.
        args, kwargs = call_arguments(self._signature, bind_arguments(self._signature, args, kwargs))
        tensors, constants = split(named_leaves(self._signature, args, kwargs))
        if tensors.keys() != set(self.names) or constants != self._constants:
            raise BackendError(
                f"the model was built for tensors {sorted(self.names)} and constants {self._constants}, but is run "
                f"with tensors {sorted(tensors)} and constants {constants}; build it again with these arguments"
            )
        return tensors
