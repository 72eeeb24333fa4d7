"""From groups and a recipe to what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from fxprune import passes
from fxprune.analyse import Analysis
from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import Group, frozen_dimensions
from fxprune.kept import Indices, Kept
from fxprune.passes.registries import ALLOCATORS, CRITERIA, Allocator, Budget, name_of, with_options
from fxprune.passes.statistics import Scores, Statistics
from fxprune.recipe import Recipe
from fxprune.select import Say, limits, say


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
        RecipeError: the criterion, the allocation or one of their options is unknown; `keep` or `ratios` match nothing,
            or contradict each other.
        TargetError: the target cannot be reached; the text says what can be, and what stands in the way.
    """
    score, allocate = functions(recipe)
    said = say(analysis, groups, recipe)
    eligible = [g for g in groups if not (g.name in said and said[g.name].whole) and g.name not in (whole or {})]
    kind, share = recipe.target.cost
    steps = {g.name: step(g, multiple) for g in eligible}
    own = {g.name: limits(g, said[g.name], steps[g.name]) for g in eligible if g.name in said}
    least = {g.name: max(g.least, math.ceil(recipe.floor * g.size)) for g in eligible}
    least |= {name: few for name, (few, _) in own.items()}
    statistics = Statistics(analysis, recipe.seed)
    scores = {g.name: score(g, statistics) for g in eligible}
    try:
        counts = allocate(eligible, scores, costs, Budget(kind, share, steps, least, own))
    except TargetError as error:
        raise TargetError(f"{error}.\n{_obstacles(analysis, groups, recipe, said, multiple)}") from None
    for name, (few, most) in own.items():  # an allocation that knows nothing of limits
        counts[name] = min(max(counts[name], few), most)
    return Kept({g.axis: _best(scores[g.name], counts[g.name]) for g in eligible})


def functions(recipe: Recipe) -> tuple[Callable[..., Scores], Allocator]:
    """Return the criterion and the allocator that a recipe names, with their options.

    Raises:
        RecipeError: there is no such name or option.
    """
    passes.load()
    criterion, allocation = name_of(recipe.criterion, "criterion"), name_of(recipe.allocation, "allocation")
    return (
        with_options(CRITERIA[criterion].score, recipe.criterion, "criterion"),
        with_options(ALLOCATORS[allocation], recipe.allocation, "allocation"),
    )


def _best(scores: Scores, count: int) -> Indices:
    """The indices of the highest scores, ascending; of equal ones the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order)


def preferred(recipe: Recipe) -> int:
    """Return what widths are rounded to: `round_to`, or what the backend runs fast."""
    from fxprune.backends import BACKENDS

    return recipe.round_to or BACKENDS[recipe.backend].preferred_multiple


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


def _obstacles(analysis: Analysis, groups: list[Group], recipe: Recipe, said: Mapping[str, Say], multiple: int) -> str:
    """What stands in the way of a target: groups that the recipe keeps, and the largest frozen dimensions."""
    lines = []
    why = {name: s.whole or s.why for name, s in said.items()}
    lines += [f"  {g.name} ({g.size} units): {why[g.name]}" for g in groups if g.name in why][:5]
    tensors = analysis.captured.tensors
    frozen = sorted(frozen_dimensions(analysis), key=lambda w: -tensors[w.tensor].numel())
    lines += [f"  {w.tensor}, dimension {w.dim} ({w.size}): {w.reason}" for w in frozen[:5]]
    if multiple > 1:
        lines.append(
            f"  widths are multiples of {multiple} (round_to), and no group keeps less than {recipe.floor:.0%} (floor)"
        )
    return "What stands in the way:\n" + "\n".join(lines)
