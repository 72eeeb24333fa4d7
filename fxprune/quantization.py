"""INT8 behind pruning: an ONNX file in 8 bits, compared with the one in float32 on data and on the clock."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.backends.base import Runner
from fxprune.errors import BackendError, RecipeError
from fxprune.recipe import Recipe
from fxprune.registry import nearest
from fxprune.report import Step
from fxprune.steps import Work, faster, judged

#: Backends that run such files; the second kind takes activations that are symmetric around zero.
_FILES, _ENGINES = ("onnxruntime",), ("tensorrt", "tensorrt-rtx")
_OPTIONS: dict[str, Any] = {
    "dtype": "int8",
    "ranges": "minmax",
    "operators": None,
    "per_channel": True,
    "symmetric": None,
    "samples": 128,
    "when": "faster",
    "max_drop": None,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The `quantization` of a recipe.

    Attributes:
        how: see `fxprune.backends.onnx_quantize.Int8`.
        samples: of the calibration data, that set the ranges of activations.
        when: "faster": only if the model is measured to be; "always".
        max_drop: the most that it may cost (of the metric, or of the outputs' variance), None for any.
    """

    how: Any
    samples: int
    when: str
    max_drop: float | None


@dataclass(frozen=True, slots=True)
class Quantized:
    """An ONNX file in 8 bits.

    Attributes:
        file: its bytes.
        symmetric: its activations are symmetric around zero, as TensorRT takes them.
        weights: `fingerprint` of the module that it was made of.
    """

    file: bytes
    symmetric: bool
    weights: str

    def fresh(self, module: nn.Module) -> bool:
        """Whether the module has the weights that the file was made of."""
        return fingerprint(module) == self.weights

    def of(self, module: nn.Module) -> bytes:
        """Return the file, if the module has the weights that it was made of.

        Raises:
            BackendError: the module was changed since, by training for example.
        """
        if not self.fresh(module):
            raise BackendError(
                "the weights have changed since the model was quantised: compile again with `quantization`, or export "
                'with dtype="float32" for a file of these weights that is not quantised'
            )
        return self.file


