"""A selection that the model's own class can express: found by trying, from the most freedom to the least.

First what the recipe asks for; then groups of one form alike; then a narrower model of the same family (every group by
exactly the same share, heads whole); then, one after another, what the failing lines of code touch stays whole.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import nn

from fxprune.analyse import Analysis
from fxprune.axes import atoms
from fxprune.costs import Costs
from fxprune.errors import TargetError, WriteBackError
from fxprune.groups import Group
from fxprune.kept import Kept
from fxprune.recipe import Recipe
from fxprune.rewrite import rewrite
from fxprune.writeback import module_like

#: So many times groups are given up because of a line of code.
_ROUNDS = 6
_STRICT = {"name": "width", "strict": True}


def choose_for_class(
    model: nn.Module, analysis: Analysis, groups: list[Group], recipe: Recipe, costs: Costs, multiple: int
) -> tuple[Kept, list[str]]:
    """Return what is kept, and notes on what was given up for the class.

    Raises:
        WriteBackError: no selection that reaches the target can be expressed; the text has the last line in the way.
        TargetError: the target cannot be reached at all.
    """
    from fxprune.passes.choose import choose

    failure: WriteBackError | None = None
    attempts = _attempts(analysis, groups, recipe)
    attempt = next(attempts)
    while attempt is not None:
        settings, whole, notes = attempt
        try:
            kept = choose(analysis, groups, settings, costs, multiple, whole)
            module_like(model, analysis, kept, rewrite(analysis, kept, model).module, recipe.seed)
            return kept, notes
        except TargetError:
            if failure is None:
                raise
        except WriteBackError as error:
            failure = error
        assert failure is not None
        attempt = attempts.send(failure)
    assert failure is not None
    raise WriteBackError(
        f"no selection that reaches the target can be expressed by {type(model).__name__} itself. {failure}\n  Compile "
        "without `keep_class`: the graph module has no such limits.",
        failure.nodes,
    )


def _attempts(
    analysis: Analysis, groups: list[Group], recipe: Recipe
) -> Generator[tuple[Recipe, dict[str, str], list[str]] | None, WriteBackError, None]:
    """(recipe, groups to leave whole and why, notes) of each attempt, then None; is sent the last attempt's failure."""
    failure = yield recipe, {}, []
    allocations: list[Any] = [a for a in ("uniform", "width", _STRICT) if a != recipe.allocation]
    for allocation in allocations:
        why = f"widths are those of allocation {allocation}: the class cannot express those of {recipe.allocation}"
        failure = yield recipe.model_copy(update={"allocation": allocation}), {}, [why]
    whole: dict[str, str] = {}
    for _ in range(_ROUNDS):
        touched = {axis for name in failure.nodes for axis in _axes(analysis, name)}
        found = {
            g.name: "the class cannot express it smaller" for g in groups if g.axis in touched and g.name not in whole
        }
        if not found:
            break
        whole |= found
        notes = [f"'{name}' stays whole, because {why}" for name, why in whole.items()]
        for allocation in [*allocations, recipe.allocation]:
            failure = yield recipe.model_copy(update={"allocation": allocation}), dict(whole), notes
    yield None


def _axes(analysis: Analysis, name: str) -> set[Any]:
    """The axes that a node's operands and results have."""
    node = next(n for n in analysis.captured.graph.nodes if n.name == name)
    found = set()
    for n in [node, *node.all_input_nodes]:
        dims = analysis.dims[n]
        for ds in dims if isinstance(dims, list) else [dims]:
            found |= {axis for d in ds for axis in atoms(d)}
    return found
