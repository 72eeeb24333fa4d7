"""`fxprune export`: a saved model as an ONNX file, as an engine of TensorRT, or both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fxprune.backends import engines
from fxprune.backends.engines import Engine
from fxprune.backends.tensorrt import TensorRTBackend
from fxprune.cli.console import Answer, Progress, command, table
from fxprune.cli.options import Json
from fxprune.errors import InputError, SavedModelError
from fxprune.export import ENGINE_BACKEND, engine_backend
from fxprune.saved import load_pruned


@command
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="What `fxprune compile` saved.")],
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="FILE.onnx", help="Write ONNX; with --engine, the file that the engine is built from."),
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(metavar="FILE.engine", help="Build an engine, with FILE.engine.json about it.")
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="tensorrt-rtx builds without a GPU, tensorrt for the one at hand.")
    ] = ENGINE_BACKEND,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(metavar="X.Y", help="Of the GPUs that shall run the engine: 8.9. Repeat for several."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{', '.join(TensorRTBackend.OPTIONS['dtype'])}.")
    ] = None,
    sparse: Annotated[
        bool | None,
        typer.Option("--sparse/--no-sparse", help="Ask for 2:4 kernels; by default where weights have the pattern."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N", help="The best batch, or SMALLEST:BEST:LARGEST of those it takes.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Times of kernels, kept from build to build: tensorrt only.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
    as_json: Json = False,
) -> Answer:
    """Write a saved model as ONNX, or build an engine of it for TensorRT."""
    given = {
        "compute_capability": tuple(compute_capability or ()) or None,
        "dtype": dtype,
        "sparse": None if sparse is None else "on" if sparse else "off",
        "batch": _batch(batch) if batch else None,
        "timing_cache": timing_cache,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    _check(onnx, engine, options, overwrite)
    with Progress().running() as progress:
        progress("read the saved model")
        pruned = load_pruned(directory)
        if engine is None:
            assert onnx is not None
            progress("export to ONNX")
            pruned.export(onnx)
            return Answer({"files": {str(onnx): onnx.stat().st_size}}, [_wrote(onnx)])
        engine_backend(backend).configured(**{k: v for k, v in options.items() if k in TensorRTBackend.OPTIONS})
        progress(f"build an engine with {backend}")
        pruned.export(engine, backend=backend, **options, **({"onnx": onnx} if onnx else {}))
    built = engines.read(engine)
    files = [engine, engines.sidecar(engine), *([onnx] if onnx else [])]
    data = {"files": {str(f): f.stat().st_size for f in files}, "engine": built.to_json()}
    show: list[RenderableType] = [_about(built), *map(_wrote, files), f"the same elsewhere: {built.command}"]
    if onnx is None:
        show.append("note: that command reads an ONNX file of the engine's types, which --onnx writes")
    return Answer(json.loads(json.dumps(data)), show)


def _check(onnx: Path | None, engine: Path | None, options: dict[str, Any], overwrite: bool) -> None:
    """Refuse at once what would otherwise fail after the model is read."""
    if onnx is None and engine is None:
        raise InputError("there is nothing to write: pass --onnx FILE.onnx, --engine FILE.engine, or both")
    if engine is None and options:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise InputError(f"{flags} are about an engine: pass --engine FILE.engine, too")
    for flag, file, ending in (("--onnx", onnx, ".onnx"), ("--engine", engine, ".engine")):
        if file is not None and file.suffix != ending:
            raise InputError(f"{flag} {file}: the name must end in {ending}")
        if file is not None and file.exists() and not overwrite:
            raise SavedModelError(f"'{file}' exists; pass --overwrite, or choose another name")


def _batch(text: str) -> int | tuple[int, int, int]:
    """Read `--batch`.

    >>> _batch("8"), _batch("1:8:32")
    (8, (1, 8, 32))
    """
    parts = text.split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) not in (1, 3):
        raise InputError(f"--batch {text}: write a number, 8, or SMALLEST:BEST:LARGEST, 1:8:32")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1], numbers[2])


def _wrote(file: Path) -> str:
    return f"wrote  {file} ({decimal(file.stat().st_size)})"


def _about(engine: Engine) -> Table:
    """What an engine was built for and what it holds."""
    rows = table("engine", str(engine.path))
    parity = "not measured" if engine.parity is None else f"{engine.parity:.1e} relative, on the CPU"
    for name, text in (
        ("library", f"{engine.library} {engine.version}"),
        ("compute capability", ", ".join(engine.compute_capability) or "8.6 and later"),
        ("computes in", engine.dtype),
        ("size", decimal(engine.size)),
        ("layers", f"{len(engine.layers):,}"),
        ("2:4 sparsity", engine.sparsity.line()),
        *((f"input {p.name}", f"{_shapes(engine, p.name) or p.shape} {p.dtype}") for p in engine.inputs),
        *((f"output {p.name}", f"{p.shape} {p.dtype}") for p in engine.outputs),
        ("difference from torch", parity),
        ("built in", f"{engine.seconds:.1f} s"),
    ):
        rows.add_row(name, Text(text))
    return rows


def _shapes(engine: Engine, name: str) -> str:
    profile = engine.profiles.get(name)
    return f"{profile.smallest} to {profile.largest}, best {profile.best}" if profile else ""