def fingerprint(module: nn.Module) -> str:
    """Return a checksum of all that a module computes with.

    >>> layer = nn.Linear(2, 2)
    >>> before = fingerprint(layer)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> fingerprint(layer) == before
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings(recipe: Recipe, data: bool) -> Settings | None:
    """Return what a recipe says about quantization, or None.

    Raises:
        RecipeError: it names what there is not, its backend has no such thing, or there are no calibration data.
    """
    if recipe.quantization is None:
        return None
    from fxprune.backends import chosen
    from fxprune.backends.onnx_quantize import RANGES, Int8

    asked = {"dtype": recipe.quantization} if isinstance(recipe.quantization, str) else dict(recipe.quantization)
    options = list(_OPTIONS)
    for option in asked:
        if option not in _OPTIONS:
            raise RecipeError(
                f"quantization has no option '{option}'{nearest(option, options) or '.'} Known: {', '.join(options)}"
            )
    given: dict[str, Any] = _OPTIONS | asked
    backend = chosen(recipe.backend)
    if backend.name not in (*_FILES, *_ENGINES):
        raise RecipeError(
            f"quantization makes ONNX files, which backend '{backend.name}' does not run; take one of "
            f"{', '.join((*_FILES, *_ENGINES))}"
        )
    if backend.options.get("dtype", "float32") != "float32":
        raise RecipeError("quantization starts from a file in float32: leave out the backend's dtype")
    for option, known in (("dtype", ("int8",)), ("ranges", tuple(RANGES)), ("when", ("faster", "always"))):
        if given[option] not in known:
            raise RecipeError(f"quantization: {option} is one of {', '.join(known)}, not {given[option]!r}")
    _numbers(given)
    if not data:
        raise RecipeError(
            "quantization takes calibration data, which set the ranges of activations: pass `calibration`"
        )
    symmetric = backend.name in _ENGINES if given["symmetric"] is None else bool(given["symmetric"])
    operators = None if given["operators"] is None else tuple(given["operators"])
    how = Int8(symmetric, given["ranges"], operators, bool(given["per_channel"]))
    return Settings(how, given["samples"], given["when"], given["max_drop"])


def _numbers(given: Mapping[str, Any]) -> None:
    limit, samples = given["max_drop"], given["samples"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0):
        raise RecipeError(f"quantization: max_drop is a number from 0 on, not {limit!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise RecipeError(f"quantization: samples is a number from 1 on, not {samples!r}")


def quantize(work: Work, wanted: Settings) -> tuple[Step, Quantized | None]:
    """Write the module as an ONNX file in 8 bits; return what that costs and gains, and the file if it is taken.

    Raises:
        BackendError: onnxruntime cannot quantise or run it.
        TargetError: it costs more than the recipe's `max_drop`.
    """
    from fxprune.backends import BACKENDS, chosen
    from fxprune.backends.onnx_quantize import quantize as write

    backend = chosen(work.recipe.backend)
    files: Any = backend if backend.name in _FILES else BACKENDS[_FILES[0]]
    threads = work.recipe.threads or torch.get_num_threads()
    name = "quantization int8" + (", symmetric" if wanted.how.symmetric else "")
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        dynamic = work.analysis.captured.dynamic
        plain = files.build(work.module, work.args, work.kwargs, threads=threads, dynamic=dynamic, path=source)
        write(source, target, _feeds(work, plain, wanted.samples), wanted.how)
        runner = files.load(target, threads, (work.module, work.args, work.kwargs))
        error = work.error(lambda inputs: runner.run(*_call(work, inputs)[0], **_call(work, inputs)[1]))
        errors = (work.own_error(), error)
        assert errors[0] is not None
        assert errors[1] is not None
        metric = None
        if work.metric is not None:
            metric = work.metric(work.module), work.metric(_OnRunner(runner, work))
        step = judged(Step(name, True, (errors[0], errors[1]), metric), wanted.max_drop)
        if backend.name in _ENGINES:
            step = faster(step, _not_here(backend.name)) if wanted.when == "faster" else step
        elif wanted.when == "faster":
            step = faster(step, lambda: _timed(work, plain, runner))
        if not step.taken:
            return step, None
        return step, Quantized(target.read_bytes(), wanted.how.symmetric, fingerprint(work.module))


def _call(work: Work, inputs: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The module's arguments from the captured graph's flat inputs."""
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(inputs, work.analysis.captured.in_spec)
    return found


def _feeds(work: Work, runner: Any, samples: int) -> Iterator[dict[str, Any]]:
    """Calibration batches as the file takes them."""
    from fxprune.passes.trial import some_samples

    seen = 0
    for batch in some_samples(work.analysis, work.data, samples).batches:
        if seen >= samples:
            return
        seen += batch.size
        args, kwargs = _call(work, batch.inputs)
        yield runner.feeds(*args, **kwargs)


def _timed(work: Work, plain: Runner, quantized: Runner) -> tuple[float, float, float]:
    """The speed-up of one over the other, and its 95 % interval."""
    from fxprune.backends.timing import compare

    calls = {n: r.bind(*work.args, **work.kwargs) for n, r in (("float", plain), ("int8", quantized))}
    ratio = compare(calls, reference="float", repeats=30).ratio("int8")
    return ratio.median, ratio.low, ratio.high


def _not_here(name: str) -> Any:
    def refuse() -> tuple[float, float, float]:
        raise BackendError(f"an engine of '{name}' is built from the file when it is exported")

    return refuse


class _OnRunner(nn.Module):
    """A built model that is called as the module is, for metrics."""

    def __init__(self, runner: Runner, work: Work) -> None:
        super().__init__()
        self._runner = runner
        with torch.no_grad():
            leaves, self._spec = pytree.tree_flatten(work.module(*work.args, **work.kwargs))
        self._leaves = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = iter(self._runner.run(*args, **kwargs))
        leaves = [next(tensors) if leaf is Tensor else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)
