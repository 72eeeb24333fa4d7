"""`fxprune sweep`: a model at a list of targets, timed together, with a page about all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from fxprune import named
from fxprune.cli.console import Answer, Progress, command
from fxprune.cli.options import TARGETS, Inputs, Json, Model, Threads, parse_targets
from fxprune.data import FORMS, read_data
from fxprune.errors import FxpruneError
from fxprune.page import html, markdown, page, read
from fxprune.pruned import rebatch
from fxprune.recipe import read_recipe
from fxprune.sources import describe_inputs, resolve
from fxprune.sweep import check_free
from fxprune.sweep import sweep as sweep_model


@command
def sweep(
    model: Model,
    target: Annotated[
        list[str],
        typer.Option(
            metavar="TARGET", help=f"{', '.join(TARGETS)}; speedup=1.5,2,3 is three. Repeat for several kinds."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIRECTORY", help="Where the models and the page go.", show_default=False)
    ],
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Settings that hold for all targets.")
    ] = None,
    inputs: Inputs = None,
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rows of the example inputs and of calibration batches.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help=f"Calibration data: {'; '.join(FORMS)}.", show_default=False),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(metavar="NAME", help="FILE.py:NAME or MODULE:NAME of (output, labels) -> scalar.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same of a function model -> number, higher is better.")
    ] = None,
    threads: Threads = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time all of them in turns.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is saved under these names.")] = False,
    as_json: Json = False,
) -> Answer:
    """Prune MODEL to several targets in one go, time the results together, and draw accuracy over speed."""
    targets = parse_targets(target)
    check_free(out, overwrite)
    settings = read_recipe(recipe, target=targets[0], threads=threads)
    failure: FxpruneError | None = None
    with Progress().running() as progress:
        seed = settings.seed
        data = read_data(calibration, seed) if calibration is not None else None
        functions: dict[str, Any] = {
            "loss": named.function(loss, "a function (output, labels) -> scalar", seed) if loss else None,
            "metric": named.function(metric, "a function model -> number", seed) if metric else None,
        }
        progress("make the model")
        source = resolve(model, inputs or (), seed)
        args, kwargs = rebatch(source.args, source.kwargs, batch)
        source = replace(source, args=args, kwargs=kwargs)
        notes = [*source.notes, f"example inputs: {describe_inputs(args, kwargs)}"]
        batches = None
        if data is not None:
            batches = data.batches(source)
            notes.append(f"calibration: {data.describe(batches)}")
        found = sweep_model(
            source.module,
            args,
            targets,
            settings,
            kwargs=kwargs,
            progress=progress,
            calibration=batches,
            **functions,
        )
        if measure:
            progress("measure all of them")
            try:
                found.measure(threads=threads, progress=progress)
            except FxpruneError as error:  # what took long to make is saved first
                failure = error
        progress("save")
        found.save(out, overwrite)
        about = page(*read([out]))
        files = {out / "report.html": html(about), out / "report.md": markdown(about)}
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
    answer = {
        "out": str(out),
        "files": {str(f): f.stat().st_size for f in files},
        "notes": notes,
        "reports": {name: pruned.report.to_json() for name, pruned in found.results.items()},
        "failed": found.failed,
    }
    show: list[RenderableType] = [*(f"note: {note}" for note in notes), found.table()]
    show += [f"{name} was not reached: {why}" for name, why in found.failed.items()]
    show += [f"wrote  {out / name.replace('=', '-')}" for name in found.results] + [f"wrote  {f}" for f in files]
    if failure is not None:
        failure = type(failure)(f"the models were saved in '{out}', but not timed: {failure}")
    return Answer(answer, show, failure)
