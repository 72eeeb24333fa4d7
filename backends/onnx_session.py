"""Open ONNX files in onnxruntime, with every option that changes their speed set explicitly.

`import onnxruntime` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxprune.backends import onnxfile
from fxprune.errors import BackendError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

#: Value of the option `provider` -> the execution providers that a session is given, the first of which has to run.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
#: Weights larger than this, in bytes, stay out of an optimised file whose model keeps its own beside it.
EXTERNAL_WEIGHT = 1024


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a file is opened.

    Attributes:
        threads: CPU threads that compute one operator.
        provider: a key of PROVIDERS.
        optimized: where onnxruntime writes the graph that it really runs, after its fusions, for this machine alone.
        profile: the beginning of the path of the profile that `end_profiling` writes; None for no profile.
        silent: whether errors, too, are kept off the screen, because failing is one way to answer a question.
    """

    threads: int = 1
    provider: str = "cpu"
    optimized: Path | None = None
    profile: Path | None = None
    silent: bool = False


def missing_provider(provider: str) -> str | None:
    """Return None where onnxruntime has a provider, else why not and what mends it.

    >>> missing_provider("cpu")
    """
    if provider == "cpu":  # every build has it; onnxruntime need not be imported to know
        return None
    import onnxruntime as ort

    wanted, known = PROVIDERS[provider][0], ort.get_available_providers()
    if wanted in known:
        return None
    return (
        f"this onnxruntime has no {wanted} (it has {', '.join(known)}); in place of onnxruntime install "
        "onnxruntime-gpu, and the CUDA libraries that its release notes name"
    )


def session(path: Path, settings: SessionSettings) -> InferenceSession:
    """Open an ONNX file.

    Raises BackendError where the file cannot be loaded or another provider was put in place.
    """
    import onnxruntime as ort

    providers = list(PROVIDERS[settings.provider])
    try:
        with denormals_as_zero():
            opened = ort.InferenceSession(str(path), _options(path, settings), providers=providers)
    except Exception as error:  # onnxruntime has a dozen unrelated exception classes
        raise BackendError(f"onnxruntime cannot load {path.name}: {error}") from error
    # It falls back to another provider without a word.
    if opened.get_providers()[:1] != providers[:1]:
        raise BackendError(
            f"onnxruntime runs {path.name} on {opened.get_providers()} instead of {providers}: it could not start "
            f"{providers[0]}; check its libraries and the device"
        )
    return opened


def _options(path: Path, settings: SessionSettings) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Errors at most: a warning that a saved optimized graph is not portable is no news.
    options.log_severity_level = 4 if settings.silent else 3
    # Its threads otherwise go on spinning after a call, and slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Numbers below 1e-38, such as attention leaves at padding, take a processor many times longer than others.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if settings.optimized is not None:
        options.optimized_model_filepath = str(settings.optimized)
        if onnxfile.beside(path).exists():  # they would not fit into one file
            prefix = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{prefix}_file_name", f"{settings.optimized.name}.data")
            options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(EXTERNAL_WEIGHT))
    if settings.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile)
    return options


@contextlib.contextmanager
def denormals_as_zero() -> Iterator[None]:
    """This thread computes as onnxruntime's own threads are told to, and afterwards as before."""
    before = float(torch.tensor(1e-40) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
