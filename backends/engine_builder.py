"""From an ONNX file to the bytes of an engine, by `tensorrt` or `tensorrt_rtx`, whose interfaces are the same."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxprune.backends import engines
from fxprune.backends.engines import OPEN, Port, Profile
from fxprune.errors import BackendError

#: Lines of TensorRT's own that an error repeats.
_SAID = 6


@dataclass(frozen=True, slots=True)
class Line:
    """One message of TensorRT's: "VERBOSE", "INFO", "WARNING", "ERROR" or "INTERNAL_ERROR", and the text."""

    severity: str
    text: str


class Messages:
    """TensorRT's messages. A process has one logger for each library, so that what is built is built one at a time."""

    def __init__(self, library: Any) -> None:
        self._lines: list[Line] = []
        self._lock = threading.Lock()
        lines = self._lines

        class Logger(library.ILogger):  # type: ignore[misc]  # the library is known at run time alone
            def __init__(self) -> None:
                library.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                lines.append(Line(severity.name, text))

        self.logger = Logger()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Line]]:
        """Yield the list that fills with the messages of what is done meanwhile; nothing is printed."""
        with self._lock:
            self._lines.clear()
            yield self._lines


@functools.cache
def messages(module: str) -> Messages:
    """Return the messages of a library.

    Raises BackendError where it cannot be imported.
    """
    return Messages(library(module))


def library(module: str) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises BackendError where that fails, as where the bindings are there and the libraries behind them are not.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(f"{module} cannot be imported: {error}. Install it again, with its libraries") from error


def errors(lines: Sequence[Line]) -> str:
    """Return what TensorRT said of a failure: its last errors."""
    said = [line.text for line in lines if line.severity in ("ERROR", "INTERNAL_ERROR")]
    return "\n  ".join(dict.fromkeys(said[-_SAID:])) or "it gave no reason"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be built.

    Attributes:
        file: the ONNX file, in the types that the engine computes in.
        wanted: compute capabilities, none for the library's default.
        batch: smallest, best, largest, for inputs with no other open dimension.
        shapes: of inputs with others.
        sparse: look for sparse kernels.
        exact: multiply float32 as it is, not rounded to the 10-bit mantissas of TF32.
    """

    file: Path
    wanted: tuple[str, ...]
    batch: tuple[int, int, int]
    shapes: Mapping[str, Profile]
    sparse: bool
    exact: bool
    timing_cache: Path | None


@dataclass(frozen=True, slots=True)
class Built:
    """What came of it; `attention`: the file has Attention operators, `log`: all that TensorRT said."""

    data: memoryview
    seconds: float
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    profiles: Mapping[str, Profile]
    compute_capability: tuple[str, ...]
    attention: bool
    log: tuple[str, ...]


def build(module: str, order: Order, ahead_of_time: bool) -> Built:
    """Build what is ordered with a library.

    Raises BackendError, with TensorRT's own words, where it does not take the file, the GPU or the shapes.
    """
    trt, said = library(module), messages(module)
    with said.recorded() as lines:
        start = time.perf_counter()
        builder = trt.Builder(said.logger)
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, said.logger)
        if not parser.parse_from_file(str(order.file)):
            raise BackendError(f"{module} cannot read the ONNX file:\n  {_parser_errors(parser, lines)}")
        attention = _allow_decomposition(trt, network)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if order.sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        capability = _set_capability(trt, config, order.wanted, lines, ahead_of_time)
        inputs = _ports(network.num_inputs, network.get_input)
        profiles = _profiles(inputs, order.batch, order.shapes)
        _set_profiles(builder, config, profiles, lines)
        cache = _load_cache(config, order.timing_cache)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise BackendError(f"{module} cannot build the engine:\n  {errors(lines)}")
        if cache is not None:
            assert order.timing_cache is not None
            order.timing_cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
        return Built(
            data=memoryview(data),
            seconds=time.perf_counter() - start,
            inputs=inputs,
            outputs=_ports(network.num_outputs, network.get_output),
            profiles=profiles,
            compute_capability=capability,
            attention=attention,
            log=tuple(line.text for line in lines),
        )


def _set_capability(
    trt: Any, config: Any, wanted: tuple[str, ...], lines: Sequence[Line], ahead_of_time: bool
) -> tuple[str, ...]:
    """Set the GPUs to build for; returns their compute capabilities, none for the library's default."""
    if not ahead_of_time:
        here = ".".join(map(str, torch.cuda.get_device_capability()))
        if wanted not in ((), (here,)):
            raise BackendError(
                f"{trt.__name__} builds for the GPU at hand, of compute capability {here}, not for "
                f"{', '.join(wanted)}. Build on such a GPU, or with backend tensorrt-rtx"
            )
        return (here,)
    known = capabilities(trt)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} does not build for compute capability {', '.join(unknown)}; it does "
            f"for {', '.join(known)}"
        )
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        if not config.set_compute_capability(known[name], index):
            raise BackendError(f"{trt.__name__} refuses compute capability {name}:\n  {errors(lines)}")
    return wanted


