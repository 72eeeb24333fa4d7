"""The command line: `fxprune compile MODEL --target macs=0.5 --out small/`.

Each command returns an `Answer`: what `--json` prints, and what a person reads. Standard output holds that and nothing
else; progress, and whatever models and libraries print, goes to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from rich import box
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

import fxprune
from fxprune import passes
from fxprune.api import Pruned, settings_of
from fxprune.api import compile as compile_model
from fxprune.api import dry_run as dry_run_model
from fxprune.backends import BACKENDS
from fxprune.backends.timing import LEAST_REPEATS
from fxprune.doctor import backend_states, diagnose, first_line, first_sentence
from fxprune.errors import BackendError, FxpruneError, InputError, RecipeError, SavedModelError
from fxprune.explain import Coupling, Explainer, Explanation, FrozenInfo, GroupInfo, OperatorInfo, Step
from fxprune.passes.choose import functions
from fxprune.passes.statistics import NEEDS
from fxprune.plan import Plan
from fxprune.recipe import Kind, Recipe, Target, read_recipe
from fxprune.saved import PLAN, load_pruned
from fxprune.sources import FORMS, Source, describe_inputs, resolve

INTERNAL, INTERRUPTED = 70, 130
#: Columns of what is piped into a file.
WIDTH = 100

EXIT_CODES = {
    0: "done",
    **{e.exit_code: first_line(e.__doc__) for e in FxpruneError.__subclasses__()},
    2: f"{first_line(RecipeError.__doc__)}; or the command line is wrong",
    INTERNAL: "An error that fxprune did not expect; its traceback is printed",
    INTERRUPTED: "Stopped with Ctrl-C",
}
_EPILOG = "\n\n".join(
    [
        f"MODEL is one of: {', '.join(FORMS)}",
        "\n".join(["Exit codes:", *(f"{code:>4}  {EXIT_CODES[code]}." for code in sorted(EXIT_CODES))]),
    ]
)

app = typer.Typer(
    help="A pruning compiler for PyTorch: a smaller model of real layers, proved equal to the masked dense one.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(slots=True)
class Answer:
    """What a command found out.

    Attributes:
        data: for `--json`.
        show: for people.
        failure: an error that came after something worth printing; decides the exit code.
    """

    data: dict[str, Any]
    show: list[RenderableType]
    failure: FxpruneError | None = None


# ---------------------------------------------------------------------- printing and failing
def _out() -> Console:
    """Standard output, wide enough for tables where it is not a terminal."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if fixed else WIDTH, highlight=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(answer.data, indent=1) + "\n")
        return
    console = _out()
    for item in answer.show:
        # Sentences wrap in the terminal itself, so that a command line in them can be copied.
        console.print(item, markup=False, soft_wrap=isinstance(item, str | Text))


def _fail(error: FxpruneError, as_json: bool) -> typer.Exit:
    _err().print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    if as_json:
        data = {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        sys.stdout.write(json.dumps({"error": data}, indent=1) + "\n")
    return typer.Exit(error.exit_code)


def command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a typer command of a function that returns an Answer."""

    @functools.wraps(function)
    def run(*args: Any, as_json: bool, **kwargs: Any) -> None:
        try:
            # A model's own `print` must not end up between the braces of `--json`, nor in a table.
            with contextlib.redirect_stdout(sys.stderr):
                answer = function(*args, as_json=as_json, **kwargs)
            if not (as_json and answer.failure):
                _print(answer, as_json)
            if answer.failure is not None:
                raise answer.failure
        except FxpruneError as error:
            raise _fail(error, as_json) from None
        except KeyboardInterrupt:
            _err().print("stopped")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever reads has seen enough: typer ends quietly
            raise
        except Exception:
            traceback.print_exc()
            _err().print(
                "fxprune did not expect this error. Please report it with the traceback above and what "
                "`fxprune doctor` prints",
                soft_wrap=True,
            )
            raise typer.Exit(INTERNAL) from None

    return app.command()(run)


class Progress:
    """A spinner with the name of what runs, on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self._status: Any = None

    def __call__(self, stage: str) -> None:
        """Say that a stage begins."""
        if self._status is not None:
            self._status.update(stage)

    @contextlib.contextmanager
    def running(self) -> Iterator[Progress]:
        """Show the spinner while the block runs."""
        console = _err()
        if not console.is_terminal:
            yield self
            return
        with console.status("starting") as self._status:
            yield self
        self._status = None


# ---------------------------------------------------------------------- arguments that commands share
_MODEL_HELP = f"{', '.join(FORMS)}."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SPEC",
        help="Example input, [NAME=]SHAPE[:DTYPE[:LOW-HIGH]]: 1x3x224x224, or input_ids=2x16:int64:0-30000 "
        "(LOW <= value < HIGH). Repeat for several; they replace those that MODEL comes with.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="CPU threads for timing; by default what torch uses.")
]
Batch = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Batch size for timing; by default that of the example inputs.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="What stays whole: head, 'layer1.*', type:LayerNorm, kind:residual, fc.weight.0, or a group's name.",
    ),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help=f"Cut only this kind: {', '.join(get_args(Kind))}; 'not KIND' excludes."),
]
Ratios = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=SHARE", help="Share of its units that a group keeps: fc1=0.5, or kind:ffn=0.3-0.8."),
]
_SHARES = ("macs", "params", "memory")
_TARGETS = [
    name if f.annotation is bool else f"{name}={'SHARE' if name in _SHARES else 'NUMBER'}"
    for name, f in Target.model_fields.items()
]


