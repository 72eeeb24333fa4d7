"""`fxprune train`: prune a model while it is trained, in the stages of a recipe; prove, save and time the result."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.text import Text

from fxprune.cli.console import Answer, Progress, command, table
from fxprune.cli.options import Json, Threads
from fxprune.cli.places import check_places
from fxprune.doctor import first_sentence
from fxprune.errors import FxpruneError, RecipeError
from fxprune.passes import training
from fxprune.passes.training.find import AXES, LAYER, RECIPES, known_patterns
from fxprune.training.optimizers import FALLS, OPTIMIZERS
from fxprune.training.recipe import TrainRecipe, read_train_recipe
from fxprune.training.run import train as train_model
from fxprune.training.task import FORMS, Task, task

#: Rows of a batch, where neither recipe nor options say so.
_ROWS = 32


@command
def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A training recipe in YAML.", show_default=False)
    ] = None,
    task_name: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help=f"Model, data and loss: {'; '.join(FORMS)}.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Where the smaller model is saved.", show_default=False)
    ] = None,
    onnx: Annotated[Path | None, typer.Option(metavar="FILE.onnx", help="Write it as ONNX, too.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run to the same --out was stopped.")] = False,
    log: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="training.csv, and pruning.csv of each stage.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(metavar="N", help="Of the whole run: stages and schedules keep their shares.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rows of a batch.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random.")] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the model will run on: `fxprune backends`.")
    ] = None,
    threads: Threads = None,
    calibration: Annotated[int, typer.Option(min=1, metavar="N", help="Samples for a stage that quantizes.")] = 256,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time dense and pruned side by side.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is saved under these names.")] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List methods, patterns, ramps, optimizers and schedules; train nothing.")
    ] = False,
    as_json: Json = False,
) -> Answer:
    """Prune a model while it is trained, in the stages of RECIPE, prove the result, save it and time it."""
    if listing:
        return _list()
    if recipe is None or task_name is None or out is None:
        missing = [n for n, v in (("RECIPE", recipe), ("--task", task_name), ("--out", out)) if v is None]
        raise RecipeError(f"there is no {', no '.join(missing)}; `fxprune train --list` says what a recipe can name")
    settings = read_train_recipe(recipe, batch=batch, seed=seed, backend=backend, threads=threads)
    if epochs is not None:
        settings = settings.stretched(epochs)
    if settings.batch is None:
        settings = read_train_recipe(settings, batch=_ROWS)
    check_places(out, onnx, overwrite)
    kept = out.with_name(f"{out.name}.run")
    found = task(task_name, settings.seed)
    spinner = Progress()
    spinner("make the model")
    data = _calibration(found, settings, calibration)
    pruned = train_model(
        found.model(),
        found.example,
        settings,
        batches=lambda number: found.training(settings.batch or _ROWS, number, settings.seed),
        loss=found.loss,
        metric=found.score,
        dynamic_shapes=found.dynamic,
        calibration=data,
        log=log,
        checkpoint=kept,
        resume=resume,
    )
    failure: FxpruneError | None = None
    with spinner.running() as progress:
        if measure:
            progress("measure")
            try:
                pruned.measure(backend=settings.backend, threads=settings.threads)
            except FxpruneError as error:  # what took long to make is saved first
                failure = error
        progress("save")
        again = _again(recipe, task_name, out, {"epochs": epochs, "batch": batch, "seed": seed, "backend": backend})
        pruned.report.made = replace(pruned.report.made, command=again)
        pruned.save(out, overwrite)
        shutil.copyfile(recipe, out / "train.yaml")
        files = [f for f in sorted(out.iterdir()) if f.is_file()]
        if onnx is not None:
            progress("export to ONNX")
            files.append(pruned.export(onnx))
        shutil.rmtree(kept, ignore_errors=True)  # the run is over
    data_out = {
        "out": str(out),
        "files": {str(f): f.stat().st_size for f in files},
        "report": pruned.report.to_json(),
    }
    show: list[RenderableType] = [*pruned.report.tables(), *pruned.report.lines(), ""]
    show += [f"wrote  {f} ({decimal(f.stat().st_size)})" for f in files]
    show += [f"report fxprune report {shlex.quote(str(out))}", f"again  {again}"]
    if failure is not None:
        failure = type(failure)(f"the model was saved in '{out}', but not timed: {failure}")
    return Answer(data_out, show, failure)


def _calibration(found: Task, settings: TrainRecipe, samples: int) -> Any:
    """The samples for numbers in 8 bits, where a stage asks for them."""
    if settings.stages[-1].quantize is None:
        return None
    return list(found.calibration(samples, settings.seed))


def _again(recipe: Path, task_name: str, out: Path, options: dict[str, Any]) -> str:
    words = ["fxprune", "train", str(recipe), "--task", task_name]
    words += [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join([*words, "--out", f"{out}-again"])


def _list() -> Answer:
    training.load()
    methods = table("method", "what stays", "patterns", "options")
    found: dict[str, Any] = {"methods": {}, "patterns": patterns(), "ramps": {}, "optimizers": {}, "schedules": {}}
    for name in training.METHODS:
        cls: Any = training.METHODS[name]
        about = first_sentence(cls.__doc__)
        options = {f.name: f.default for f in fields_of(cls) if f.init}
        found["methods"][name] = {"about": about, "patterns": cls.patterns, "options": options}
        said = ", ".join(f"{k}={v}" for k, v in options.items())
        methods.add_row(name, Text(about), cls.patterns, Text(said or "none"))
    more = table("pattern", "what goes as one")
    for name, about in found["patterns"].items():
        more.add_row(Text(name), Text(about))
    ramps = table("ramp", "how much goes when")
    for name in training.RAMPS:
        found["ramps"][name] = first_sentence(training.RAMPS[name].__doc__)
        ramps.add_row(name, Text(found["ramps"][name]))
    optimizers = table("optimizer", "of torch.optim")
    for name in OPTIMIZERS:
        found["optimizers"][name] = OPTIMIZERS[name].__name__
        optimizers.add_row(name, OPTIMIZERS[name].__name__)
    falls = table("schedule", "how the learning rate falls")
    for name in FALLS:
        found["schedules"][name] = first_sentence(FALLS[name].__doc__)
        falls.add_row(name, found["schedules"][name])
    return Answer(found, [methods, more, ramps, optimizers, falls])


def patterns() -> dict[str, str]:
    """Return every pattern, and what goes as one under it.

    >>> patterns()["head"]
    'attention heads'
    """
    said = {
        "element": "single entries of weights",
        "2:4": "or any n:m: n of every m entries along the inputs stay",
        "32x32": "or any rows x columns: blocks of a weight, 4x1 for example",
        "1xchannel": "rows of a weight",
        "channelx1": "columns of a weight",
        "channel": "every width",
        "filter": "the widths that convolutions make",
        "head": "attention heads",
        "head_dim": "the same dimensions of all heads",
        "ffn": "the inner widths of MLPs",
        "hidden": "the width of the residual stream",
        "layer": "branches of residual networks",
        "hybrid": "32x32 blocks of attention's weights, and ffn",
        "hybrid-filled": "the same, to be filled afterwards",
        "struct": "head, and ffn",
    }
    assert set(said) == set(known_patterns()) >= {*AXES, LAYER, *RECIPES}
    return said
