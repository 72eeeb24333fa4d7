"""The torch backends: "torch" runs the module as it is, "torch-compile" through `torch.compile`.

`import torch` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.backends.base import (
    BACKENDS,
    Backend,
    Parity,
    Runner,
    bind_arguments,
    check_parity,
    forward_signature,
    tensors_of,
)
from fxprune.errors import BackendError
from fxprune.input_names import Dynamic


@contextlib.contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Let torch use `threads` CPU threads for one operator, then as many as before.

    >>> before = torch.get_num_threads()
    >>> with num_threads(1):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    if before == threads:  # setting it costs some microseconds even where nothing changes
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchRunner(Runner):
    """A module, or a compiled one, called without gradients."""

    def __init__(self, name: str, call: Callable[..., Any], threads: int) -> None:
        self.path = None
        self._name = name
        self._call = call
        self._threads = threads
        self.parity: Parity | None = None

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the output tensors; raises BackendError where the module rejects the arguments."""
        try:
            with num_threads(self._threads), torch.no_grad():
                outputs = self._call(*args, **kwargs)
        except Exception as error:  # whatever the module's own code raises
            raise BackendError(f"backend '{self._name}' cannot run the model: {error}") from error
        return [tensor.cpu() for tensor in tensors_of(outputs)]

    def describe(self) -> dict[str, Any]:
        """Return device, threads, version and the parity with plain torch."""
        return {
            "backend": self._name,
            "provider": "cpu",
            "threads": self._threads,
            "versions": {"torch": torch.__version__},
            "parity": self.parity.to_json() if self.parity else None,
        }


class TorchBackend(Backend):
    """torch on the CPU, compiled or not."""

    def __init__(self, name: str, compiled: bool) -> None:
        super().__init__()
        self.name = name
        self._compiled = compiled

    @property
    def preferred_multiple(self) -> int:
        """Float32 numbers in a 256-bit register: 8, which suits its matrix products and convolutions."""
        return 8

    def available(self) -> str | None:
        """Return None; for "torch-compile" a reason where there is no C++ compiler for the code that it generates."""
        candidates = [os.environ.get("CXX", "g++"), "g++", "clang++"]
        if not self._compiled or any(shutil.which(candidate) for candidate in candidates):
            return None
        return "torch.compile needs a C++ compiler and neither g++ nor clang++ was found; install one, or set CXX to it"

    def _build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        dynamic: Dynamic,
        path: Path | None,
    ) -> TorchRunner:
        # dynamic=None compiles for the first size, and once more for any size when a second one comes.
        call = torch.compile(module, dynamic=None if dynamic else False) if self._compiled else module
        runner = TorchRunner(self.name, call, threads)
        # The first call compiles, so that what the compiler cannot do is said here.
        arguments = bind_arguments(forward_signature(module), args, kwargs)
        runner.parity = check_parity(self.name, module, arguments, runner.run(*args, **kwargs))
        return runner


for _backend in (TorchBackend("torch", compiled=False), TorchBackend("torch-compile", compiled=True)):
    BACKENDS.add(_backend.name, _backend)
