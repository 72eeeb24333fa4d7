"""The backend "torch-aot": compiled ahead of time by torch (AOTInductor) into a package, one file that ends in .pt2.

The file holds machine code and weights. Neither the model's class nor fxprune is needed to run it, in any process with
the version of torch that wrote it and a processor (or GPU) of the same kind:

    run = torch._inductor.aoti_load_package("small.pt2")
    outputs = run(image)  # the tensors of the arguments in order; a list of the output tensors

The package itself checks no shapes and takes tensors to be contiguous; the runner here does both.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.backends.base import (
    BACKENDS,
    Backend,
    Parity,
    Runner,
    bind_arguments,
    call_arguments,
    check_parity,
    forward_signature,
    tensors_of,
)
from fxprune.backends.dynamic import named_leaves, other_sizes, resized, sizes, sizes_to_trace, split
from fxprune.backends.flat import FlatModule
from fxprune.backends.place import Placement, as_float32, home
from fxprune.backends.torch import DTYPES, no_compiler, no_cuda, num_threads
from fxprune.errors import BackendError
from fxprune.input_names import Dynamic

ENDING = ".pt2"


def package(module: nn.Module, tensors: Sequence[Tensor], open_dims: Sequence[Mapping[int, str]], path: Path) -> None:
    """Compile `module`, tensors in and a list of tensors out, into the file `path`.

    `open_dims` has for each tensor the dimensions that are left open, by the names of their sizes. The code uses as
    many CPU threads as torch is set to now.

    Raises BackendError where the module cannot be exported with these sizes open, or not be compiled.
    """
    labels = {label for dims in open_dims for label in dims.values()}
    named = {label: torch.export.Dim(label, min=1) for label in labels}
    shapes = (
        {"tensors": tuple({d: named[n] for d, n in dims.items()} or None for dims in open_dims)} if labels else None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Warnings are torch's own about its parts; what goes wrong is an exception.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes)
        except Exception as error:  # whatever a model's own code raises arrives here
            hint = " Build with dynamic=False if a dynamic size is what it stumbles over." if labels else ""
            raise BackendError(f"torch.export failed: {error}.{hint}") from error
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:  # the compiler's, of many classes
            raise BackendError(f"torch cannot compile the model ahead of time: {error}") from error


class AotRunner(Runner):
    """A loaded package; `run` takes tensors of the shapes that it was built with, but for the sizes that are open."""

    def __init__(
        self,
        backend: AotBackend,
        path: Path,
        signature: inspect.Signature,
        example: Mapping[str, Any],
        threads: int,
        dynamic: Dynamic,
    ) -> None:
        """`example` are the leaves of the arguments, placed, by their names (`fxprune.input_names`)."""
        self.path = None
        self.parity: Parity | None = None
        self._backend = backend
        self._signature = signature
        self._threads = threads
        self._tensors, self._constants = split(example)
        self._dynamic = dynamic
        self._call: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the output tensors on the CPU, those of half precision that the option `dtype` made in float32.

        Raises BackendError where the arguments are not of the shapes and types that the package was built for.
        """
        outputs = [tensor.cpu() for tensor in self._outputs(self._inputs(args, kwargs))]
        return outputs if self._backend.placement.dtype is None else [as_float32(tensor) for tensor in outputs]

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a call that runs on these arguments, checked, moved and cast once; on CUDA it waits for the GPU."""
        inputs = self._inputs(args, kwargs)
        if self._backend.placement.device.type == "cpu":
            return functools.partial(self._outputs, inputs)

        def call() -> None:
            self._outputs(inputs)
            torch.cuda.synchronize()

        return call

    def _outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        try:
            with num_threads(self._threads), torch.no_grad():
                return tensors_of(self._call(*inputs))
        except Exception as error:
            raise BackendError(f"backend '{self._backend.name}' cannot run the model: {error}") from error

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors as the compiled code takes them: contiguous, in its order, of its shapes and types."""
        args, kwargs = call_arguments(self._signature, bind_arguments(self._signature, args, kwargs))
        args, kwargs = self._backend.placement.arguments((args, kwargs))
        tensors, constants = split(named_leaves(self._signature, args, kwargs))
        if tensors.keys() != self._tensors.keys() or constants != self._constants:
            raise BackendError(
                f"the model was built for tensors {sorted(self._tensors)} and constants {self._constants}, but is run "
                f"with tensors {sorted(tensors)} and constants {constants}; build it again with these arguments"
            )
        found = sizes(self._signature, args, kwargs, self._dynamic)
        for name, like in self._tensors.items():
            given, free = tensors[name], self._dynamic.get(name, {})
            shape = tuple(found[free[i]] if i in free else n for i, n in enumerate(like.shape))
            if tuple(given.shape) != shape or given.dtype != like.dtype:
                raise BackendError(
                    f"the model was built for '{name}' of shape {shape} and {like.dtype}, but is run with "
                    f"{tuple(given.shape)} and {given.dtype}"
                )
        return [tensors[name].contiguous() for name in self._tensors]

    def describe(self) -> dict[str, Any]:
        """Return device, options, threads, versions, the parity with plain torch and its tolerance."""
        placement = self._backend.placement
        return {
            "backend": self._backend.name,
            "provider": placement.device.type,
            "options": dict(self._backend.options),
            "threads": self._threads,
            "dynamic": {name: dict(dims) for name, dims in self._dynamic.items()},
            "versions": {"torch": torch.__version__},
            "parity": self.parity.to_json() if self.parity else None,
            "tolerance": placement.tolerance,
        }