def capabilities(trt: Any) -> dict[str, Any]:
    """Return the compute capabilities that a library can name: "8.9" -> SM89."""
    found = {}
    for name, member in trt.ComputeCapability.__members__.items():
        if match := re.fullmatch(r"SM(\d+)(\d)", name):
            found[f"{match[1]}.{match[2]}"] = member
    return found


def _strongly_typed(trt: Any) -> int:
    """Types as the ONNX file has them: what is not the default everywhere is a flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_errors(parser: Any, lines: Sequence[Line]) -> str:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f" (node {error.node_name()}, operator {error.node_operator()})" if error.node_operator() else ""
        found.append(f"{error.desc()}{node}")
    return "\n  ".join(found) or errors(lines)


def _allow_decomposition(trt: Any, network: Any) -> bool:
    """Let attention fall apart where no kernel fits its type or its sizes; says whether there is any.

    Without this a build fails on float32, and on head sizes that pruning made.
    """
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)
    found = False
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionOutputLayer  # layers come as their base class
            layer.attention.decomposable = True
            found = True
    return found


def _ports(count: int, get: Any) -> tuple[Port, ...]:
    tensors = [get(index) for index in range(count)]
    return tuple(Port(t.name, tuple(t.shape), engines.dtype_name(t.dtype.name)) for t in tensors)


def _profiles(inputs: Sequence[Port], batch: tuple[int, int, int], shapes: Mapping[str, Profile]) -> dict[str, Profile]:
    """Return the shapes of each input with an open dimension.

    >>> _profiles([Port("x", (-1, 3), "float32"), Port("y", (3,), "float32")], (1, 8, 32), {})
    {'x': Profile(smallest=(1, 3), best=(8, 3), largest=(32, 3))}
    """
    names = [port.name for port in inputs]
    for name in shapes:
        if name not in names:
            raise BackendError(f"shapes are given for '{name}', but the inputs are {', '.join(names)}")
    found = {}
    for port in inputs:
        open_dims = [dim for dim, size in enumerate(port.shape) if size == OPEN]
        if port.name in shapes:
            found[port.name] = _fitting(port, shapes[port.name])
        elif open_dims == [0]:
            found[port.name] = Profile(*((size, *port.shape[1:]) for size in batch))
        elif open_dims:
            example = tuple(8 if size == OPEN else size for size in port.shape)
            raise BackendError(
                f"dimensions {', '.join(map(str, open_dims))} of input '{port.name}' are open: pass "
                f"shapes={{'{port.name}': (smallest, best, largest)}}, each like {example}"
            )
    return found


def _fitting(port: Port, profile: Profile) -> Profile:
    """The profile, if it fits the input."""
    sides = (profile.smallest, profile.best, profile.largest)
    fits = all(
        len(shape) == len(port.shape) and all(p in (OPEN, s) for p, s in zip(port.shape, shape, strict=True))
        for shape in sides
    )
    if not fits or not all(1 <= a <= b <= c for a, b, c in zip(*sides, strict=True)):
        raise BackendError(
            f"input '{port.name}' has the shape {port.shape}, where -1 is open: smallest, best and largest must be of "
            f"that form and in order, not {', '.join(map(str, sides))}"
        )
    return profile


def _set_profiles(builder: Any, config: Any, profiles: Mapping[str, Profile], lines: Sequence[Line]) -> None:
    if not profiles:
        return
    profile = builder.create_optimization_profile()
    for name, shapes in profiles.items():
        profile.set_shape(name, shapes.smallest, shapes.best, shapes.largest)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(f"TensorRT refuses the shapes {dict(profiles)}:\n  {errors(lines)}")


def _load_cache(config: Any, path: Path | None) -> Any:
    """Set the timing cache that a file holds, an empty one where there is no file yet; None where none is wanted.

    Raises BackendError where the file is of another GPU or version.
    """
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BackendError(f"the timing cache '{path}' is of another GPU or version; delete it, or name another file")
    return cache
