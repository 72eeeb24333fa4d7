"""`fxprune explain` and `fxprune ops`: what can be cut, what stays whole and why, and which operators have rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from fxprune.cli.console import Answer, Progress, command, table
from fxprune.cli.options import Groups, Inputs, Json, Keep, Model, Ratios, parse_ratios
from fxprune.explain import Coupling, Explainer, Explanation, FrozenInfo, GroupInfo, OperatorInfo, Step
from fxprune.recipe import read_recipe
from fxprune.sources import describe_inputs, resolve


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
