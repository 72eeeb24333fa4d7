"""From groups and a recipe to what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fxprune import passes
from fxprune.analyse import Analysis
from fxprune.costs import Costs
from fxprune.errors import RecipeError, TargetError
from fxprune.groups import Group, frozen_dimensions, matches
from fxprune.kept import Indices, Kept
from fxprune.passes.registries import ALLOCATORS, CRITERIA, Budget, name_of, with_options
from fxprune.passes.statistics import Scores, Statistics
from fxprune.recipe import Recipe


def choose(
    analysis: Analysis,
    groups: list[Group],
    recipe: Recipe,
    costs: Costs,
    multiple: int,
    whole: Mapping[str, str] | None = None,
) -> Kept:
    """Score the units of all eligible groups, allocate the budget, keep the best of each group.

    Args:
        multiple: what widths are rounded to, see `step`.
        whole: names of further groups that stay whole, and why.

    Raises:
        RecipeError: the criterion, the allocation or one of their options is unknown; `keep` matches nothing.
        TargetError: the target cannot be reached; the text says what can be, and what stands in the way.
    """
    passes.load()
    criterion_name = name_of(recipe.criterion, "criterion")
    score = with_options(CRITERIA[criterion_name].score, recipe.criterion, "criterion")
    allocate = with_options(ALLOCATORS[name_of(recipe.allocation, "allocation")], recipe.allocation, "allocation")
    eligible = [g for g in groups if blocked(g, recipe) is None and g.name not in (whole or {})]
    _check_globs(analysis, recipe)
    kind, share = recipe.target.cost
    steps = {g.name: step(g, multiple) for g in eligible}
    least = {g.name: max(g.least, math.ceil(recipe.floor * g.size)) for g in eligible}
    statistics = Statistics(analysis, recipe.seed)
    scores = {g.name: score(g, statistics) for g in eligible}
    try:
        counts = allocate(eligible, scores, costs, Budget(kind, share, steps, least))
    except TargetError as error:
        raise TargetError(f"{error}.\n{_obstacles(analysis, groups, recipe, costs, multiple)}") from None
    return Kept({g.axis: _best(scores[g.name], counts[g.name]) for g in eligible})


def _best(scores: Scores, count: int) -> Indices:
    """The indices of the highest scores, ascending; of equal ones the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order)


def step(group: Group, multiple: int) -> int:
    """Return the number of units by which a group shrinks, so that its width stays a multiple of `multiple`.

    A unit may be several entries wide (a head), which counts towards the multiple. The step is halved until it leaves
    at least one smaller width to choose.

    >>> from fxprune.axes import Axis
    >>> [step(Group("g", Axis(n), "hidden", (), inner), 8) for n, inner in [(64, 1), (12, 64), (12, 1), (8, 1)]]
    [8, 1, 4, 4]
    """
    units = multiple // math.gcd(multiple, group.inner)
    while units > 1 and group.size < 2 * units:
        units = (units + 1) // 2
    return units


def blocked(group: Group, recipe: Recipe) -> str | None:
    """Return why the recipe leaves a group whole, or None."""
    if recipe.groups is not None and group.kind not in recipe.groups:
        return f"the recipe cuts {', '.join(recipe.groups)} only, and this is of kind {group.kind}"
    for name, _ in group.members:
        if matches(name, list(recipe.keep)):
            return f"it cuts '{name}', which the recipe keeps"
    return None


def _check_globs(analysis: Analysis, recipe: Recipe) -> None:
    names = [*analysis.tensors, *analysis.captured.aliases]
    for glob in recipe.keep:
        if not any(matches(name, [glob]) for name in names):
            raise RecipeError(f"recipe: keep: '{glob}' matches no module and no parameter of the model")


def _obstacles(analysis: Analysis, groups: list[Group], recipe: Recipe, costs: Costs, multiple: int) -> str:
    """What stands in the way of a target: groups that the recipe keeps, and the largest frozen dimensions."""
    lines = []
    kept = [(g, why) for g in groups if (why := blocked(g, recipe))]
    lines += [f"  {g.name} ({g.size} units): {why}" for g, why in kept[:5]]
    tensors = analysis.captured.tensors
    frozen = sorted(frozen_dimensions(analysis), key=lambda w: -tensors[w.tensor].numel())
    lines += [f"  {w.tensor}, dimension {w.dim} ({w.size}): {w.reason}" for w in frozen[:5]]
    if multiple > 1:
        lines.append(
            f"  widths are multiples of {multiple} (round_to), and no group keeps less than {recipe.floor:.0%} (floor)"
        )
    return "What stands in the way:\n" + "\n".join(lines)
