"""The TensorRT backends: "tensorrt" for the GPU at hand, "tensorrt-rtx" for any, also where there is none.

The libraries `tensorrt` and `tensorrt_rtx` have the same interface, so that one class serves both. Neither is imported
before an engine is built or loaded.
"""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fxprune.backends import engines, onnxfile
from fxprune.backends.base import (
    BACKENDS,
    TOLERANCE,
    Backend,
    bind_arguments,
    call_arguments,
    check_parity,
    forward_signature,
    inference_copy,
)
from fxprune.backends.building import parity_at_sizes
from fxprune.backends.dynamic import BATCH, named_leaves, places, sizes
from fxprune.backends.engine_builder import Built, Order, build, errors, library, messages
from fxprune.backends.engine_runner import EngineRunner
from fxprune.backends.engines import Engine, Profile, Shape
from fxprune.backends.onnx_export import export
from fxprune.backends.onnx_session import SessionSettings, session
from fxprune.backends.onnxruntime import LIBRARIES, OnnxBuilt, OnnxRunner
from fxprune.errors import BackendError
from fxprune.input_names import Dynamic

#: The largest relative difference from torch that a model may show, by the type that it computes in.
TOLERANCES = {"float32": TOLERANCE, "float16": 2e-2, "bfloat16": 1e-1}
#: The smallest and the largest batch of an engine, and the one that it is best at where no example says another.
SMALLEST_BATCH, BEST_BATCH, LARGEST_BATCH = 1, 8, 32

Batch = int | tuple[int, int, int]


