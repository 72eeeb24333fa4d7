"""`python -m bench.memory [MODEL ...]`: peak memory of pruning, sizes of files, and peak memory of running them.

Three things for each model, pruned to half of its multiply-accumulates by magnitude:

- what is resident at the peak of pruning beyond what was before, with fxprune and with Torch-Pruning
- the bytes of the weights (safetensors) and of the ONNX file, dense and pruned
- what is resident at the peak of opening that file in onnxruntime and running it, beyond what was before

Each number is taken in a fresh process of its own, several times; the median counts. The JSON file is written after
each model; `--resume` goes on from it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from bench import compile_time, document, machine, resident
from bench.models import MODELS
from fxprune.backends import BACKENDS
from fxprune.backends.onnxruntime import OnnxRuntimeBackend

NAMES = ("resnet50", "vit_base_patch16_224", "mobilenetv3_small_050", "minilm")
SHARE = 0.5
VARIANTS = ("dense", "pruned")
#: Calls of the model in onnxruntime, whose memory grows until it has settled.
CALLS = 5
RESULTS = Path(__file__).parent / "results"
#: Columns of what is piped into a file.
WIDTH = 150


# ---------------------------------------------------------------------- in a process of its own
def files(name: str, small: bool, batch: int, folder: Path) -> dict[str, dict[str, int]]:
    """Write a model's weights and ONNX file, dense and pruned, and its inputs; return the bytes of the former."""
    model, inputs = MODELS[name].make(full=not small), MODELS[name].example(batch, full=not small)
    pruned = fxprune.compile(model, inputs, target={"macs": SHARE}, proof="quick")
    _backend().build(model, inputs, threads=1, path=folder / "dense.onnx")
    pruned.export(folder / "pruned.onnx")
    np.savez(folder / "inputs.npz", *(tensor.numpy() for tensor in inputs))
    for variant, module in zip(VARIANTS, (model, pruned.module), strict=True):
        safetensors.torch.save_model(module, str(folder / f"{variant}.safetensors"))
    return {
        variant: {
            "weights": (folder / f"{variant}.safetensors").stat().st_size,
            "onnx": (folder / f"{variant}.onnx").stat().st_size,
        }
        for variant in VARIANTS
    }


def running(variant: str, threads: int, folder: Path) -> dict[str, int]:
    """Return the bytes that opening and running a file in onnxruntime takes at its peak."""
    import onnx

    tensor = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "first", tensor[:1], tensor[1:])
    opsets = [onnx.helper.make_opsetid("", 20)]
    # What onnxruntime loads and allocates once in a process is not the model's.
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), str(folder / "first.onnx"))
    _backend().load(folder / "first.onnx", threads).run(torch.zeros(1))
    with np.load(folder / "inputs.npz") as held:
        inputs = [torch.from_numpy(held[key]) for key in held.files]
    before = resident.start()
    run = _backend().load(folder / f"{variant}.onnx", threads).bind(*inputs)
    for _ in range(CALLS):
        run()
    return {"peak": resident.peak() - before}


def _backend() -> OnnxRuntimeBackend:
    backend = BACKENDS["onnxruntime"]
    assert isinstance(backend, OnnxRuntimeBackend)
    return backend


# ---------------------------------------------------------------------- one model
def measure(name: str, small: bool, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    """Return a model's figures: bytes, of peaks a list of one a repeat; an `error` where something fails."""
    with tempfile.TemporaryDirectory() as folder:
        common = [name, "--batch", str(batch), "--threads", str(threads), "--folder", folder]
        common += ["--small"] if small else []

        def worker(what: str) -> Any:
            return resident.child("bench.memory", *common, "--worker", what)

        result: dict[str, Any] = {"compile": {}, "files": worker("files"), "onnxruntime": {}}
        for tool in compile_time.TOOLS:
            result["compile"][tool] = _repeated(lambda tool=tool: worker(tool), repeats)  # type: ignore[misc]
        for variant in VARIANTS if "error" not in result["files"] else ():
            result["onnxruntime"][variant] = _repeated(lambda v=variant: worker(v), repeats)  # type: ignore[misc]
    return result


def _repeated(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Return what several runs give, their peaks in one list, or the first error."""
    found: list[dict[str, Any]] = []
    for _ in range(repeats):
        found.append(run())
        if "error" in found[-1]:
            return {"error": found[-1]["error"]}
    return found[0] | {"peak": [row["peak"] for row in found]}


def peak(row: dict[str, Any]) -> float | None:
    """Return the median of the peaks.

    >>> peak({"peak": [3, 1, 2]}), peak({"error": "no"})
    (2, None)
    """
    return statistics.median(row["peak"]) if "peak" in row else None


# ---------------------------------------------------------------------- tables
def _size(number: float | None) -> str:
    return "fails" if number is None else f"{number / 2**20:.1f}"


def table(models: dict[str, Any]) -> Table:
    """Return the results as a rich table, in MiB."""
    result = Table(title="MiB: peak of pruning (in units of the weights), files, peak of onnxruntime; dense -> pruned")
    result.add_column("model")
    for column in ("pruning, fxprune", "Torch-Pruning", "weights", "ONNX file", "running in onnxruntime"):
        result.add_column(column, justify="right")
    for name, row in models.items():
        cells = []
        for tool in compile_time.TOOLS:
            found = row["compile"][tool]
            most = peak(found)
            cells.append(_size(most) + ("" if most is None else f" ({most / found['weights']:.2f})"))
        for kind in ("weights", "onnx"):
            sizes = [row["files"].get(variant, {}).get(kind) for variant in VARIANTS]
            cells.append(" -> ".join(map(_size, sizes)))
        cells.append(" -> ".join(_size(peak(row["onnxruntime"].get(variant, {}))) for variant in VARIANTS))
        result.add_row(name, *cells)
    return result


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of `bench.models`; by default {', '.join(NAMES)}")] = None,
    batch: Annotated[int, typer.Option(min=1, help="rows that onnxruntime is given; pruning sees one")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="of onnxruntime")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="processes for each peak; the median counts")] = 3,
    small: Annotated[bool, typer.Option(help="small versions of the models, to see that everything works")] = False,
    resume: Annotated[bool, typer.Option(help="leave out what the file has")] = False,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "memory.json",
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the memory that pruning, storing and running models takes, dense and pruned."""
    chosen = names or list(NAMES)
    unknown = sorted(set(chosen) - set(MODELS))
    if unknown:
        raise typer.BadParameter(f"unknown models {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if worker is not None:
        assert folder is not None
        warnings.simplefilter("ignore")
        print(json.dumps(_work(worker, chosen[0], small, batch, threads, folder)))
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    about = document.opened(file, resume, share=SHARE, batch=batch, threads=threads, repeats=repeats, small=small)
    about |= {"machine": machine.describe()}
    models = about.setdefault("models", {})
    for name in chosen:
        if name not in models:
            with console.status(name):
                models[name] = measure(name, small, batch, threads, repeats)
            document.write(file, about)
        rows = {"files": models[name]["files"], **models[name]["compile"], **models[name]["onnxruntime"]}
        for what, row in rows.items():
            if "error" in row:
                console.print(f"{name}, {what}: {row['error']}", markup=False, highlight=False)
    console.print(table(models))
    console.print(machine.stamp(), style="dim", highlight=False)


def _work(what: str, name: str, small: bool, batch: int, threads: int, folder: Path) -> dict[str, Any]:
    if what == "files":
        return files(name, small, batch, folder)
    if what in VARIANTS:
        return running(what, threads, folder)
    return compile_time.peak_memory(name, what, full=not small)


if __name__ == "__main__":
    typer.run(main)
