"""The onnxruntime backend: export to ONNX, run on the CPU.

`import onnxruntime` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import re
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.backends.base import (
    BACKENDS,
    Backend,
    Parity,
    Runner,
    batch_size,
    bind_arguments,
    call_arguments,
    check_parity,
    forward_signature,
    inference_copy,
    is_batched,
    tensors_of,
    with_batch,
)
from fxprune.errors import BackendError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDER = "CPUExecutionProvider"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
#: The name of the dynamic dimension in the ONNX file.
BATCH = "batch"
#: The ONNX operator set of a file, and that of one with attention: from 23 on that is one operator, which onnxruntime
#: runs in about half the time of its pieces, with zeros where a row is wholly masked, as torch has it.
OPSET, ATTENTION_OPSET = 20, 23
#: Lines of what the exporter printed and warned about that a failure repeats.
NOISE_LINES = 12


def session(path: Path, *, threads: int, optimized: Path | None = None) -> InferenceSession:
    """Open an ONNX file on the CPU with every option that changes its speed set explicitly.

    `optimized` is where onnxruntime writes the graph that it really runs, after its fusions, for this machine alone.
    Raises BackendError where the file cannot be loaded or another provider was put in place.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only: a warning that a saved optimized graph is not portable is no news
    # Its threads otherwise go on spinning after a call, and slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Numbers below 1e-38, such as attention leaves at padding, take a processor many times longer than others.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        with _denormals_as_zero():
            opened = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime has a dozen unrelated exception classes
        raise BackendError(f"onnxruntime cannot load {path.name}: {error}") from error
    # It falls back to another provider without a word.
    if opened.get_providers() != [PROVIDER]:
        raise BackendError(f"onnxruntime runs {path.name} on {opened.get_providers()} instead of [{PROVIDER!r}]")
    return opened


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    path: Path,
    batch_dynamic: bool = True,
) -> None:
    """Write `module`, in inference mode, to `path` as an ONNX file.

    Tensors among the arguments become inputs, named after the parameters of `forward` that take them; everything else
    is baked in. Outputs are the module's output tensors in the order in which they occur. With `batch_dynamic`,
    dimension 0 of every tensor that has the first tensor's size there is called "batch" and left open. Weights above
    onnx's limit of 2 GB go into a second file, `path` with ".data" appended.

    Raises BackendError where the export fails, with what the exporter said.
    """
    signature = forward_signature(module)
    arguments = bind_arguments(signature, args, kwargs or {})
    # A batch of one can be taken for a dimension to broadcast, and be specialised to one.
    if batch_dynamic and batch_size(arguments) == 1:
        arguments = with_batch(arguments, 2)
    flat = _FlatModule(inference_copy(module), signature, arguments).eval()
    tensors = tensors_of(arguments)
    shapes = None
    if batch_dynamic:
        batch = batch_size(arguments)
        shapes = {"tensors": tuple({0: BATCH} if is_batched(tensor, batch) else None for tensor in tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(_named_leaves(arguments)[0])
    with _quiet() as noise, _without_attention_fastpath(), torch.no_grad():
        try:
            _write(flat, tensors, path, dynamic_shapes=shapes, input_names=names)
        except Exception as error:  # whatever a model's own code raises arrives here
            raise BackendError(_failure(module, error, noise())) from error


def _write(flat: nn.Module, tensors: Sequence[Tensor], path: Path, **options: Any) -> None:
    """Write a module of tensors to a file, attention as one operator where onnxruntime then loads it."""
    if _shows_attention(flat) and _write_fused(flat, path, args=tuple(tensors), **options):
        return
    program = _export(flat, tuple(tensors), opset_version=OPSET, **options)
    _save(program, path)
    captured = program.exported_program
    if captured is None or not any("scaled_dot_product_attention" in str(n.target) for n in captured.graph.nodes):
        return
    if not _shows_attention(flat):  # else that has failed already
        _write_fused(captured, path, **options)


def _shows_attention(module: nn.Module) -> bool:
    """Whether a graph module is in there that has attention, so that one export will do."""
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    return any("scaled_dot_product_attention" in str(node.target) for graph in graphs for node in graph.nodes)


def _write_fused(model: nn.Module | torch.export.ExportedProgram, path: Path, **options: Any) -> bool:
    """Write a file with attention as one operator; returns whether onnxruntime loads it, else nothing is written."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fused = Path(folder) / path.name
        try:
            _save(_export(model, opset_version=ATTENTION_OPSET, **options), fused)
            session(fused, threads=1)
        except Exception:
            # It stays in pieces: keys that broadcast over heads, operators that onnxruntime lacks in the later set.
            return False
        for file in fused.parent.iterdir():
            file.replace(path.parent / file.name)
    return True


def _export(*args: Any, **options: Any) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(*args, dynamo=True, verbose=False, **options)
    assert program is not None  # only the exporter that dynamo=True replaces returns None
    return program


def _save(program: torch.onnx.ONNXProgram, path: Path) -> None:
    """Write a file in which the weights keep the names that they have in the module."""
    for value in list(program.model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("module.")
    program.save(path)


@contextlib.contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """This thread computes as onnxruntime's own threads are told to, and afterwards as before."""
    before = float(torch.tensor(1e-40) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class NamedInputs:
    """The tensors among the arguments of a module's `forward`, by the names that `export` gives them."""

    def __init__(self, signature: inspect.Signature, arguments: Mapping[str, Any]) -> None:
        """Take the arguments that the model is built for, as `bind_arguments` returns them."""
        self._signature = signature
        tensors, self._constants = _named_leaves(arguments)
        self.names = list(tensors)
        self._plain = all(isinstance(value, Tensor) for value in arguments.values())

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a call.

        Raises BackendError where they are others than those that the model was built for, or a constant is another.
        """
        # The usual call, nothing but tensors in order, must cost nothing beside the model that is being timed.
        if self._plain and not kwargs and len(args) == len(self.names) and all(isinstance(arg, Tensor) for arg in args):
            return dict(zip(self.names, args, strict=True))
        tensors, constants = _named_leaves(bind_arguments(self._signature, args, kwargs))
        if tensors.keys() != set(self.names) or constants != self._constants:
            raise BackendError(
                f"the model was built for tensors {sorted(self.names)} and constants {self._constants}, but is run "
                f"with tensors {sorted(tensors)} and constants {constants}; build it again with these arguments"
            )
        return tensors


class OnnxRunner(Runner):
    """An open onnxruntime session; `run` takes CPU tensors of the types that it was built with."""

    def __init__(
        self,
        opened: InferenceSession,
        signature: inspect.Signature,
        arguments: Mapping[str, Any],
        threads: int,
        names: Sequence[str] | None = None,
    ) -> None:
        """`names` are those of the session's inputs, where they are not those of the arguments."""
        self.path = None
        self.parity: Parity | None = None
        self._session = opened
        self._threads = threads
        self._inputs = NamedInputs(signature, arguments)
        self._feeds = dict(zip(self._inputs.names, names or self._inputs.names, strict=True))

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the output tensors; raises BackendError where onnxruntime rejects the arguments."""
        inputs = self._inputs.of(args, kwargs)
        try:
            feeds = {self._feeds[name]: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
            with _denormals_as_zero():
                outputs = self._session.run(None, feeds)
        except Exception as error:  # onnxruntime has a dozen unrelated exception classes
            raise BackendError(f"onnxruntime cannot run the model on these arguments: {error}") from error
        return [torch.as_tensor(output) for output in outputs]

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a call that runs on these arguments, bound to contiguous inputs and to outputs that are reused."""
        binding = self._session.io_binding()
        try:
            held = {k: v.detach().cpu().contiguous().numpy() for k, v in self._inputs.of(args, kwargs).items()}
            for name, array in held.items():
                binding.bind_cpu_input(self._feeds[name], array)
            for output in self._session.get_outputs():
                binding.bind_output(output.name)
            self._session.run_with_iobinding(binding)
            for output, value in zip(self._session.get_outputs(), binding.get_outputs(), strict=True):
                if value.is_tensor():
                    binding.bind_ortvalue_output(output.name, value)
        except Exception as error:
            raise BackendError(f"onnxruntime cannot run the model on these arguments: {error}") from error

        def call(_held: object = held) -> None:  # the arrays live as long as what is bound to them
            with _denormals_as_zero():
                self._session.run_with_iobinding(binding)

        return call

    def describe(self) -> dict[str, Any]:
        """Return provider, threads, options, versions and the parity with torch."""
        import onnx
        import onnxruntime as ort

        return {
            "backend": BACKEND.name,
            "provider": self._session.get_providers()[0],
            "threads": self._threads,
            "graph_optimization": "all",
            "denormals": "zero",
            "versions": {"onnxruntime": ort.__version__, "onnx": onnx.__version__, "torch": torch.__version__},
            "parity": self.parity.to_json() if self.parity else None,
        }


class OnnxRuntimeBackend(Backend):
    """onnxruntime on the CPU, through `torch.onnx.export`."""

    name = "onnxruntime"

    @property
    def preferred_multiple(self) -> int:
        """Output channels in one block of its convolutions (NCHWc): 16 with AVX-512, else 8.

        A convolution whose channels do not divide into blocks falls back to one that can be several times slower.
        """
        return 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8

    def available(self) -> str | None:
        """Return None where onnx, onnxscript and onnxruntime are installed, else which one is not."""
        missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
        return f"{', '.join(missing)} not installed; pip install 'fxprune[onnx]'" if missing else None

    def _build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        batch_dynamic: bool,
        path: Path | None,
    ) -> OnnxRunner:
        file = path or Path(tempfile.mkdtemp(prefix="fxprune-")) / "model.onnx"
        try:
            export(module, args, kwargs, file, batch_dynamic)
            signature = forward_signature(module)
            arguments = bind_arguments(signature, args, kwargs)
            runner = OnnxRunner(session(file, threads=threads), signature, arguments, threads)
            runner.parity = self._check(runner, module, arguments, batch_dynamic)
        except BaseException:
            if path is None:
                shutil.rmtree(file.parent, ignore_errors=True)
            raise
        if path is None:
            # Weights kept beside the model stay mapped from the file for as long as the session lives.
            weakref.finalize(runner, shutil.rmtree, file.parent, ignore_errors=True)
        runner.path = path
        return runner

    def build_parts(self, parts: Sequence[tuple[nn.Module, Sequence[Tensor]]], *, threads: int) -> list[Runner]:
        """Build several modules, each with its tensors, out of one export, most of whose time is overhead."""
        import onnx

        if len(parts) < 2:
            return super().build_parts(parts, threads=threads)
        together = _Together([inference_copy(module) for module, _ in parts], [len(tensors) for _, tensors in parts])
        # Copies: one tensor that is given to two parts would be one input of both.
        tensors = [tensor.detach().clone() for _, some in parts for tensor in some]
        with torch.no_grad():
            counts = [len(outputs) for outputs in together.each(*tensors)]
        inputs, outputs = (
            [[f"{kind}{i}_{j}" for j in range(n)] for i, n in enumerate(counted)]
            for kind, counted in (("input", together.counts), ("output", counts))
        )
        names = {k: list(chain.from_iterable(v)) for k, v in (("input_names", inputs), ("output_names", outputs))}
        with tempfile.TemporaryDirectory(prefix="fxprune-") as folder, _quiet(), _without_attention_fastpath():
            file = Path(folder) / "parts.onnx"
            try:
                with torch.no_grad():
                    _write(together, tensors, file, **names)
                extractor = onnx.utils.Extractor(onnx.load(file))
            except Exception:  # which of them is at fault, and why, is found one by one
                return super().build_parts(parts, threads=threads)
        built: list[Runner] = []
        for (module, own), into, out in zip(parts, inputs, outputs, strict=True):
            with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
                file = Path(folder) / "part.onnx"
                onnx.save(extractor.extract_model(into, out), file)
                opened = session(file, threads=threads)
            signature = forward_signature(module)
            arguments = bind_arguments(signature, tuple(own), {})
            runner = OnnxRunner(opened, signature, arguments, threads, into)
            check_parity(self.name, module, arguments, runner.run(*own))
            built.append(runner)
        return built

    def _check(self, runner: OnnxRunner, module: nn.Module, arguments: dict[str, Any], batch_dynamic: bool) -> Parity:
        """Compare with torch on the example, and on another batch size too where any is allowed."""
        trials = [arguments]
        if batch_dynamic:
            trials.append(with_batch(arguments, batch_size(arguments) + 1))
        found = []
        for trial in trials:
            args, kwargs = call_arguments(forward_signature(module), trial)
            found.append(check_parity(self.name, module, trial, runner.run(*args, **kwargs)))
        return Parity(max(parity.max_abs for parity in found), max(parity.max_rel for parity in found))


class _FlatModule(nn.Module):
    """Tensors in, list of tensors out: what the exporter handles without special cases for nesting and constants."""

    def __init__(self, module: nn.Module, signature: inspect.Signature, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self._signature = signature
        leaves, self._structure = pytree.tree_flatten(dict(arguments))
        # The class stands where a tensor goes.
        self._leaves = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        leaves = [next(given) if leaf is Tensor else leaf for leaf in self._leaves]
        args, kwargs = call_arguments(self._signature, pytree.tree_unflatten(leaves, self._structure))
        return tensors_of(self.module(*args, **kwargs))


class _Together(nn.Module):
    """Modules side by side, each with its own tensors."""

    def __init__(self, modules: Sequence[nn.Module], counts: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.counts = list(counts)

    def each(self, *tensors: Tensor) -> list[list[Tensor]]:
        """Return the output tensors of each module."""
        given = iter(tensors)
        return [
            tensors_of(module(*(next(given) for _ in range(count))))
            for module, count in zip(self.parts, self.counts, strict=True)
        ]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(chain.from_iterable(self.each(*tensors)))


def _named_leaves(arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and everything else in nested arguments, each by a name made of the keys that lead to it.

    >>> tensors, constants = _named_leaves({"x": torch.zeros(1), "more": {"masks": [torch.zeros(1)], "causal": True}})
    >>> list(tensors), constants
    (['x', 'more_masks_0'], {'more_causal': True})
    """
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for keys, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        name = "_".join(re.findall(r"\w+", pytree.keystr(keys)))
        if isinstance(leaf, Tensor):
            tensors[name] = leaf
        else:
            constants[name] = leaf
    return tensors, constants


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Keep prints, warnings and log lines off the screen; yields a function that returns them as one text."""
    text = io.StringIO()
    loggers = [logging.getLogger(name) for name in [None, *logging.root.manager.loggerDict]]
    streams = (sys.stdout, sys.stderr)
    # Log handlers hold on to the stream that they were made with, so that redirecting alone does not reach them.
    moved = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams
    ]
    with (
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for handler, _ in moved:
            handler.setStream(text)
        try:
            yield lambda: text.getvalue() + "".join(f"{entry.category.__name__}: {entry.message}\n" for entry in caught)
        finally:
            for handler, stream in moved:
                handler.setStream(stream)


@contextlib.contextmanager
def _without_attention_fastpath() -> Iterator[None]:
    """Make `nn.MultiheadAttention` and the layers around it run as ordinary operators instead of one opaque one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _failure(module: nn.Module, error: Exception, noise: str) -> str:
    """Say what failed and why, without the exporter's advice and colours, then what it printed before."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    reason = "\n".join(line for line in str(causes[-1]).splitlines() if line.strip())
    lines = [line for line in noise.splitlines() if line.strip()][-NOISE_LINES:]
    said = "\nThe exporter said:\n  " + "\n  ".join(lines) if lines else ""
    return (
        f"torch.onnx.export failed for {type(module).__name__}: {type(causes[-1]).__name__}: {reason}\n"
        f"If the batch size is what it stumbles over, build with batch_dynamic=False.{said}"
    )


BACKEND = OnnxRuntimeBackend()
BACKENDS.add(BACKEND.name, BACKEND)
