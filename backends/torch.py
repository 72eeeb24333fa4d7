"""The torch backends: "torch" runs the module as it is, "torch-compile" through `torch.compile`; on the CPU or CUDA.

Options:
    device: where it runs.
    dtype: "float32" leaves the module as it is, which shares its parameters; the others cast a copy of it, and its
        inputs on entry. `run` gives outputs of half precision back in float32, so that an option changes no type that a
        caller sees.
    channels_last: images and the weights of convolutions lie with their channels last, in a copy.
    cuda_graphs: `bind` records all kernels of a call once and replays them, so that Python is not waited for; with
        "torch-compile" the compiler does so ("reduce-overhead"), in `run` too.
    sparse: "auto" gives each linear layer whose weight holds the 2:4 pattern a sparse kernel, where that is the faster
        one for its shape and rows: `fxprune.backends.sparse`.

`import torch` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.backends import sparse
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
from fxprune.backends.place import HALF, Placement, as_float32, home
from fxprune.errors import BackendError
from fxprune.input_names import Dynamic

#: Option `dtype` -> what the module is cast to; None leaves it as it is.
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def no_cuda() -> str:
    """Return why torch cannot use CUDA here, with what mends it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch, or choose device cpu"
    return f"torch {torch.__version__} finds no CUDA device; check the driver with nvidia-smi, or choose device cpu"


def no_compiler(cuda: bool = False) -> str | None:
    """Return why code that torch generates cannot be compiled here, or None where it can.

    For the CPU it generates C++; for `cuda` Triton compiles the kernels, and needs a C compiler for what starts them.
    """
    candidates = [os.environ.get("CXX", "g++"), "g++", "clang++"]
    if cuda:
        candidates += [os.environ.get("CC", "gcc"), "gcc", "clang"]
    if any(shutil.which(candidate) for candidate in candidates):
        return None
    return "torch.compile needs a C++ compiler and neither g++ nor clang++ was found; install one, or set CXX to it"


class TorchRunner(Runner):
    """A module, or a compiled one, called without gradients."""

    def __init__(self, backend: TorchBackend, call: Callable[..., Any], threads: int, placement: Placement) -> None:
        self.path = None
        self._backend = backend
        self._call = call
        self._threads = threads
        self._placement = placement
        self.parity: Parity | None = None
        self.dtype = "float32"
        #: What became of the layers with a 2:4 pattern; None where nothing was tried.
        self.sparse: list[sparse.LayerChoice] | None = None

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the output tensors, those of half precision that the option `dtype` made in float32.

        Raises BackendError where the module rejects the arguments.
        """
        outputs = [tensor.cpu() for tensor in tensors_of(self._outputs(*self._placement.arguments((args, kwargs))))]
        return outputs if self._placement.dtype is None else [as_float32(tensor) for tensor in outputs]

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a call that runs on these arguments, which are moved and cast once, here.

        On CUDA the call returns when the GPU has computed the outputs, which stay there in the type that they have.
        """
        args, kwargs = self._placement.arguments((args, kwargs))
        if self._placement.device.type == "cpu":
            return functools.partial(self._outputs, args, kwargs)
        started: Callable[[], object] = functools.partial(self._outputs, args, kwargs)
        if self._backend.replays:
            started()  # arguments that do not fit are no fault of recording
            try:
                started = sparse.graphed(started)
            except (RuntimeError, BackendError) as error:
                said = str(error).partition("\n")[0]  # CUDA's further lines are about debugging kernels
                raise BackendError(
                    f"backend '{self._backend.name}' cannot record the model as a CUDA graph: {said}. "
                    "Build it with cuda_graphs=False."
                ) from error
        device = self._placement.device

        def call() -> None:
            started()
            torch.cuda.synchronize(device)

        return call

    def _outputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the module on arguments that are where and what they have to be."""
        try:
            with num_threads(self._threads), torch.no_grad():
                return self._call(*args, **kwargs)
        except Exception as error:  # whatever the module's own code raises
            raise BackendError(f"backend '{self._backend.name}' cannot run the model: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Return device, type, options, threads, versions, the parity with plain torch and its tolerance."""
        told: dict[str, Any] = {
            "backend": self._backend.name,
            "provider": self._placement.device.type,
            "dtype": self.dtype,
            "options": dict(self._backend.options),
            "threads": self._threads,
            "versions": {"torch": torch.__version__},
            "parity": self.parity.to_json() if self.parity else None,
            "tolerance": self._placement.tolerance,
        }
        if self._placement.device.type == "cuda":
            told["gpu"] = torch.cuda.get_device_name(self._placement.device)
            told["versions"]["cuda"] = torch.version.cuda
        if self.sparse is not None:
            told["sparse"] = [choice.to_json() for choice in self.sparse]
        return told


