"""`fxprune compile`: prune, prove, save and time a model; or print the plan of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.text import Text

from fxprune import named
from fxprune.api import compile as compile_model
from fxprune.api import dry_run as dry_run_model
from fxprune.api import settings_of
from fxprune.backends import chosen
from fxprune.cli.console import Answer, Progress, command, table
from fxprune.cli.options import (
    TARGETS,
    Groups,
    Inputs,
    Json,
    Keep,
    Model,
    Ratios,
    Threads,
    parse_blocks,
    parse_ratios,
    parse_target,
)
from fxprune.cli.places import check_places
from fxprune.data import FORMS, read_data
from fxprune.errors import BackendError, FxpruneError, RecipeError, SavedModelError
from fxprune.passes.choose import functions
from fxprune.plan import Plan
from fxprune.pruned import Pruned, rebatch
from fxprune.recipe import Recipe, read_recipe
from fxprune.saved import RECIPE
from fxprune.sources import describe_inputs, resolve


@command
def compile(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY", help="Where the pruned model is saved. Needed but for --dry-run.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help=f"{', '.join(TARGETS)}: what to keep or reach. Needed unless the recipe has it."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Settings; the options here override it.")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(metavar="NAME", help="What units are worth: `fxprune criteria`.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="NAME", help="How the budget is spread: `fxprune criteria`.")
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(metavar="N", help="Widths are multiples of it; by default what the backend runs fast.")
    ] = None,
    keep: Keep = None,
    groups: Groups = None,
    ratios: Ratios = None,
    floor: Annotated[
        float | None, typer.Option(metavar="SHARE", help="No group keeps a smaller share of its units.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the model will run on: `fxprune backends`.")
    ] = None,
    reconstruction: Annotated[
        str | None, typer.Option(metavar="NAME", help="none, bias or least_squares; the latter two take data.")
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(metavar="BYTES", help="What calibration statistics may take at a time.")
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="NAME[=N]", help="Whole blocks go too: influence or greedy, with data; greedy=2: two."),
    ] = None,
    basis: Annotated[
        str | None, typer.Option(metavar="NAME", help="principal or none: attention in principal components first.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Zeros in what stays: 2:4 or any n:m, 32x32 or any blocks, unstructured."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="int8: an ONNX file in 8 bits, too, if that is faster.")
    ] = None,
    keep_class: Annotated[
        bool, typer.Option("--keep-class", help="Cut only what the model's own class can express.")
    ] = False,
    proof: Annotated[str | None, typer.Option(metavar="LEVEL", help="full or quick.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random.")] = None,
    inputs: Inputs = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time dense and pruned side by side.")] = True,
    threads: Threads = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Rows of the example inputs, and of the batches that calibration data are cut into.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help=f"Data that choose what goes and refit what stays: {'; '.join(FORMS)}.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="FILE.py:NAME or MODULE:NAME of a function (output, labels) -> scalar, for criteria."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The same of a function model -> number: reported, and what max_drop is about."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would stay and what that costs; --json prints the plan.")
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Do what a plan says: from --dry-run --json, or of a saved model."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is saved under these names.")] = False,
    onnx: Annotated[Path | None, typer.Option(metavar="FILE.onnx", help="Write the pruned model as ONNX, too.")] = None,
    as_json: Json = False,
) -> Answer:
    """Prune MODEL to a target, prove the result, save it and time it."""
    given: dict[str, Any] = {
        "target": parse_target(target) if target else None,
        "criterion": criterion,
        "allocation": allocation,
        "round_to": round_to,
        "keep": keep or None,
        "groups": groups or None,
        "ratios": parse_ratios(ratios) if ratios else None,
        "floor": floor,
        "backend": backend,
        "sparsity": sparsity,
        "quantization": quantization,
        "threads": threads,
        "reconstruction": reconstruction,
        "max_memory": max_memory,
        "blocks": parse_blocks(blocks) if blocks else None,
        "basis": basis,
        "keep_class": keep_class or None,
        "proof": proof,
        "seed": seed,
    }
    made = _read_plan(plan, recipe) if plan is not None else None
    settings = _settings(recipe, given) if made is None else settings_of(made, given)
    if dry_run and made is not None:
        raise RecipeError("--dry-run makes a plan, and --plan gives one: take one of the two")
    if dry_run and metric is not None:
        raise RecipeError("--dry-run makes no model whose --metric could be taken: leave out one of the two")
    if loss is not None and calibration is None:
        raise RecipeError("--loss is taken on calibration data: give --calibration, too")
    if not dry_run:
        _check_before(settings, out, onnx, overwrite, measure, calibration is not None)
    failure = None
    with Progress().running() as progress:
        data = None
        if calibration is not None:
            progress("read the calibration data")
            data = read_data(calibration, settings.seed)
        with_data: dict[str, Any] = {
            "loss": named.function(loss, "a function (output, labels) -> scalar", settings.seed) if loss else None
        }
        metric_function = named.function(metric, "a function model -> number", settings.seed) if metric else None
        progress("make the model")
        source = resolve(model, inputs or (), settings.seed)
        args, kwargs = rebatch(source.args, source.kwargs, batch)
        source = replace(source, args=args, kwargs=kwargs)
        notes = [*source.notes, f"example inputs: {describe_inputs(args, kwargs)}"]
        if data is not None:
            with_data["calibration"] = data.batches(source)
            notes.append(f"calibration: {data.describe(with_data['calibration'])}")
        with_data |= {"kwargs": kwargs, "progress": progress}
        if dry_run:
            return _planned(dry_run_model(source.module, args, settings, **with_data), notes)
        assert out is not None
        pruned = compile_model(
            source.module,
            args,
            settings if made is None else None,
            plan=made,
            metric=metric_function,
            **with_data,
            **({} if made is None else given),
        )
        if measure:
            progress(f"measure on {chosen(settings.backend).key}")
            try:
                pruned.measure(threads=threads)
            except FxpruneError as error:  # what took long to make is saved first
                failure = error
        progress("save")
        options = {"calibration": calibration, "loss": loss, "metric": metric, "batch": batch}
        pruned.report.made = replace(pruned.report.made, command=_again(model, out, options, inputs or ()))
        pruned.save(out, overwrite)
        files = [f for f in sorted(out.iterdir()) if f.is_file()]
        if onnx is not None:
            progress("export to ONNX")
            files.append(pruned.export(onnx))
    return _compiled(model, notes, pruned, out, files, failure)


def _settings(recipe: Path | None, given: Mapping[str, Any]) -> Recipe:
    if recipe is None and not any(given[key] for key in ("target", "sparsity", "quantization")):
        raise RecipeError(
            f"there is no target; pass --target with one of {', '.join(TARGETS)}, or a --recipe that has one; "
            "--sparsity and --quantization alone need none"
        )
    return read_recipe(recipe, **given)


def _read_plan(path: Path, recipe: Path | None) -> Plan:
    """The plan in a file that `--dry-run --json` or `Plan.to_json` wrote, or in a saved model's plan.json."""
    if recipe is not None:
        raise RecipeError("give --recipe or --plan, not both: a plan has its recipe with it")
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise SavedModelError(f"the plan {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SavedModelError(f"the plan {path} is not JSON: {error}") from error
    return Plan.from_json(data.get("plan", data) if isinstance(data, dict) else {})


def _planned(plan: Plan, notes: list[str]) -> Answer:
    return Answer(
        {"plan": json.loads(plan.to_json()), "notes": notes}, [*(f"note: {n}" for n in notes), *show_plan(plan)]
    )


def show_plan(plan: Plan) -> list[RenderableType]:
    """Return what a plan keeps of each group, what that saves by itself, and what of the recipe says so."""
    named = "criterion", "allocation"
    how = [f"{key} {plan.recipe[key]}" for key in named if key in plan.recipe]
    rows = table("group", "kind", "#units", "#kept", "#saves params", "#saves MACs", "because")
    for g in plan.groups:
        kind = f"{g.kind} ({g.role})" if g.role else g.kind
        rows.add_row(g.name, kind, f"{g.size:,}", f"{g.kept:,}", f"{g.params:,}", f"{g.macs:,}", Text(g.why))
    lines = [
        f"{label}: {dense:,} -> {pruned:,} ({pruned / dense if dense else 1:.3f})"
        for kind, label in (("params", "parameters"), ("macs", "MACs"))
        for dense, pruned in [plan.costs[kind]]
    ]
    nothing = [] if plan.groups else ["There is no group: nothing can be cut."]
    return [*nothing, *([rows] if plan.groups else []), *lines, *how]


def _check_before(
    settings: Recipe, out: Path | None, onnx: Path | None, overwrite: bool, measure: bool, data: bool
) -> None:
    """Refuse at once what would otherwise fail after minutes of work."""
    if out is None:
        raise RecipeError("there is no --out DIRECTORY to save the pruned model in; --dry-run needs none")
    functions(settings, data)
    backend = chosen(settings.backend)
    reason = backend.available()
    if measure and reason is not None:
        raise BackendError(
            f"backend '{backend.name}' cannot be used here: {reason}. "
            "Pass --no-measure to compile for it without timing"
        )
    check_places(out, onnx, overwrite)


def _again(model: str, out: Path, options: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """The command that makes the same model again beside it, by the exact recipe that is saved with it."""
    words = ["fxprune", "compile", model, "--recipe", str(out / RECIPE)]
    words += [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for text in inputs for word in ("--input", text)]
    return shlex.join([*words, "--out", f"{out}-again"])


def _compiled(
    model: str, notes: list[str], pruned: Pruned, out: Path, files: list[Path], failure: FxpruneError | None
) -> Answer:
    commands = {
        "load": f"python -c {shlex.quote(f'import fxprune; print(fxprune.load({json.dumps(str(out))}))')}",
        "bench": f"fxprune bench {shlex.quote(str(out))} --against {shlex.quote(model)}",
        "report": f"fxprune report {shlex.quote(str(out))}",
        "again": pruned.report.made.command,
    }
    data = {
        "out": str(out),
        "files": {str(f): f.stat().st_size for f in files},
        "commands": commands,
        "notes": notes,
        "report": pruned.report.to_json(),
    }
    show: list[RenderableType] = [f"note: {note}" for note in notes]
    show += [*pruned.report.tables(), *pruned.report.lines(), ""]
    show += [f"wrote  {f} ({decimal(f.stat().st_size)})" for f in files]
    show += [f"{name:<6} {line}" for name, line in commands.items()]
    if failure is not None:
        failure = type(failure)(f"the model was saved in '{out}', but not timed: {failure}")
    return Answer(data, show, failure)