class AotBackend(Backend):
    """torch, compiled ahead of time into one file that needs no Python code of the model."""

    name = "torch-aot"
    OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType({"device": ("cpu", "cuda"), "dtype": tuple(DTYPES)})

    @property
    def placement(self) -> Placement:
        """Where and in what type the options say that a module runs."""
        return Placement(torch.device(self.options["device"]), DTYPES[self.options["dtype"]])

    @property
    def preferred_multiple(self) -> int:
        """That of the backend "torch" with the same options."""
        return BACKENDS["torch"].configured(**self.options).preferred_multiple

    def available(self) -> str | None:
        """Return None where there is a C++ compiler and, with device cuda, a GPU; else which one is missing."""
        if self.options["device"] == "cuda" and not torch.cuda.is_available():
            return no_cuda()
        return no_compiler()

    def _build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        dynamic: Dynamic,
        path: Path | None,
    ) -> AotRunner:
        if path is not None and path.suffix != ENDING:
            raise BackendError(f"a package of torch ends in {ENDING}, which '{path.name}' does not")
        file = path or Path(tempfile.mkdtemp(prefix="fxprune-")) / f"model{ENDING}"
        try:
            runner = self._package(module, args, kwargs, threads, dynamic, file)
        except BaseException:
            if path is None:
                shutil.rmtree(file.parent, ignore_errors=True)
            raise
        if path is None:
            weakref.finalize(runner, shutil.rmtree, file.parent, ignore_errors=True)
        runner.path = path
        return runner

    def _package(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        dynamic: Dynamic,
        file: Path,
    ) -> AotRunner:
        """Write the file, load it and compare it with torch, at other sizes too where any are open."""
        reference = Placement(home(module, (args, kwargs)))
        module = reference.module(module)
        signature = forward_signature(module)
        args, kwargs = call_arguments(signature, bind_arguments(signature, args, kwargs))
        given = sizes(signature, args, kwargs, dynamic)
        example = resized(signature, args, kwargs, dynamic, sizes_to_trace(given))
        placed_args, placed_kwargs = self.placement.arguments(example)
        leaves = named_leaves(signature, placed_args, placed_kwargs)
        flat = FlatModule(self.placement.module(module), placed_args, placed_kwargs).eval()
        tensors, _ = split(leaves)
        with num_threads(threads):  # the number is compiled in
            package(flat, [t.contiguous() for t in tensors.values()], [dynamic.get(n, {}) for n in tensors], file)
        runner = AotRunner(self, file, signature, leaves, threads, dynamic)
        trials = [(args, kwargs)]
        if dynamic:
            trials.append(resized(signature, args, kwargs, dynamic, other_sizes(given)))
        found = []
        for positional, named in trials:
            outputs = runner.run(*positional, **named)
            wanted = reference.arguments(bind_arguments(signature, positional, named))
            found.append(check_parity(self.name, module, wanted, outputs, self.placement.tolerance))
        runner.parity = Parity(max(parity.max_abs for parity in found), max(parity.max_rel for parity in found))
        return runner


BACKENDS.add(AotBackend.name, AotBackend())
