"""`fxprune bench`: a saved model and the dense one, timed in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from fxprune.backends import BACKENDS
from fxprune.backends.timing import LEAST_REPEATS
from fxprune.cli.console import Answer, Progress, command
from fxprune.cli.options import MODEL_HELP, Batch, Json, Threads
from fxprune.pruned import Pruned
from fxprune.saved import load_pruned
from fxprune.sources import Source, resolve


@command
def bench(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="What `fxprune compile` saved.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help=f"The dense model: {MODEL_HELP}", show_default=False)],
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="`fxprune backends`; repeat for several. By default the recipe's."),
    ] = None,
    threads: Threads = None,
    batch: Batch = None,
    rounds: Annotated[
        int, typer.Option(min=LEAST_REPEATS, metavar="N", help="How often each of the two is timed.")
    ] = 30,
    as_json: Json = False,
) -> Answer:
    """Time a saved model and the dense one alternately, in one run, on the same inputs."""
    for name in backend or ():
        BACKENDS[name]
    with Progress().running() as progress:
        progress("read the saved model")
        pruned = load_pruned(directory)
        progress("make the dense model")
        source = resolve(against, needs_inputs=False)
        report = pruned.report
        report.latency.clear()  # what `compile` measured belongs to another run
        for name in backend or [report.recipe.get("backend", "onnxruntime")]:
            progress(f"measure on {name}")
            pruned.measure(source.module, backend=name, threads=threads, batch=batch, rounds=rounds)
    notes = [*_mismatch(source, pruned, against)]
    data = {
        "latency": report.to_json()["latency"],
        "macs": asdict(report.macs),
        "params": asdict(report.params),
        "notes": notes,
    }
    show: list[RenderableType] = [*report.tables(), f"{rounds} rounds, dense and pruned in turn; medians"]
    return Answer(data, show + [f"note: {note}" for note in notes])


def _mismatch(source: Source, pruned: Pruned, against: str) -> Iterator[str]:
    """Say so where the dense model is not the one that the saved model was made of."""
    kind, report = type(source.module).__name__, pruned.report
    count = sum(p.numel() for p in source.module.parameters())
    if kind != report.model or count < report.params.dense:
        yield (
            f"{against} is a {kind} of {count:,} parameters, but the saved model was made of a {report.model} "
            f"of {report.params.dense:,.0f}: the two may not do the same work"
        )