class TorchBackend(Backend):
    """torch on the CPU or CUDA, compiled or not."""

    OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
        {
            "device": ("cpu", "cuda"),
            "dtype": tuple(DTYPES),
            "channels_last": (False, True),
            "cuda_graphs": (False, True),
            "sparse": ("off", "auto"),
        }
    )

    def __init__(self, name: str, compiled: bool) -> None:
        super().__init__()
        self.name = name
        self._compiled = compiled

    @property
    def placement(self) -> Placement:
        """Where and in what type the options say that a module runs."""
        return Placement(
            torch.device(self.options["device"]), DTYPES[self.options["dtype"]], self.options["channels_last"]
        )

    @property
    def replays(self) -> bool:
        """Whether `bind` records a CUDA graph; a compiled module does so by itself."""
        return bool(self.options["cuda_graphs"]) and not self._compiled

    @property
    def preferred_multiple(self) -> int:
        """Numbers in a 256-bit register on the CPU: 8 of float32, 16 of half precision.

        On CUDA 64 in half precision, 32 else: 128 bytes, the multiple at which NVIDIA's guide to matrix products says
        that tensor cores are used best.
        """
        half = DTYPES[self.options["dtype"]] is not None
        if self.options["device"] == "cuda":
            return 64 if half else 32
        return 16 if half else 8

    def available(self) -> str | None:
        """Return None, or a reason: no CUDA device, options that need others, no compiler for "torch-compile"."""
        cuda = self.options["device"] == "cuda"
        if cuda and not torch.cuda.is_available():
            return no_cuda()
        if self.options["cuda_graphs"] and not cuda:
            return "cuda_graphs needs device cuda"
        if self.options["sparse"] == "auto" and not (cuda and DTYPES[self.options["dtype"]] in HALF):
            return (
                "sparse auto needs device cuda and dtype float16 or bfloat16: there are no other 2:4 kernels in torch"
            )
        return no_compiler(cuda) if self._compiled else None

    def _build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        dynamic: Dynamic,
        path: Path | None,
    ) -> TorchRunner:
        # What the outputs are compared with: the module where and as it is.
        reference = Placement(home(module, (args, kwargs)))
        module = reference.module(module)
        arguments = reference.arguments(bind_arguments(forward_signature(module), args, kwargs))
        placement = self.placement
        ready = placement.module(module)
        chosen = None
        if self.options["sparse"] == "auto":
            ready, chosen = self._with_sparse(ready, module, placement.arguments((args, kwargs)))
        runner = TorchRunner(self, self._compile(ready, bool(dynamic)), threads, placement)
        runner.sparse, runner.dtype = chosen, _dtype_of(ready)
        # The first call compiles, so that what the compiler cannot do is said here.
        outputs = runner.run(*args, **kwargs)
        runner.parity = check_parity(self.name, module, arguments, outputs, placement.tolerance)
        return runner

    def _compile(self, module: nn.Module, dynamic: bool) -> Callable[..., Any]:
        if not self._compiled:
            return module
        mode = "reduce-overhead" if self.options["cuda_graphs"] else None
        # dynamic=None compiles for the first size, and once more for any size when a second one comes.
        return torch.compile(module, dynamic=None if dynamic else False, mode=mode)

    def _with_sparse(
        self, ready: nn.Module, given: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> tuple[nn.Module, list[sparse.LayerChoice]]:
        """Return the module with sparse weights where they are faster, and what became of each layer with a 2:4 one.

        Raises BackendError where the module cannot run.
        """
        if ready is given:  # the weights are the caller's, and replacing them in the layers must not reach those
            ready = copy.deepcopy(ready, {id(t): t for t in [*ready.parameters(), *ready.buffers()]})
        args, kwargs = arguments
        try:
            with torch.no_grad():
                rows = sparse.count_rows(ready, lambda: ready(*args, **kwargs))
        except Exception as error:  # whatever the module's own code raises
            raise BackendError(f"backend '{self.name}' cannot run the model: {error}") from error
        graphs = self._compiled or bool(self.options["cuda_graphs"])
        return ready, sparse.choose(ready, rows, graphs)


def _dtype_of(module: nn.Module) -> str:
    """Return the type of the module's first floating-point tensor."""
    found = (t.dtype for t in [*module.parameters(), *module.buffers()] if t.dtype.is_floating_point)
    return str(next(found, torch.float32)).removeprefix("torch.")


for _backend in (TorchBackend("torch", compiled=False), TorchBackend("torch-compile", compiled=True)):
    BACKENDS.add(_backend.name, _backend)