def parse_target(text: str) -> dict[str, Any]:
    """Read `--target`: KEY=VALUE, or KEY alone where it is a switch.

    >>> parse_target("macs=0.5"), parse_target("dead")
    ({'macs': 0.5}, {'dead': True})
    """
    key, given, value = text.partition("=")
    try:
        return {key: yaml.safe_load(value) if given else True}
    except yaml.YAMLError:
        raise RecipeError(f"--target {text}: this is none of {', '.join(_TARGETS)}") from None


def parse_ratios(texts: Sequence[str]) -> dict[str, Any]:
    """Read `--ratios`: PATTERN=SHARE or PATTERN=LEAST-MOST.

    >>> parse_ratios(["layer1=0.5", "kind:ffn=0.3-0.8"])
    {'layer1': 0.5, 'kind:ffn': {'min': 0.3, 'max': 0.8}}
    """
    found: dict[str, Any] = {}
    for text in texts:
        pattern, _, share = text.rpartition("=")
        try:
            numbers = [float(n) for n in share.split("-")]
        except ValueError:
            numbers = []
        if not pattern or not 1 <= len(numbers) <= 2:
            raise RecipeError(
                f"--ratios {text}: write PATTERN=SHARE, layer1=0.5, or PATTERN=LEAST-MOST, layer1=0.3-0.8"
            )
        found[pattern] = numbers[0] if len(numbers) == 1 else {"min": numbers[0], "max": numbers[1]}
    return found


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"fxprune {fxprune.__version__}\n")
        raise typer.Exit


# ---------------------------------------------------------------------- compile
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
            metavar="TARGET", help=f"{', '.join(_TARGETS)}: what to keep or reach. Needed unless the recipe has it."
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
    keep_class: Annotated[
        bool, typer.Option("--keep-class", help="Cut only what the model's own class can express.")
    ] = False,
    proof: Annotated[str | None, typer.Option(metavar="LEVEL", help="full or quick.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of everything random.")] = None,
    inputs: Inputs = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time dense and pruned side by side.")] = True,
    threads: Threads = None,
    batch: Batch = None,
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
        "threads": threads,
        "reconstruction": reconstruction,
        "max_memory": max_memory,
        "keep_class": keep_class or None,
        "proof": proof,
        "seed": seed,
    }
    made = _read_plan(plan, recipe) if plan is not None else None
    settings = _settings(recipe, given) if made is None else settings_of(made, given)
    if dry_run:
        return _dry_run(model, inputs or (), settings, made)
    if out is None:
        raise RecipeError("there is no --out DIRECTORY to save the pruned model in; --dry-run needs none")
    _check_before(settings, out, onnx, overwrite, measure)
    failure = None
    with Progress().running() as progress:
        progress("make the model")
        source = resolve(model, inputs or (), settings.seed)
        pruned = compile_model(
            source.module,
            source.args,
            settings if made is None else None,
            kwargs=source.kwargs,
            progress=progress,
            plan=made,
            **({} if made is None else given),
        )
        if measure:
            progress(f"measure on {settings.backend}")
            try:
                pruned.measure(threads=threads, batch=batch)
            except FxpruneError as error:  # what took long to make is saved first
                failure = error
        progress("save")
        pruned.save(out, overwrite)
        files = [f for f in sorted(out.iterdir()) if f.is_file()]
        if onnx is not None:
            progress("export to ONNX")
            files.append(pruned.export(onnx))
    return _compiled(model, source, pruned, out, files, failure)


