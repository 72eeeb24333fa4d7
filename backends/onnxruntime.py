"""The onnxruntime backend: run what `onnx_export` writes in the sessions that `onnx_session` opens.

`import onnxruntime` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.backends.base import (
    BACKENDS,
    TOLERANCE,
    Backend,
    Parity,
    Runner,
    bind_arguments,
    call_arguments,
    check_parity,
    forward_signature,
)
from fxprune.backends.building import into_file, parity_at_sizes
from fxprune.backends.by_name import ByName
from fxprune.backends.named_inputs import NamedInputs
from fxprune.backends.onnx_export import FileSettings, Written, export, export_parts
from fxprune.backends.onnx_profile import Profile, profile
from fxprune.backends.onnx_session import PROVIDERS, SessionSettings, denormals_as_zero, missing_provider, session
from fxprune.errors import BackendError
from fxprune.input_names import Dynamic

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
#: The largest relative difference from torch in float32, by the type that the file computes in. float16 keeps 11 bits
#: of a number and bfloat16 8, so that one rounding is 5e-4 and 4e-3; a deep model adds up some dozens.
TOLERANCES = {"float32": TOLERANCE, "float16": 0.02, "bfloat16": 0.1}
#: What the graph as onnxruntime really runs it ends in, where the option `keep_optimized` keeps it.
OPTIMIZED = ".optimized.onnx"


@dataclass(frozen=True, slots=True)
class OnnxBuilt:
    """What a runner says about itself beside its session: how the file was written and opened."""

    settings: SessionSettings
    options: Mapping[str, Any]
    written: Written | None = None


class OnnxRunner(Runner):
    """An open onnxruntime session; `run` takes tensors of the types that it was built with."""

    def __init__(
        self,
        opened: InferenceSession,
        signature: inspect.Signature | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        built: OnnxBuilt,
        names: Sequence[str] | None = None,
    ) -> None:
        """`signature` and arguments are those of the module, where there is one.

        `names` are those of the session's inputs, where they are not those of the arguments.
        """
        self.path = None
        self.parity: Parity | None = None
        self._session = opened
        self._built = built
        if signature is None:
            self._inputs: NamedInputs | ByName = ByName([i.name for i in opened.get_inputs()], "the file")
        else:
            self._inputs = NamedInputs(signature, args, kwargs)
        self._feeds = dict(zip(self._inputs.names, names or self._inputs.names, strict=True))

    @property
    def names(self) -> list[str]:
        """The names of the tensors that `run` takes, in order."""
        return list(self._inputs.names)

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the output tensors; raises BackendError where onnxruntime rejects the arguments."""
        feeds = self.feeds(*args, **kwargs)
        try:
            with denormals_as_zero():
                outputs = self._session.run(None, feeds)
        except Exception as error:  # onnxruntime has a dozen unrelated exception classes
            raise BackendError(f"onnxruntime cannot run the model on these arguments: {error}") from error
        return [torch.as_tensor(output) for output in outputs]

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a call that runs on these arguments, bound to inputs and outputs where the model runs, reused."""
        import onnxruntime as ort

        device = "cpu" if self._built.settings.provider == "cpu" else "cuda"
        binding = self._session.io_binding()
        try:
            arrays = {k: v.detach().cpu().contiguous().numpy() for k, v in self._inputs.of(args, kwargs).items()}
            held = {k: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for k, array in arrays.items()}
            for name, value in held.items():
                binding.bind_ortvalue_input(self._feeds[name], value)
            for output in self._session.get_outputs():
                binding.bind_output(output.name, device)
            self._session.run_with_iobinding(binding)
            for output, value in zip(self._session.get_outputs(), binding.get_outputs(), strict=True):
                if value.is_tensor():
                    binding.bind_ortvalue_output(output.name, value)
        except Exception as error:
            raise BackendError(f"onnxruntime cannot run the model on these arguments: {error}") from error

        def call(_held: object = (arrays, held)) -> None:  # these live as long as what is bound to them
            with denormals_as_zero():
                self._session.run_with_iobinding(binding)
            if device != "cpu":  # a device may still be at work when the call returns
                binding.synchronize_outputs()

        return call

    def feeds(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments as numpy arrays by the names of the file's inputs; raises BackendError as `run` does."""
        inputs = self._inputs.of(args, kwargs)
        return {self._feeds[name]: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}

    def profile(self, *args: Any, runs: int = 50, **kwargs: Any) -> Profile:
        """Return what each node of the optimised graph takes on these arguments, in a session of its own.

        Args:
            runs: how often the model is run, beside a few runs to warm up; times are medians over them.

        Raises:
            BackendError: onnxruntime rejects the arguments, `runs` is below 1, or the runner was built as a part.
        """
        feeds = self.feeds(*args, **kwargs)
        file = self._built.written.path if self._built.written is not None else self.path
        if file is None:
            raise BackendError("a runner that was built as one of several parts has no file to profile; build it alone")
        return profile(file, feeds, self._built.settings, runs)

    def describe(self) -> dict[str, Any]:
        """Return provider, threads, options, what is in the file, versions and the parity with torch."""
        import onnx
        import onnxruntime as ort

        written, options = self._built.written, self._built.options
        told = {
            "backend": BACKEND.name,
            "provider": self._session.get_providers()[0],
            "threads": self._built.settings.threads,
            "dtype": options.get("dtype"),  # that of a file made elsewhere is not known, nor what it should compute
            "tolerance": TOLERANCES.get(options.get("dtype", "")),
            "opset": written.opset if written else None,
            "graph_optimization": "all",
            "denormals": "zero",
            "versions": {"onnxruntime": ort.__version__, "onnx": onnx.__version__, "torch": torch.__version__},
            "parity": self.parity.to_json() if self.parity else None,
        }
        if written is not None and written.fused is not None:
            told["fused"] = dict(written.fused) or "nothing: the transformer optimizer knows no pattern in this graph"
        return told


