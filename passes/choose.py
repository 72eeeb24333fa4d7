"""From groups and a recipe to what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from fxprune import passes
from fxprune.analyse import Analysis
from fxprune.costs import Costs
from fxprune.errors import NonFiniteError, TargetError
from fxprune.groups import Group, frozen_dimensions
from fxprune.kept import Indices, Kept
from fxprune.passes.calibration import Calibration
from fxprune.passes.registries import ALLOCATORS, CRITERIA, Allocator, Budget, Criterion, name_of, with_options
from fxprune.passes.statistics import Scores, Statistics
from fxprune.passes.trial import trial
from fxprune.recipe import Recipe
from fxprune.select import Say, limits, say


@dataclass(slots=True)
class Chooser:
    """What can be cut, scored once; `kept` chooses for any budget.

    Attributes:
        eligible: groups that may be cut.
        scores: of their units, by name.
    """

    analysis: Analysis
    groups: list[Group]
    recipe: Recipe
    costs: Costs
    multiple: int
    allocate: Allocator
    eligible: list[Group]
    scores: dict[str, Scores]
    said: Mapping[str, Say]
    statistics: Statistics
    error: Callable[[Kept], float] | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def budget(self, kind: str, share: float) -> Budget:
        """Return what may be kept, with the limits that recipe and groups set."""
        steps = {g.name: step(g, self.multiple) for g in self.eligible}
        own = {g.name: limits(g, self.said[g.name], steps[g.name]) for g in self.eligible if g.name in self.said}
        least = {g.name: max(g.least, math.ceil(self.recipe.floor * g.size)) for g in self.eligible}
        least |= {name: few for name, (few, _) in own.items()}
        error = self.error
        trial = None if error is None else lambda counts: error(self.best(counts))
        return Budget(kind, share, steps, least, own, trial, self.recipe.seed, self.memory)

    def kept(self, kind: str, share: float) -> Kept:
        """Allocate a share of a cost and keep the best units of each group.

        Raises:
            TargetError: the target cannot be reached; the text says what can be, and what stands in the way.
        """
        budget = self.budget(kind, share)
        try:
            counts = self.allocate(self.eligible, self.scores, self.costs, budget)
        except TargetError as error:
            why = _obstacles(self.analysis, self.groups, self.recipe, self.said, self.multiple)
            raise TargetError(f"{error}.\n{why}") from None
        for name, (few, most) in budget.limits.items():  # an allocation that knows nothing of limits
            counts[name] = min(max(counts[name], few), most)
        return self.best(counts)

    def best(self, counts: Mapping[str, int]) -> Kept:
        """Return the best units of each group."""
        return Kept({g.axis: _best(self.scores[g.name], counts[g.name]) for g in self.eligible})


def chooser(
    analysis: Analysis,
    groups: list[Group],
    recipe: Recipe,
    costs: Costs,
    multiple: int,
    whole: Mapping[str, str] | None = None,
    data: Calibration | None = None,
    model: nn.Module | None = None,
) -> Chooser:
    """Score the units of all eligible groups.

    Args:
        multiple: what widths are rounded to, see `step`.
        whole: names of further groups that stay whole, and why.
        data: calibration batches, for criteria that need them.
        model: the original, for allocations that try models on the data.

    Raises:
        RecipeError: the criterion, the allocation or one of their options is unknown; `keep` or `ratios` match nothing,
            or contradict each other.
        InputError: the criterion needs data and there are none.
    """
    criterion, allocate = functions(recipe, data is not None)
    said = say(analysis, groups, recipe)
    eligible = [g for g in groups if not (g.name in said and said[g.name].whole) and g.name not in (whole or {})]
    statistics = Statistics(analysis, recipe.seed, data, recipe.max_memory)
    scores = score(criterion, eligible, statistics)
    result = Chooser(analysis, groups, recipe, costs, multiple, allocate, eligible, scores, said, statistics)
    if data is not None and model is not None:
        result.error = _when_called(lambda: trial(analysis, model, data, recipe.max_memory))
    return result


def _when_called(make: Callable[[], Callable[[Kept], float]]) -> Callable[[Kept], float]:
    """A function that is made at its first call."""
    made: list[Callable[[Kept], float]] = []

    def call(kept: Kept) -> float:
        if not made:
            made.append(make())
        return made[0](kept)

    return call


def choose(
    analysis: Analysis,
    groups: list[Group],
    recipe: Recipe,
    costs: Costs,
    multiple: int,
    whole: Mapping[str, str] | None = None,
    data: Calibration | None = None,
) -> Kept:
    """Score, allocate the recipe's budget, keep the best of each group: see `chooser` and `Chooser.kept`."""
    return chooser(analysis, groups, recipe, costs, multiple, whole, data).kept(*recipe.target.cost)


def score(criterion: Criterion, groups: list[Group], statistics: Statistics) -> dict[str, Scores]:
    """Return the scores of all groups by name, gathering what the criterion needs for a few groups at a time.

    Raises:
        InputError: the criterion needs data and there are none.
        NonFiniteError: a score is NaN or infinite.
    """
    scores: dict[str, Scores] = {}
    for part in statistics.parts(groups, criterion.needs):
        statistics.gather(part, criterion.needs)
        for group in part:
            scores[group.name] = criterion.score(group, statistics)
            if not np.isfinite(scores[group.name]).all():
                raise NonFiniteError(f"{group.name}: a score is NaN or infinite")
        statistics.free()
    return scores


def functions(recipe: Recipe, data: bool = False) -> tuple[Criterion, Allocator]:
    """Return the criterion and the allocator that a recipe names, with their options.

    Args:
        data: there are calibration data; decides what "auto" is.

    Raises:
        RecipeError: there is no such name or option.
    """
    passes.load()
    chosen = {"criterion": recipe.criterion, "allocation": recipe.allocation}
    best = dict(zip(chosen, ("obs", "knapsack") if data else ("magnitude", "uniform"), strict=True))
    named = {kind: best[kind] if setting == "auto" else setting for kind, setting in chosen.items()}
    criterion, allocation = name_of(named["criterion"], "criterion"), name_of(named["allocation"], "allocation")
    return (
        CRITERIA[criterion].bound(named["criterion"]),
        with_options(ALLOCATORS[allocation], named["allocation"], "allocation"),
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
