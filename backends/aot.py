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
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.backends.base import (
    BACKENDS,
    Backend,
    Parity,
    Runner,
    bind_arguments,
    call_arguments,
    forward_signature,
    tensors_of,
)
from fxprune.backends.building import into_file, parity_at_sizes
from fxprune.backends.dynamic import named_leaves, resized, sizes, sizes_to_trace, split
from fxprune.backends.flat import FlatModule
from fxprune.backends.place import Placement, as_float32, home
from fxprune.backends.torch import DTYPES, no_compiler, no_cuda, num_threads
from fxprune.errors import BackendError
from fxprune.input_names import Dynamic

ENDING = ".pt2"
#: Where a package keeps machine code; a file of `torch.export.save`, which ends in .pt2 as well, has no such folder.
_CODE = "data/aotinductor/"
#: Set to "1" when a loaded package is first called, it compares every call's tensors with those it was compiled for.
_CHECK = "AOTI_RUNTIME_CHECK_INPUTS"
#: What it says of a size of 1 where code has been compiled for any: which tensor, which dimension.
_ONE_ROW = re.compile(r"input_handles\[(\d+)\]: dim value is too small at (\d+), expected it to be >= 2, but got: 1\b")


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


def is_package(path: Path) -> bool:
    """Return whether a file is a package of compiled code.

    >>> is_package(Path("nowhere.pt2"))
    False
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_CODE in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


class PackageRunner(Runner):
    """A package without the module that it was compiled from: tensors in order, or by the names that it has for some.

    Compiled code checks nothing by itself, and reads beyond the end of a tensor that is too small. So each new set of
    arguments first goes through a copy of the package that does check.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.path = self._file = path
        self._threads = threads
        self._call = _loaded(path)
        self.device = str(self._call.get_metadata().get("AOTI_DEVICE_KEY", "cpu"))
        spec = pytree.treespec_loads(self._call.loader.get_call_spec()[0])
        _, named = pytree.tree_unflatten([None] * spec.num_leaves, spec)
        #: The inputs that are given by name; those before them are not.
        self.keywords = list(named)

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the output tensors on the CPU.

        Raises BackendError where the package was compiled for other shapes or types.
        """
        placed = self._checked(args, kwargs)
        return [tensor.cpu() for tensor in self._run(*placed)]

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a call that runs on these arguments, checked and moved once; on CUDA it waits for the GPU."""
        placed = self._checked(args, kwargs)

        def call() -> None:
            self._run(*placed)
            if self.device != "cpu":
                torch.cuda.synchronize()

        return call

    def describe(self) -> dict[str, Any]:
        """Return device, threads and versions; the number of threads in the code is the one it was compiled with."""
        return {
            "backend": AotBackend.name,
            "provider": self.device,
            "threads": self._threads,
            "versions": {"torch": torch.__version__},
            "parity": None,
        }

    def _checked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if set(kwargs) != set(self.keywords):
            wanted, given = (", ".join(names) or "no tensors" for names in (self.keywords, kwargs))
            raise BackendError(f"'{self.path}' takes {wanted} by name, but was given {given}")
        placed: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            Tensor, lambda t: t.detach().to(self.device).contiguous(), (args, dict(kwargs))
        )
        self._check([*placed[0], *(placed[1][name] for name in self.keywords)])
        return placed

    def _check(self, tensors: list[Tensor]) -> None:
        """Raise where the code was not compiled for these tensors, in order.

        Code with an open size is compiled for 2 and more, runs at 1 as well, and its check says that 1 is too small:
        then twice as many rows are checked in place of these.
        """
        call, named = _loaded(self._file), len(tensors) - len(self.keywords)
        while True:
            kwargs = dict(zip(self.keywords, tensors[named:], strict=True))
            try:
                with _checking():
                    self._run(tuple(tensors[:named]), kwargs, call)
                return
            except BackendError as error:
                found = _ONE_ROW.search(str(error))
                if found is None:
                    raise
                index, dim = map(int, found.groups())
                tensors[index] = torch.cat([tensors[index]] * 2, dim)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Any = None) -> list[Tensor]:
        try:
            with num_threads(self._threads), torch.no_grad():
                return tensors_of((call or self._call)(*args, **kwargs))
        except Exception as error:  # of the loader or of the compiled code
            reason = str(error).strip().partition("\n")[0]
            raise BackendError(f"'{self.path}' does not run on these arguments: {reason}") from error


def _loaded(path: Path) -> Any:
    try:
        return torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # a damaged file fails in many ways, and so does one for another machine
        raise BackendError(
            f"'{path}' cannot be loaded: {str(error).strip()}. A package runs with the version of torch and on the "
            "kind of processor that it was compiled for; export it again"
        ) from error


@contextmanager
def _checking() -> Iterator[None]:
    """Have a package that is called for the first time check its tensors, without what it prints about them."""
    before = os.environ.get(_CHECK)
    os.environ[_CHECK] = "1"
    # The code writes to the descriptor itself what the exception says, too.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        for descriptor in (kept, nowhere):
            os.close(descriptor)
        if before is None:
            del os.environ[_CHECK]
        else:
            os.environ[_CHECK] = before


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

    def load(self, path: str | PathLike[str], threads: int = 1) -> PackageRunner:
        """Open a package, on the device that it was compiled for; it is called with tensors, in order.

        Raises BackendError where there is no such file, or it cannot be loaded here.
        """
        if not is_package(Path(path)):
            raise BackendError(f"'{path}' is no package of compiled code; Pruned.export(\"small{ENDING}\") writes one")
        return PackageRunner(Path(path), threads)

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
        return into_file(
            path, f"model{ENDING}", lambda file: self._package(module, args, kwargs, threads, dynamic, file)
        )

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
        runner.parity = parity_at_sizes(
            self.name, module, runner, args, kwargs, dynamic, self.placement.tolerance, placed=reference.arguments
        )
        return runner


BACKEND = AotBackend()
BACKENDS.add(BACKEND.name, BACKEND)
