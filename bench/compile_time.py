"""`python -m bench.compile_time`: the time and memory that compiling takes, next to Torch-Pruning on the same models.

Both prune by magnitude, in turns within one process for each model; the first round is thrown away. fxprune's time is
that of the whole `compile` with the quick proof; Torch-Pruning's is that of building its graph and pruning, without the
copy of the model that it needs because it prunes in place. Peak memory is measured apart, in a process of its own for
each tool and model: the most that was resident while it ran less what was resident before, in units of the model's
weights.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import fxprune
from bench import document, machine, resident
from bench.models import MODELS, TIMED
from bench.peers import torch_pruning
from bench.resident import STATUS

STAGES = ("capture", "analyse", "choose", "rewrite", "prove")
SHARE = 0.5
#: The share of every layer's channels that Torch-Pruning removes: about what leaves half of the multiply-accumulates.
RATIO = 0.3
TOOLS = ("fxprune", "torch_pruning")
RESULTS = Path(__file__).parent / "results"
#: Columns of what is piped into a file.
WIDTH = 130


def run_fxprune(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Return the seconds of one whole `compile` and of each stage."""
    start = time.perf_counter()
    pruned = fxprune.compile(model, inputs, target={"macs": SHARE}, proof="quick")
    return {"whole": time.perf_counter() - start, **pruned.report.seconds}


def run_torch_pruning(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Return the seconds that Torch-Pruning took."""
    return {"whole": torch_pruning.prune(model, inputs, ratio=RATIO).seconds}


RUN = {"fxprune": run_fxprune, "torch_pruning": run_torch_pruning}


def time_model(name: str, repeats: int) -> dict[str, Any]:
    """Time both tools in turns on one model; return each one's seconds by stage, one number a round.

    A tool that fails has an `error` instead.
    """
    model, inputs = MODELS[name].make(full=True), MODELS[name].example(batch=1, full=True)
    samples: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
    errors: dict[str, str] = {}
    for turn in range(repeats + 1):
        for tool in TOOLS if turn % 2 else reversed(TOOLS):
            if tool in errors:
                continue
            gc.collect()
            try:
                seconds = RUN[tool](model, inputs)
            except Exception as error:  # a tool that cannot prune a model is a result, not a reason to stop
                errors[tool] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if turn:
                samples[tool].append(seconds)
    return {tool: {"error": errors[tool]} if tool in errors else {"seconds": _columns(samples[tool])} for tool in TOOLS}


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


# ---------------------------------------------------------------------- memory
def peak_memory(name: str, tool: str, full: bool = True) -> dict[str, float]:
    """Return the bytes of the weights, and of what was resident at the peak of one run beyond what was before it.

    To be called once in a fresh process. Libraries that are loaded on first use are loaded before, by pruning a model
    of three layers.
    """
    warm = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    RUN[tool](warm, (torch.zeros(1, 3, 8, 8),))
    model, inputs = MODELS[name].make(full=full), MODELS[name].example(batch=1, full=full)
    with torch.inference_mode():  # what one forward pass leaves behind in caches is not the tool's
        model(*inputs)
    gc.collect()
    before = resident.start()
    RUN[tool](model, inputs)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    return {"weights": weights, "peak": resident.peak() - before}


# ---------------------------------------------------------------------- one process for each model
def _child(*arguments: str) -> Any:
    """Run this program on one model in a process of its own and return what it printed last, as JSON."""
    return resident.child("bench.compile_time", *arguments)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Return times and peak memory of both tools on one model."""
    result: dict[str, Any] = _child("--models", name, "--repeats", str(repeats), "--worker", "time")
    for tool in TOOLS:
        if STATUS.exists() and "error" not in result.get(tool, {"error": ""}):
            result[tool]["memory"] = _child("--models", name, "--worker", tool)
    return result


def _median(row: dict[str, Any], stage: str) -> float | None:
    values = row.get("seconds", {}).get(stage)
    return statistics.median(values) if values else None


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _memory(row: dict[str, Any]) -> str:
    memory = row.get("memory", {})
    return f"{memory['peak'] / memory['weights']:.2f}" if "peak" in memory else "-"


def table(models: dict[str, Any], repeats: int) -> Table:
    """Return the results as a rich table; seconds are medians."""
    result = Table(title=f"Compile time in seconds, median of {repeats}; peak memory in units of the weights")
    result.add_column("model")
    for column in ("fxprune", "Torch-Pruning", "ratio", *STAGES, "memory", "memory T-P"):
        result.add_column(column, justify="right")
    for name, row in models.items():
        own, other = row.get("fxprune", {}), row.get("torch_pruning", {})
        whole, theirs = _median(own, "whole"), _median(other, "whole")
        result.add_row(
            name,
            _seconds(whole) if whole is not None else "fails",
            _seconds(theirs) if theirs is not None else "fails",
            f"{theirs / whole:.1f} x" if whole and theirs else "-",
            *(_seconds(_median(own, stage)) for stage in STAGES),
            _memory(own),
            _memory(other),
        )
    return result


def main(
    models: Annotated[str, typer.Option(help="names of bench.models, with commas between")] = ",".join(TIMED),
    repeats: Annotated[int, typer.Option(min=1, help="rounds that count")] = 5,
    resume: Annotated[bool, typer.Option(help="leave out what the file has")] = False,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "compile_time.json",
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time fxprune and Torch-Pruning on the same models and print a table."""
    names = models.split(",")
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        raise typer.BadParameter(f"unknown models {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if worker is not None:
        print(json.dumps(time_model(names[0], repeats) if worker == "time" else peak_memory(names[0], worker)))
        return
    importlib.import_module("torch_pruning")  # say at once that it is missing, not once for each model
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    about = document.opened(file, resume, repeats=repeats, share=SHARE, ratio=RATIO)
    about |= {"machine": machine.describe()}
    results = about.setdefault("models", {})
    for name in names:
        if name not in results:
            with console.status(name):
                results[name] = measure(name, repeats)
            document.write(file, about)
        for tool in TOOLS:
            if "error" in (row := results[name].get(tool, results[name])):
                console.print(f"{tool} fails on {name}: {row['error']}", markup=False)
    console.print(table(results, repeats))
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