class TensorRTBackend(Backend):
    """NVIDIA's TensorRT, through ONNX; engines are built ahead of time by `compile_engine`.

    Options: `dtype` is what weights and activations are computed in, while inputs and outputs keep the types that the
    module gives them; `sparse` asks for sparse kernels: "auto" where a weight has the 2:4 pattern, "on", "off".
    """

    OPTIONS = MappingProxyType({"dtype": ("float32", "float16", "bfloat16"), "sparse": ("auto", "on", "off")})

    def __init__(self, name: str, module: str, tool: str, ahead_of_time: bool) -> None:
        """`tool` is the library's command line; `ahead_of_time`: it builds without the GPU that runs the engine."""
        super().__init__()
        self.name = name
        self._module = module
        self._tool = tool
        self._ahead_of_time = ahead_of_time

    @property
    def preferred_multiple(self) -> int:
        """Channels that tensor cores take at a time: 8, and 32 in a 2:4 product."""
        return 32 if self.options["sparse"] == "on" else 8

    def available(self) -> str | None:
        """Return None where engines can be run here, else why not."""
        reason = self._not_installed()
        if reason is None and not torch.cuda.is_available():
            ahead = "engines can be built here (`fxprune export --engine`), not run" if self._ahead_of_time else ""
            reason = f"torch sees no CUDA GPU; {ahead or 'run this where there is one, or build with tensorrt-rtx'}"
        return reason

    def can_build(self) -> str | None:
        """Return None where engines can be built here, else why not."""
        return self._not_installed() if self._ahead_of_time else self.available()

    def _not_installed(self) -> str | None:
        names = (self._module, "onnx_ir", *LIBRARIES)
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} not installed; pip install 'fxprune[{self.name}]'" if missing else None

    def compile_engine(
        self,
        model: nn.Module | str | PathLike[str],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        path: str | PathLike[str],
        compute_capability: str | Sequence[str] | None = None,
        batch: Batch | None = None,
        shapes: Mapping[str, Sequence[Shape]] | None = None,
        dynamic: bool | Dynamic = True,
        timing_cache: str | PathLike[str] | None = None,
        onnx: str | PathLike[str] | None = None,
    ) -> Engine:
        """Build an engine and write it to `path`, with what it was built for in `path` + ".json".

        A module is exported to ONNX and that file, in the backend's dtype, compared with the module on the CPU. An ONNX
        file may be quantised: QuantizeLinear and DequantizeLinear, symmetric, are what TensorRT takes as INT8.

        Args:
            model: a module with its example inputs, or an ONNX file.
            compute_capability: of the GPUs that shall run the engine, "8.9" or several. By default, and always with
                full TensorRT, the GPU at hand; TensorRT-RTX without one builds for every GPU from 8.6 on.
            batch: the best size of the batch, or (smallest, best, largest); by default 1, the example's and 32.
            shapes: input -> (smallest, best, largest) shape; by default 1, the example's and the example's in open
                dimensions other than the batch. An ONNX file that has such takes them.
            dynamic: of a module, that of `Backend.build`: sizes that may change from call to call.
            timing_cache: a file in which full TensorRT keeps the times of kernels from build to build.
            onnx: keep the file that the engine is built from here.

        Raises:
            BackendError: something is missing here; the model cannot be exported, computes something else in this
                dtype, or has an operator that TensorRT does not take; the GPU or a shape is none it builds for.
            InputError: the arguments do not fit the module.
        """
        self._refuse(timing_cache)
        target = Path(path)
        with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
            file = Path(onnx) if onnx else Path(folder) / "model.onnx"
            parity = None
            if isinstance(model, nn.Module):
                batch, shapes = _example_shapes(model, args, kwargs or {}, dynamic, batch, shapes or {})
                exported = Path(folder) / "export.onnx"
                export(model, args, kwargs, exported, dynamic)
                weights = self._write(exported, file)
                parity = self._parity(model, args, dict(kwargs or {}), file)
            else:
                weights = self._write(Path(model), file)
            order = Order(
                file=file,
                wanted=_listed(compute_capability),
                batch=_batch(batch),
                shapes={name: _profile(name, given) for name, given in (shapes or {}).items()},
                sparse=self.options["sparse"] == "on" or (self.options["sparse"] == "auto" and bool(weights.held)),
                exact=self.options["dtype"] == "float32",
                timing_cache=Path(timing_cache) if timing_cache else None,
            )
            built = build(self._module, order, self._ahead_of_time)
        engine = self._engine(
            target, order, built, weights, parity, Path(onnx) if onnx else target.with_suffix(".onnx")
        )
        engines.write(engine, built.data)
        return engine

    def _refuse(self, timing_cache: str | PathLike[str] | None) -> None:
        """Raise where no engine can be built, or not as is wished."""
        reason = self.can_build()
        if reason is not None:
            raise BackendError(f"backend '{self.name}' cannot build engines here: {reason}")
        if timing_cache is not None and self._ahead_of_time:
            raise BackendError(f"backend '{self.name}' times no kernels: leave out timing_cache")

    def _write(self, source: Path, file: Path) -> onnxfile.TwoOfFour:
        """Write the ONNX file that the engine is built from, and return what 2:4 weights it has."""
        model = onnxfile.load(source)
        onnxfile.fold_small(model)
        onnxfile.cast(model, self.options["dtype"])
        onnxfile.save(model, file)
        return onnxfile.two_of_four(model)

    def _engine(
        self,
        path: Path,
        order: Order,
        built: Built,
        weights: onnxfile.TwoOfFour,
        parity: float | None,
        onnx: Path,
    ) -> Engine:
        return Engine(
            path=path,
            library=self._module,
            version=str(library(self._module).__version__),
            compute_capability=built.compute_capability,
            dtype=self.options["dtype"],
            inputs=built.inputs,
            outputs=built.outputs,
            profiles=built.profiles,
            sparsity=engines.sparsity_in_log(built.log, order.sparse, len(weights.possible), len(weights.held)),
            layers=engines.layers_in_log(built.log) or self._inspected(built.data),
            sha256=engines.checksum(built.data),
            size=len(built.data),
            seconds=built.seconds,
            parity=parity,
            command=engines.command(
                self._tool,
                onnx,
                path,
                built.profiles,
                sparse=order.sparse,
                exact=order.exact,
                attention=built.attention,
                compute_capability=built.compute_capability if self._ahead_of_time else (),
                timing_cache=order.timing_cache,
            ),
        )

    def load(self, path: str | PathLike[str], threads: int = 1) -> EngineRunner:
        """Open an engine to run it here; it is called with its inputs in order, or by name.

        Raises BackendError where there is no GPU, a file is missing or altered, or the engine is for another library,
        version or GPU.
        """
        reason = self.available()
        if reason is not None:
            raise BackendError(f"backend '{self.name}' cannot be used here: {reason}")
        return self._runner(self.read(path), threads)

    def read(self, path: str | PathLike[str]) -> Engine:
        """Return what an engine file was built for, after a look at its checksum and at the library's version.

        Raises BackendError where a file is missing or altered, or the engine is for another library or version.
        """
        engine = engines.read(Path(path))
        version = str(library(self._module).__version__)
        if (engine.library, engine.version) != (self._module, version):
            raise BackendError(
                f"'{path}' was built by {engine.library} {engine.version}, and this is {self._module} {version}, which "
                "cannot run it. Build it again, or install that version"
            )
        return engine

    def _build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        dynamic: Dynamic,
        path: Path | None,
    ) -> EngineRunner:
        signature = forward_signature(module)
        args, kwargs = call_arguments(signature, bind_arguments(signature, args, kwargs))
        with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
            engine = self.compile_engine(
                module,
                args,
                kwargs,
                path=path or Path(folder) / "model.engine",
                compute_capability=".".join(map(str, torch.cuda.get_device_capability())),
                dynamic=dynamic,
            )
            runner = self._runner(engine, threads, signature, (args, kwargs))
        runner.path = path
        runner.parity = parity_at_sizes(
            self.name, module, runner, args, kwargs, dynamic, TOLERANCES[engine.dtype], other=_more_rows
        )
        return runner

    def _runner(
        self,
        engine: Engine,
        threads: int,
        signature: inspect.Signature | None = None,
        example: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {}),
    ) -> EngineRunner:
        said = messages(self._module)
        with said.recorded() as lines:
            runtime = library(self._module).Runtime(said.logger)
            opened = runtime.deserialize_cuda_engine(engine.path.read_bytes())
            if opened is None:
                raise BackendError(
                    f"'{engine.path}' cannot be loaded on {torch.cuda.get_device_name()}, whose compute capability is "
                    f"{'.'.join(map(str, torch.cuda.get_device_capability()))}; it was built for "
                    f"{', '.join(engine.compute_capability) or 'every one from 8.6 on'}. {self._module} says:\n  "
                    f"{errors(lines)}"
                )
        return EngineRunner(self.name, opened, engine, threads, signature, example, keep=runtime)

    def _parity(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], file: Path) -> float | None:
        """Compare the ONNX file with the module on the CPU, where onnxruntime has operators of this dtype."""
        private = inference_copy(module)
        signature = forward_signature(private)
        arguments = bind_arguments(signature, args, kwargs)
        settings = SessionSettings(threads=torch.get_num_threads(), silent=True)
        example = call_arguments(signature, arguments)
        try:
            outputs = OnnxRunner(session(file, settings), signature, *example, OnnxBuilt(settings, {})).run(
                *args, **kwargs
            )
        except BackendError:
            return None
        tolerance = TOLERANCES[self.options["dtype"]]
        return check_parity(f"{self.name} in {self.options['dtype']}", private, arguments, outputs, tolerance).max_rel

    def _inspected(self, data: Any) -> tuple[engines.Layer, ...]:
        """Return the layers that the engine inspector describes; it needs a GPU."""
        if not torch.cuda.is_available():
            return ()
        trt, said = library(self._module), messages(self._module)
        with said.recorded():
            runtime = trt.Runtime(said.logger)
            opened = runtime.deserialize_cuda_engine(bytes(data))
            if opened is None:
                return ()
            inspector = opened.create_engine_inspector()
            return engines.layers_in_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _more_rows(given: Mapping[str, int]) -> dict[str, int]:
    """Return sizes with one more row; of others the example's is the largest that an engine is built for."""
    return {name: size + 1 if name == BATCH else size for name, size in given.items()}


