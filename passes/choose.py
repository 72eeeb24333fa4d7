"""From groups and a recipe to what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune import passes
from fxprune.analyse import Analysis
from fxprune.blocks import Block, find_blocks, live, tensors_of
from fxprune.costs import Costs
from fxprune.errors import NonFiniteError, TargetError
from fxprune.groups import Group, frozen_dimensions
from fxprune.kept import Indices, Kept
from fxprune.passes.calibration import Calibration
from fxprune.passes.depth import DEPTHS, ranking
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
    criterion: Criterion | None = None
    _order: list[Block] = field(default_factory=list)
    _further: Iterator[Block] | None = None

    def budget(self, kind: str, share: float, removed: Mapping[fx.Node, fx.Node] | None = None) -> Budget:
        """Return what may be kept, with the limits that recipe and groups set; `removed` blocks are gone already."""
        steps = {g.name: step(g, self.multiple) for g in self.eligible}
        own = {g.name: limits(g, self.said[g.name], steps[g.name]) for g in self.eligible if g.name in self.said}
        least = {g.name: max(g.least, math.ceil(self.recipe.floor * g.size)) for g in self.eligible}
        least |= {name: few for name, (few, _) in own.items()}
        error = self.error
        gone = dict(removed or {})
        trial = None if error is None else lambda counts: error(self.best(counts, gone))
        return Budget(kind, share, steps, least, own, trial, self.recipe.seed, self.memory)

    def kept(self, kind: str, share: float) -> Kept:
        """Allocate a share of a cost and keep the best units of each group.

        Raises:
            TargetError: the target cannot be reached; the text says what can be, and what stands in the way.
        """
        removed = self.removed(kind, share)
        costs = self.costs.without(removed)
        if removed:
            share = min(share * self.costs.of(kind, {}) / max(costs.of(kind, {}), 1e-300), 1.0)
        budget = self.budget(kind, share, removed)
        groups = self.left(removed)
        try:
            counts = self.allocate(groups, self.scores, costs, budget)
        except TargetError as error:
            why = _obstacles(self.analysis, self.groups, self.recipe, self.said, self.multiple)
            raise TargetError(f"{error}.\n{why}") from None
        for name, (few, most) in budget.limits.items():  # an allocation that knows nothing of limits
            if name in counts:
                counts[name] = min(max(counts[name], few), most)
        kept = self.best(counts, removed)
        return kept if self.criterion is None or self.criterion.refine is None else self._refined(kept, groups)

    def _refined(self, kept: Kept, groups: list[Group]) -> Kept:
        """As many units of each group, chosen for their number."""
        assert self.criterion is not None
        assert self.criterion.refine is not None
        found = dict(kept.items())
        cut = [g for g in groups if g.axis in kept]
        for part in self.statistics.parts(cut, self.criterion.needs):
            self.statistics.gather(part, self.criterion.needs)
            for group in part:
                found[group.axis] = np.sort(self.criterion.refine(group, self.statistics, kept[group.axis]))
            self.statistics.free()
        return Kept(found, kept.removed)

    def best(self, counts: Mapping[str, int], removed: Mapping[fx.Node, fx.Node] | None = None) -> Kept:
        """Return the best units of each group that has a count."""
        groups = [g for g in self.eligible if g.name in counts]
        return Kept({g.axis: _best(self.scores[g.name], counts[g.name]) for g in groups}, removed)

    def left(self, removed: Mapping[fx.Node, fx.Node]) -> list[Group]:
        """Return the groups of which something is left without some blocks."""
        if not removed:
            return self.eligible
        used = tensors_of(live(self.analysis, removed))
        return [g for g in self.eligible if any(name in used for name, _ in g.members)]

    def removed(self, kind: str, share: float) -> dict[fx.Node, fx.Node]:
        """Return the blocks that go: as many as the recipe says, or as do not overshoot the share of the cost.

        Raises:
            InputError: blocks are to go, and there are no calibration data.
            TargetError: fewer blocks can go than the recipe says.
        """
        setting = self.recipe.blocks
        if setting == "none":
            return {}
        number = None if isinstance(setting, str) else setting.get("remove")
        gone: dict[fx.Node, fx.Node] = {}
        for block in self._blocks():
            if number is not None and len(gone) == number:
                break
            more = {**gone, block.total: block.stream}
            if number is None and self.costs.without(more).of(kind, {}) < share * self.costs.of(kind, {}):
                break
            gone = more
        if number is not None and len(gone) < number:
            raise TargetError(f"the recipe removes {number} blocks, and only {len(gone)} can go")
        return gone

    def _blocks(self) -> Iterator[Block]:
        """The blocks that may go, in their order; found as far as they are asked for."""
        if self._further is None:
            whole = [g for g in self.groups if g.name in self.said and self.said[g.name].whole]
            blocks = [
                b
                for b in find_blocks(self.analysis)
                if not any(all(name in b.parameters for name, _ in g.members) for g in whole)
            ]
            self._further = ranking(self.recipe.blocks, blocks, self.analysis, self.statistics.data, self.error)
        yield from self._order
        for block in self._further:
            self._order.append(block)
            yield block


def chooser(
    analysis: Analysis,
    groups: list[Group],
    recipe: Recipe,
    costs: Costs,
    multiple: int,
    whole: Mapping[str, str] | None = None,
    data: Calibration | None = None,
    model: nn.Module | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Chooser:
    """Score the units of all eligible groups.

    Args:
        multiple: what widths are rounded to, see `step`.
        whole: names of further groups that stay whole, and why.
        data: calibration batches, for criteria that need them.
        model: the original, for allocations that try models on the data.
        progress: called with how far a pass over the data is.

    Raises:
        RecipeError: the criterion, the allocation or one of their options is unknown; `keep` or `ratios` match nothing,
            or contradict each other.
        InputError: the criterion needs data and there are none.
    """
    criterion, allocate = functions(recipe, data is not None)
    said = say(analysis, groups, recipe)
    eligible = [g for g in groups if not (g.name in said and said[g.name].whole) and g.name not in (whole or {})]
    statistics = Statistics(analysis, recipe.seed, data, recipe.max_memory, progress)
    scores = score(criterion, eligible, statistics)
    result = Chooser(analysis, groups, recipe, costs, multiple, allocate, eligible, scores, said, statistics)
    result.criterion = criterion
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
    named = _named(recipe, data)
    if recipe.blocks != "none":
        DEPTHS[name_of(recipe.blocks, "blocks")]
    criterion, allocation = name_of(named["criterion"], "criterion"), name_of(named["allocation"], "allocation")
    return (
        CRITERIA[criterion].bound(named["criterion"]),
        with_options(ALLOCATORS[allocation], named["allocation"], "allocation"),
    )


def _named(recipe: Recipe, data: bool) -> dict[str, Any]:
    """The recipe's criterion and allocation; "auto" is what does best with and without data."""
    chosen = {"criterion": recipe.criterion, "allocation": recipe.allocation}
    best = dict(zip(chosen, ("obs", "knapsack") if data else ("magnitude", "uniform"), strict=True))
    return {kind: best[kind] if setting == "auto" else setting for kind, setting in chosen.items()}


