"""Writing a pruned model for another runtime: what `Pruned.export` does, by the ending of the file's name."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.errors import BackendError
from fxprune.measure import batch_of
from fxprune.registry import nearest
from fxprune.report import EngineSummary

if TYPE_CHECKING:
    from fxprune.backends.tensorrt import TensorRTBackend
    from fxprune.pruned import Pruned

#: Builds engines where no other backend is named.
ENGINE_BACKEND = "tensorrt-rtx"


def export(pruned: Pruned, path: Path, options: Mapping[str, Any]) -> Path:
    """Write a pruned model; see `Pruned.export`."""
    from fxprune.backends import BACKENDS

    if path.suffix == ".onnx" and pruned.quantized is not None and not options:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pruned.quantized.of(pruned.graph_module()))
        return path
    if path.suffix == ".engine":
        _engine(pruned, path, dict(options))
        return path
    endings = {".onnx": "onnxruntime", ".pt2": "torch-aot"}
    if path.suffix not in endings:
        raise BackendError(f"'{path}' ends in '{path.suffix}'; known endings: {', '.join([*endings, '.engine'])}")
    name = endings[path.suffix]
    backend = BACKENDS[name].configured(**of_recipe(pruned, name) | dict(options))
    dynamic = pruned.plan.dynamic
    backend.build(pruned.graph_module(), pruned.args, pruned.kwargs, threads=1, dynamic=dynamic, path=path)
    return path


def of_recipe(pruned: Pruned, name: str) -> dict[str, Any]:
    """Return the options that the recipe gives a backend, so that what was measured is what is written."""
    setting = pruned.report.recipe.get("backend", name)
    given = {"name": setting} if isinstance(setting, str) else dict(setting)
    return given if given.pop("name", None) == name else {}


def engine_backend(name: str) -> TensorRTBackend:
    """Return the backend of a name, if it is one that builds engines.

    >>> engine_backend("torch")
    Traceback (most recent call last):
        ...
    fxprune.errors.BackendError: backend 'torch' builds no engines; tensorrt, tensorrt-rtx do
    """
    from fxprune.backends import BACKENDS
    from fxprune.backends.tensorrt import TensorRTBackend

    found = BACKENDS[name]
    if not isinstance(found, TensorRTBackend):
        builders = [n for n in BACKENDS if isinstance(BACKENDS[n], TensorRTBackend)]
        raise BackendError(f"backend '{name}' builds no engines; {', '.join(builders)} do")
    return found


def _engine(pruned: Pruned, path: Path, options: dict[str, Any]) -> None:
    backend = engine_backend(options.pop("backend", ENGINE_BACKEND))
    options = of_recipe(pruned, backend.name) | options
    parameters = inspect.signature(backend.compile_engine).parameters.values()
    mine = {"path", "dynamic"}  # given below
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in mine]
    _refuse_unknown(".engine", options, ["backend", *backend.OPTIONS, *own])
    configured = backend.configured(**{name: options.pop(name) for name in backend.OPTIONS if name in options})
    if pruned.quantized is not None and pruned.quantized.symmetric:
        options.setdefault("batch", batch_of(pruned.args, pruned.kwargs))
        with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
            file = Path(folder) / "int8.onnx"
            file.write_bytes(pruned.quantized.of(pruned.graph_module()))
            built = configured.compile_engine(file, path=path, **options)
    else:
        built = configured.compile_engine(
            pruned.graph_module(), pruned.args, pruned.kwargs, path=path, dynamic=pruned.plan.dynamic, **options
        )
    summary = EngineSummary(
        path=str(path),
        library=built.library,
        version=built.version,
        compute_capability=built.compute_capability,
        dtype=built.dtype,
        size=built.size,
        layers=len(built.layers),
        sparsity=built.sparsity.line(),
        parity=built.parity,
    )
    others = [engine for engine in pruned.report.engines if engine.path != summary.path]
    pruned.report.engines = [*others, summary]


def _refuse_unknown(ending: str, options: Mapping[str, Any], known: list[str]) -> None:
    for name in options:
        if name not in known:
            raise BackendError(
                f"'{ending}' has no option '{name}'{nearest(name, known) or '.'} Known: {', '.join(known) or 'none'}"
            )