def _listed(wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return compute capabilities one by one.

    >>> _listed("8.6, 8.9"), _listed(["12.0"]), _listed(None)
    (('8.6', '8.9'), ('12.0',), ())
    """
    texts = [wanted] if isinstance(wanted, str) else list(wanted or ())
    return tuple(dict.fromkeys(part.strip() for text in texts for part in str(text).split(",") if part.strip()))


def _example_shapes(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: bool | Dynamic,
    batch: Batch | None,
    shapes: Mapping[str, Sequence[Shape]],
) -> tuple[Batch | None, dict[str, Sequence[Shape]]]:
    """The batch, and the shapes of inputs that are open in other dimensions, of the example where none are given."""
    signature = forward_signature(module)
    args, kwargs = call_arguments(signature, bind_arguments(signature, args, kwargs))
    free = places(signature, args, kwargs, dynamic)
    example = sizes(signature, args, kwargs, free)
    best = example.get(BATCH) if batch is None else batch
    found: dict[str, Sequence[Shape]] = dict(shapes)
    leaves = named_leaves(signature, args, kwargs)
    for name, dims in free.items():
        if name in found or set(dims) == {0}:
            continue
        rows = {i: size for i, label in dims.items() for size in [_batch(best) if label == BATCH else (1, 0, 0)]}
        shape = tuple(leaves[name].shape)
        found[name] = [
            tuple((rows[i][side] or n) if i in rows else n for i, n in enumerate(shape)) for side in range(3)
        ]
    return best, found


def _batch(given: Batch | None) -> tuple[int, int, int]:
    """Return smallest, best and largest batch.

    >>> _batch(None), _batch(64), _batch((1, 1, 4))
    ((1, 8, 32), (1, 64, 64), (1, 1, 4))
    """
    best = BEST_BATCH if given is None else given
    smallest, best, largest = (SMALLEST_BATCH, best, max(best, LARGEST_BATCH)) if isinstance(best, int) else best
    if not 1 <= smallest <= best <= largest:
        raise BackendError(f"batch is one size, or (smallest, best, largest) of 1 or more in order, not {given}")
    return smallest, best, largest


def _profile(name: str, given: Sequence[Shape]) -> Profile:
    """Return the three shapes of an input by name.

    >>> _profile("x", [(1, 3), (8, 3), (32, 3)])
    Profile(smallest=(1, 3), best=(8, 3), largest=(32, 3))
    """
    if len(given) != 3:
        raise BackendError(f"shapes of input '{name}' are three, (smallest, best, largest), not {len(given)}")
    smallest, best, largest = (tuple(shape) for shape in given)
    return Profile(smallest, best, largest)


for _backend in (
    TensorRTBackend("tensorrt", "tensorrt", "trtexec", ahead_of_time=False),
    TensorRTBackend("tensorrt-rtx", "tensorrt_rtx", "tensorrt_rtx", ahead_of_time=True),
):
    BACKENDS.add(_backend.name, _backend)