class OnnxRuntimeBackend(Backend):
    """onnxruntime on the CPU, CUDA or TensorRT, through `torch.onnx.export`.

    `dtype` is what the file computes in; inputs and outputs keep their types. `provider` is where it runs. With
    `fusion="transformer"`, onnxruntime's transformer optimizer rewrites the file first, for models of which it knows
    the patterns; the number of heads is inferred for each layer. It recognises attention without a mask and with a
    fixed length, and is no faster there than `fusion="graph"`, whose files hold attention as one operator; with a mask
    attention stays in pieces,
    which is slower. `keep_optimized` writes the graph that onnxruntime really runs beside the file, for this machine
    alone.
    """

    name = "onnxruntime"
    OPTIONS = MappingProxyType(
        {
            "dtype": tuple(TOLERANCES),
            "provider": tuple(PROVIDERS),
            "fusion": ("graph", "transformer"),
            "keep_optimized": (False, True),
        }
    )

    @property
    def preferred_multiple(self) -> int:
        """Output channels in one block of its convolutions (NCHWc): 16 with AVX-512, else 8; 8 on a GPU.

        A convolution whose channels do not divide into blocks falls back to one that can be several times slower. Half
        precision matrix units of GPUs take multiples of 8.
        """
        wide = self.options["provider"] == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return 16 if wide else 8

    def available(self) -> str | None:
        """Return None where onnx, onnxscript, onnxruntime and the provider are installed, else which one is not."""
        missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
        if missing:
            return f"{', '.join(missing)} not installed; pip install 'fxprune[onnx]'"
        return missing_provider(self.options["provider"])

    def _build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        dynamic: Dynamic,
        path: Path | None,
    ) -> OnnxRunner:
        signature = forward_signature(module)
        args, kwargs = _canonical(signature, args, kwargs)
        provider = self.options["provider"]

        def make(file: Path) -> OnnxRunner:
            optimized = file.with_suffix(OPTIMIZED) if path is not None and self.options["keep_optimized"] else None
            how = FileSettings(self.options["dtype"], self.options["fusion"], provider)
            written = export(module, args, kwargs, file, dynamic, how)
            opened = self._open(file, SessionSettings(threads, provider, optimized))
            built = OnnxBuilt(SessionSettings(threads, provider), self.options, written)
            runner = OnnxRunner(opened, signature, args, kwargs, built)
            tolerance = TOLERANCES[self.options["dtype"]]
            runner.parity = parity_at_sizes(self.key, module, runner, args, kwargs, dynamic, tolerance)
            return runner

        return into_file(path, "model.onnx", make)

    def load(
        self,
        path: str | PathLike[str],
        threads: int = 1,
        like: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]] | None = None,
    ) -> OnnxRunner:
        """Open an ONNX file, also one of another tool; it is called with its inputs in order, or by name.

        Args:
            like: a module with its arguments, of which the file was made: it is called as the module is. What the file
                computes is not compared with it.

        Raises BackendError where onnxruntime or the provider is missing, or the file cannot be loaded.
        """
        if (reason := self.available()) is not None:
            raise BackendError(f"backend '{self.name}' cannot be used here: {reason}")
        settings = SessionSettings(threads, self.options["provider"])
        opened = self._open(Path(path), settings)
        signature = None if like is None else forward_signature(like[0])
        args, kwargs = ((), {}) if signature is None or like is None else _canonical(signature, *like[1:])
        runner = OnnxRunner(opened, signature, args, kwargs, OnnxBuilt(settings, {}))
        runner.path = Path(path)
        return runner

    def _open(self, file: Path, settings: SessionSettings) -> InferenceSession:
        try:
            return session(file, settings)
        except BackendError as error:
            if self.options["dtype"] == "float32":
                raise
            raise BackendError(
                f"{error}\nThe provider '{settings.provider}' may lack kernels in {self.options['dtype']}; take "
                f"another dtype ({', '.join(TOLERANCES)}) or provider ({', '.join(PROVIDERS)})"
            ) from error

    def build_parts(self, parts: Sequence[tuple[nn.Module, Sequence[Tensor]]], *, threads: int) -> list[Runner]:
        """Build several modules, each with its tensors, out of one export, most of whose time is overhead."""
        import onnx

        # What other options make of a file is made of each file by itself.
        if len(parts) < 2 or self.options["dtype"] != "float32" or self.options["fusion"] != "graph":
            return super().build_parts(parts, threads=threads)
        settings = SessionSettings(threads, self.options["provider"])
        with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
            file = Path(folder) / "parts.onnx"
            try:
                names = export_parts(parts, file)
                extractor = onnx.utils.Extractor(onnx.load(file))
            except Exception:  # which of them is at fault, and why, is found one by one
                return super().build_parts(parts, threads=threads)
        built: list[Runner] = []
        for (module, own), into, out in zip(parts, names.inputs, names.outputs, strict=True):
            with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
                file = Path(folder) / "part.onnx"
                onnx.save(extractor.extract_model(into, out), file)
                opened = session(file, settings)
            signature = forward_signature(module)
            runner = OnnxRunner(opened, signature, tuple(own), {}, OnnxBuilt(settings, self.options), into)
            check_parity(self.name, module, bind_arguments(signature, tuple(own), {}), runner.run(*own))
            built.append(runner)
        return built


def _canonical(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as they are however a caller writes them: by position where they can be."""
    return call_arguments(signature, bind_arguments(signature, args, kwargs))


BACKEND = OnnxRuntimeBackend()
BACKENDS.add(BACKEND.name, BACKEND)
