"""`fxprune criteria`, `fxprune backends` and `fxprune doctor`: what there is to choose from, and what works here."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from fxprune import passes
from fxprune.cli.console import Answer, Progress, command, table
from fxprune.cli.options import Json
from fxprune.doctor import backend_states, diagnose, first_sentence
from fxprune.passes.patterns import METHODS
from fxprune.passes.statistics import NEEDS


@command
def criteria(as_json: Json = False) -> Answer:
    """List the criteria, allocations and ways to choose masks that a recipe can name."""
    passes.load()
    masks = {n: first_sentence(METHODS[n].choose.__doc__) for n in METHODS}
    scores = {n: first_sentence(passes.CRITERIA[n].score.__doc__) for n in passes.CRITERIA}
    needs = {n: sorted(passes.CRITERIA[n].needs) for n in passes.CRITERIA}
    spread = {n: first_sentence(passes.ALLOCATORS[n].__doc__) for n in passes.ALLOCATORS}
    rows = table("criterion", "what a unit is worth", "what that takes")
    for name, about in scores.items():
        rows.add_row(name, Text(about), Text("; ".join(NEEDS[n] for n in needs[name]) or "no data"))
    more = table("allocation", "how many units each group keeps")
    for name, about in spread.items():
        more.add_row(name, Text(about))
    patterns = table("sparsity method", "which weights stay in a pattern", "what that takes")
    for name, about in masks.items():
        patterns.add_row(name, Text(about), "data: second moments" if METHODS[name].data else "no data")
    found = {"criteria": scores, "needs": needs, "allocations": spread, "sparsity": masks}
    return Answer(found, [rows, more, patterns])


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