def _settings(recipe: Path | None, given: Mapping[str, Any]) -> Recipe:
    if recipe is None and given["target"] is None:
        raise RecipeError(
            f"there is no target; pass --target with one of {', '.join(_TARGETS)}, or a --recipe that has one"
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


def _dry_run(model: str, inputs: Sequence[str], settings: Recipe, made: Plan | None) -> Answer:
    if made is not None:
        raise RecipeError("--dry-run makes a plan, and --plan gives one: take one of the two")
    with Progress().running() as progress:
        progress("make the model")
        source = resolve(model, inputs, settings.seed)
        plan = dry_run_model(source.module, source.args, settings, kwargs=source.kwargs, progress=progress)
    notes = [*source.notes, f"example inputs: {describe_inputs(source.args, source.kwargs)}"]
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


def _check_before(settings: Recipe, out: Path, onnx: Path | None, overwrite: bool, measure: bool) -> None:
    """Refuse at once what would otherwise fail after minutes of work."""
    functions(settings)
    reason = BACKENDS[settings.backend].available()
    if measure and reason is not None:
        raise BackendError(
            f"backend '{settings.backend}' cannot be used here: {reason}. "
            "Pass --no-measure to compile for it without timing"
        )
    if out.exists() and not (overwrite and (out / PLAN).is_file()):
        saved = (out / PLAN).is_file()
        what = "holds a saved model; pass --overwrite" if saved else "is not a model that fxprune saved; move it away"
        raise SavedModelError(f"'{out}' exists and {what}, or choose another name")
    if onnx is not None and onnx.suffix != ".onnx":
        raise InputError(f"--onnx {onnx}: the name must end in .onnx")
    if onnx is not None and onnx.exists() and not overwrite:
        raise SavedModelError(f"'{onnx}' exists; pass --overwrite, or choose another name")


def _compiled(
    model: str, source: Source, pruned: Pruned, out: Path, files: list[Path], failure: FxpruneError | None
) -> Answer:
    commands = {
        "load": f"python -c {shlex.quote(f'import fxprune; print(fxprune.load({json.dumps(str(out))}))')}",
        "bench": f"fxprune bench {shlex.quote(str(out))} --against {shlex.quote(model)}",
    }
    notes = [*source.notes, f"example inputs: {describe_inputs(source.args, source.kwargs)}"]
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


# ---------------------------------------------------------------------- explain
@command
def explain(
    model: Model,
    coupled: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Why two dimensions shrink together: conv1.weight.0 conv2.weight.1."),
    ] = None,
    group: Annotated[str | None, typer.Option(metavar="NAME", help="Everything that one group cuts.")] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Every parameter dimension that stays whole, and why.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Mark what of a recipe blocks or forces each group.")
    ] = None,
    keep: Keep = None,
    groups: Groups = None,
    ratios: Ratios = None,
    inputs: Inputs = None,
    as_json: Json = False,
) -> Answer:
    """Say what can be cut from MODEL, what is coupled with what, and what stays whole and why."""
    given = {"keep": keep or None, "groups": groups or None, "ratios": parse_ratios(ratios) if ratios else None}
    asked = recipe is not None or any(given.values())
    said: Any = {"target": {"params": 1.0}} if recipe is None else recipe
    with Progress().running() as progress:
        progress("make the model")
        source = resolve(model, inputs or ())
        progress("capture and analyse")
        settings = read_recipe(said, **given) if asked else None
        explainer = Explainer(source.module, source.args, source.kwargs, settings)
        explanation = explainer.explain()
    data: dict[str, Any] = {}
    show: list[RenderableType] = []
    if coupled is not None:
        coupling = explainer.coupled(*coupled)
        data["coupled"] = coupling.to_json()
        show += show_coupling(coupling)
    if group is not None:
        carriers = explainer.carriers(group)
        info = next(g for g in explanation.groups if g.name == group)
        data["group"] = {**asdict(info), "nodes": [asdict(c) for c in carriers]}
        show += show_group(info, carriers)
    if frozen:
        data["frozen"] = [asdict(w) for w in explanation.frozen]
        show += show_frozen(explanation.frozen)
    if not data:
        inputs_text = describe_inputs(source.args, source.kwargs)
        data = {**explanation.to_json(), "inputs": inputs_text, "notes": [*source.notes, *explanation.notes]}
        show = show_explanation(explanation, inputs_text)
        show += [f"note: {note}" for note in [*source.notes, *explanation.notes]]
    return Answer(data, show)


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; columns that begin with `#` hold numbers. Long names are folded, never cut off."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for column in columns:
        number = column.startswith("#")
        result.add_column(
            column.removeprefix("#"), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return result


def show_explanation(explanation: Explanation, inputs: str) -> list[RenderableType]:
    """Return the groups of a model, and a summary of what stays whole."""
    head = f"{explanation.model}: {explanation.params:,} parameters, {explanation.macs:,} MACs on {inputs}"
    if explanation.groups:
        marked = any(g.why for g in explanation.groups)
        rows = table(
            *("group", "kind", "role", "#units", "#params/unit", "#MACs/unit", "#tensors"),
            *(["blocked or forced by"] if marked else []),
        )
        for g in explanation.groups:
            numbers = f"{g.units:,}", f"{g.params:,}", f"{g.macs:,}", str(g.tensors)
            rows.add_row(g.name, g.kind, g.role, *numbers, *([Text(g.why)] if marked else []))
        show: list[RenderableType] = [head, rows]
    else:
        show = [head, "There is no group: nothing can be cut."]
    if explanation.frozen:
        reasons = Counter(w.reason for w in explanation.frozen)
        rows = table("#dimensions", "stay whole because (--frozen lists them)")
        for reason, count in reasons.most_common():
            rows.add_row(str(count), Text(reason))
        show.append(rows)
    show += [_no_rule(o) for o in explanation.unknown]
    return show


def _no_rule(info: OperatorInfo) -> str:
    return f"no rule for {info.name} ({info.count} x): what it touches stays whole"


def show_group(info: GroupInfo, carriers: Sequence[Step]) -> list[RenderableType]:
    """Return every dimension that a group cuts and every node that carries it."""
    width = f", each {info.width} entries wide" if info.width > 1 else ""
    role = f" ({info.role})" if info.role else ""
    head = (
        f"{info.name}: {info.units} units of kind {info.kind}{role}{width}; one less saves {info.params:,} parameters "
        f"and {info.macs:,} MACs"
    )
    mixed = any(m.made_of != info.name for m in info.members)
    members = table("tensor", "#dimension", "#size", "role", *(["made of"] if mixed else []))
    for m in info.members:
        row = [m.tensor, str(m.dim), str(m.size), m.role]
        members.add_row(*row, *([m.made_of] if mixed else []))
    nodes = table("node", "operator", "module", "source line")
    for c in carriers:
        nodes.add_row(c.name, c.operator, c.path, c.source)
    return [head, *([info.why] if info.why else []), members, nodes]


def show_coupling(coupling: Coupling) -> list[RenderableType]:
    """Return the path between two dimensions, or why there is none."""
    both = f"{coupling.first} and {coupling.second}"
    if coupling.groups:
        steps = coupling.steps or ("no path of nodes was found; this is a gap in the explanation, not in the coupling",)
        head = f"{both} shrink together, in group {' and in group '.join(coupling.groups)}:"
        return [head, *(f"  {line}" for line in steps)]
    lines = [f"{both} are not coupled:"]
    for label, names in ((coupling.first, coupling.of_first), (coupling.second, coupling.of_second)):
        why = coupling.whole.get(label, "no group cuts it")
        lines.append(f"  {label}: " + (f"cut by group {', '.join(names)}" if names else f"stays whole: {why}"))
    return list(lines)


def show_frozen(frozen: Sequence[FrozenInfo]) -> list[RenderableType]:
    """Return every dimension that stays whole; dimensions of one tensor with one reason share a row."""
    if not frozen:
        return ["No parameter dimension longer than 1 stays whole."]
    together: dict[tuple[str, str, Step | None], list[FrozenInfo]] = {}
    for w in frozen:
        together.setdefault((w.tensor, w.reason, w.cause), []).append(w)
    rows = table("parameter", "dimension", "size", "stays whole because", "caused by")
    for (tensor, reason, cause), members in together.items():
        rows.add_row(
            tensor,
            ", ".join(str(w.dim) for w in members),
            ", ".join(str(w.size) for w in members),
            Text(reason),
            _cause(cause),
        )
    return [rows]


def _cause(cause: Step | None) -> Text:
    return Text(f"{cause.operator} in {_where(cause)}".removesuffix(" in ") if cause is not None else "")


def _where(step: Step) -> str:
    """The module that a node belongs to, or its source line where it lies outside all of them."""
    return step.path or step.source


# ---------------------------------------------------------------------- ops
@command
def ops(model: Model, inputs: Inputs = None, as_json: Json = False) -> Answer:
    """List the operators of MODEL, those without a rule first."""
    with Progress().running() as progress:
        progress("make the model")
        source = resolve(model, inputs or ())
        progress("capture and analyse")
        explanation = Explainer(source.module, source.args, source.kwargs).explain()
    unknown, total = explanation.unknown, len(explanation.operators)
    data = {"operators": [asdict(o) for o in explanation.operators], "unknown": [o.name for o in unknown]}
    rows = table("operator", "#count", "rule", "first in")
    for o in explanation.operators:
        rows.add_row(o.name, str(o.count), "yes" if o.rule else Text("no", "bold red"), Text(_where(o.first)))
    last = f"{total - len(unknown)} of {total} operators have a rule"
    if unknown:
        last += "; what the others touch stays whole. fxprune.register_rule adds a rule"
    return Answer(data, [rows, last])


# ---------------------------------------------------------------------- bench
@command
def bench(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="What `fxprune compile` saved.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help=f"The dense model: {_MODEL_HELP}", show_default=False)],
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


# ---------------------------------------------------------------------- lists
@command
def criteria(as_json: Json = False) -> Answer:
    """List the criteria and allocations that a recipe can name."""
    passes.load()
    scores = {n: first_sentence(passes.CRITERIA[n].score.__doc__) for n in passes.CRITERIA}
    needs = {n: sorted(passes.CRITERIA[n].needs) for n in passes.CRITERIA}
    spread = {n: first_sentence(passes.ALLOCATORS[n].__doc__) for n in passes.ALLOCATORS}
    rows = table("criterion", "what a unit is worth", "what that takes")
    for name, about in scores.items():
        rows.add_row(name, Text(about), Text("; ".join(NEEDS[n] for n in needs[name]) or "no data"))
    more = table("allocation", "how many units each group keeps")
    for name, about in spread.items():
        more.add_row(name, Text(about))
    return Answer({"criteria": scores, "needs": needs, "allocations": spread}, [rows, more])


@command
def backends(as_json: Json = False) -> Answer:
    """List the backends, and why those that cannot be used here cannot."""
    states = backend_states()
    return Answer({"backends": [asdict(s) for s in states]}, [_backends()])


def _backends() -> Table:
    rows = table("backend", "what it is", "usable here")
    for s in backend_states():
        rows.add_row(s.name, Text(s.about), "yes" if s.problem is None else Text(f"no: {s.problem}"))
    return rows


@command
def doctor(as_json: Json = False) -> Answer:
    """Show versions, and each backend or the reason why it cannot be used."""
    with Progress().running() as progress:
        progress("look at the packages")
        found = diagnose()
    packages = table("package", "version", "needed by", "problem")
    for p in found.packages:
        packages.add_row(p.name, p.version or "not installed", p.needed_by, Text(p.problem or ""))
    head = (
        f"fxprune {found.fxprune}, Python {found.python}, {found.system}, {found.cpus} CPUs, "
        f"{found.threads} torch threads, {found.gpu or 'no CUDA device'}"
    )
    return Answer(found.to_json(), [head, packages, _backends()])


def main() -> None:
    """Run the command line; what the script `fxprune` calls."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