def exact(recipe: Recipe, data: bool) -> Recipe:
    """Return the recipe with what it leaves open written out, so that it says the same in other circumstances, too."""
    from fxprune.passes import reconstruct

    method, _ = reconstruct.settings(recipe, data)
    return recipe.model_copy(
        update={
            **_named(recipe, data),
            "reconstruction": method if recipe.reconstruction == "auto" else recipe.reconstruction,
            "basis": ("principal" if data else "none") if recipe.basis == "auto" else recipe.basis,
            "round_to": preferred(recipe),
            "threads": recipe.threads or torch.get_num_threads(),
        }
    )


def losses(chooser: Chooser, points: int = 9) -> dict[str, list[tuple[int, float]]]:
    """Return what the criterion says is lost when a group alone keeps its best units: (units, loss), all units first.

    The loss is the sum of the scores of the units that go, at so many numbers of units at most.
    """
    result = {}
    for group in chooser.eligible:
        lost = np.concatenate([[0.0], np.cumsum(np.sort(chooser.scores[group.name]))])
        least = min(max(group.least, 1), group.size)
        counts = np.unique(np.linspace(least, group.size, points).round().astype(int))[::-1]
        result[group.name] = [(int(n), float(lost[group.size - n])) for n in counts]
    return result


def _best(scores: Scores, count: int) -> Indices:
    """The indices of the highest scores, ascending; of equal ones the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order)


def preferred(recipe: Recipe) -> int:
    """Return what widths are rounded to: `round_to`, or what the backend runs fast; with n:m a multiple of m."""
    from fxprune.backends import chosen
    from fxprune.passes.patterns.pattern import NOfM, of_recipe

    multiple = recipe.round_to or chosen(recipe.backend).preferred_multiple
    wanted = of_recipe(recipe)
    return math.lcm(multiple, wanted.m) if isinstance(wanted, NOfM) else multiple  # n:m is legal only where m divides


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
