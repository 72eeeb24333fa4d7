"""`python -m bench.rounding [MODEL ...]`: what rounding widths does to the speed of a pruned model on onnxruntime.

The same half of the multiply-accumulates goes for every rounding; only what widths are multiples of differs. The dense
model and all pruned ones are timed in turns within one run. The efficiency is the speed-up over the dense model's
multiply-accumulates per one of the pruned model's: how much of the saving the clock sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from bench import document, machine
from bench.models import MODELS
from fxprune.backends import BACKENDS
from fxprune.backends.timing import Comparison, compare

BACKEND = "onnxruntime"
NAMES = ("resnet50", "minilm")
SHARE = 0.5
#: None is what fxprune takes where the recipe says nothing.
ROUNDINGS: tuple[int | None, ...] = (1, 4, 8, 16, 32, None)
RESULTS = Path(__file__).parent / "results"


def label(multiple: int | None) -> str:
    """Return the name of a rounding in tables and files."""
    return "default" if multiple is None else str(multiple)


def measure(name: str, batch: int, threads: int, rounds: int, full: bool = True) -> tuple[dict[str, Any], Comparison]:
    """Return each rounding's figures by its label, and the comparison of their latencies with the dense model's."""
    model, inputs = MODELS[name].make(full=full), MODELS[name].example(batch, full=full)
    backend = BACKENDS[BACKEND]
    runners = {"dense": backend.build(model, inputs, threads=threads)}
    figures: dict[str, Any] = {}
    for multiple in ROUNDINGS:
        pruned = fxprune.compile(model, inputs, target={"macs": SHARE}, round_to=multiple, proof="quick")
        runners[label(multiple)] = backend.build(pruned.module, inputs, threads=threads)
        report = pruned.report
        figures[label(multiple)] = {
            "round_to": report.round_to,
            "macs": report.macs.ratio,
            "params": report.params.ratio,
        }
    calls = {key: lambda runner=runner: runner.run(*inputs) for key, runner in runners.items()}  # type: ignore[misc, unused-ignore]
    return figures, compare(calls, reference="dense", repeats=rounds, warmup=2)


def table(figures: dict[str, Any], timed: Comparison, title: str) -> Table:
    """Return the results as a rich table."""
    result = Table(title=title)
    for column in ("round_to", "MACs", "parameters", "ms", "speed-up", "95 %", "efficiency"):
        result.add_column(column, justify="left" if column == "round_to" else "right")
    result.add_row("dense", "1.000", "1.000", f"{timed.latencies['dense'].median * 1e3:.1f}", "1.00 x", "", "")
    for key, row in figures.items():
        faster = timed.ratio(key)
        result.add_row(
            f"default ({row['round_to']})" if key == "default" else key,
            f"{row['macs']:.3f}",
            f"{row['params']:.3f}",
            f"{timed.latencies[key].median * 1e3:.1f}",
            f"{faster.median:.2f} x",
            f"{faster.low:.2f}-{faster.high:.2f}",
            f"{faster.median * row['macs']:.2f}",
        )
    return result


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"of `bench.models`; by default {' and '.join(NAMES)}")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=6, help="of timing all models in turns")] = 20,
    resume: Annotated[bool, typer.Option(help="leave out what the file has")] = False,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "rounding.json",
) -> None:
    """Time models dense and with half of their multiply-accumulates, their widths rounded in several ways."""
    console = Console()
    torch.set_num_threads(threads)
    about = document.opened(file, resume, share=SHARE, batch=batch, threads=threads, rounds=rounds)
    about |= {"machine": machine.describe()}
    models: dict[str, Any] = about.setdefault("models", {})
    for name in names or NAMES:
        if name in models:
            console.print(f"{name} is in {file.name}", style="dim", highlight=False)
            continue
        figures, timed = measure(name, batch, threads, rounds)
        title = (
            f"{name} at {SHARE:g} of the MACs: {BACKEND}, float32, batch {batch}, {threads} threads, {rounds} rounds"
        )
        console.print(table(figures, timed, title))
        models[name] = {"roundings": figures, "timing": timed.to_json()}
        document.write(file, about)
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
