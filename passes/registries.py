"""The registries of criteria and allocators, and how a recipe's options reach them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxprune.costs import Costs
from fxprune.errors import InputError, RecipeError
from fxprune.groups import Group
from fxprune.passes.statistics import Scores, Statistics
from fxprune.registry import Registry, nearest


@dataclass(frozen=True, slots=True)
class Criterion:
    """A scoring function and the statistics that it needs.

    Attributes:
        score: (group, statistics, **options) -> scores of shape (units,), high ones stay.
        needs: names of statistics beyond the weights, of `fxprune.passes.statistics.NEEDS`.
        needing: (**options) -> needs, where options decide them.
        refine: (**options) -> (group, statistics, kept units) -> as many units that are better together, for the number
            that was allocated; None where the best scores are all there is.
    """

    score: Callable[..., Scores]
    needs: frozenset[str] = frozenset()
    needing: Callable[..., Iterable[str]] | None = None
    refine: Callable[..., Any] | None = None

    def bound(self, setting: str | Mapping[str, Any]) -> Criterion:
        """Return the criterion with the options of a recipe entry.

        Raises:
            RecipeError: it has no such option.
        """
        score = with_options(self.score, setting, "criterion")
        options = {} if isinstance(setting, str) else {k: v for k, v in setting.items() if k != "name"}
        refine = self.refine(**options) if self.refine is not None else None
        needs = self.needs if self.needing is None else frozenset(self.needing(**options))
        return Criterion(score, needs, refine=refine)


@dataclass(frozen=True, slots=True)
class Budget:
    """A cost and how much of it may be kept.

    Attributes:
        kind: "macs", "params", "memory" or "latency".
        share: of the dense cost.
        step: group name -> widths are multiples of this many units.
        least: group name -> the fewest units that may be kept.
        limits: group name -> the fewest and the most units, for groups that the recipe gives limits of their own.
        error: group name -> units of every group: what the model's output loses on calibration data; None without data.
        seed: of everything random.
        memory: what an allocator may remember for the next budget, when a target on the clock takes several.
    """

    kind: str
    share: float
    step: Mapping[str, int]
    least: Mapping[str, int]
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    error: Callable[[Mapping[str, int]], float] | None = None
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)


#: (groups, scores by group name, costs, budget, **options) -> kept units by group name.
Allocator = Callable[..., dict[str, int]]

CRITERIA: Registry[Criterion] = Registry("criterion")
ALLOCATORS: Registry[Allocator] = Registry("allocation")


def needs_error(name: str, budget: Budget) -> Callable[[Mapping[str, int]], float]:
    """Return the budget's error function.

    Raises:
        InputError: there are no calibration data to try models on.
    """
    if budget.error is None:
        raise InputError(f"allocation '{name}' tries models on calibration data: pass `calibration`")
    return budget.error


def criterion(
    name: str,
    needs: Iterable[str] | Callable[..., Iterable[str]] = (),
    refine: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Scores]], Callable[..., Scores]]:
    """Register a scoring function as a criterion.

    Args:
        needs: names of statistics beyond the weights, or a function of the criterion's options that returns them.
        refine: see `Criterion`.

    >>> import numpy as np
    >>> from fxprune.passes.registries import CRITERIA, criterion
    >>> @criterion("doc-last")
    ... def last(group, statistics):
    ...     return np.arange(group.size, dtype=float)
    >>> "doc-last" in CRITERIA
    True
    >>> CRITERIA.remove("doc-last")
    """

    def decorate(score: Callable[..., Scores]) -> Callable[..., Scores]:
        needing = needs if callable(needs) else None
        CRITERIA.add(name, Criterion(score, frozenset(needs() if callable(needs) else needs), needing, refine))
        return score

    return decorate


def with_options(function: Callable[..., Any], setting: str | Mapping[str, Any], what: str) -> Callable[..., Any]:
    """Bind the options of a recipe entry such as {"name": "magnitude", "p": 1} to the function it names.

    Raises RecipeError where the function has no such option.
    """
    if isinstance(setting, str):
        return function
    options = {k: v for k, v in setting.items() if k != "name"}
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise RecipeError(
                f"{what} '{setting['name']}' has no option '{option}'{nearest(option, known) or '.'} "
                f"Known: {', '.join(known) or 'none'}"
            )
    return functools.partial(function, **options)


def name_of(setting: str | Mapping[str, Any], what: str) -> str:
    """Return the name in a recipe entry; raises RecipeError where there is none."""
    name = setting if isinstance(setting, str) else setting.get("name")
    if not isinstance(name, str):
        raise RecipeError(f'{what} is a name or {{"name": ..., option: value}}, not {setting!r}')
    return name


__all__ = ["ALLOCATORS", "CRITERIA", "Allocator", "Budget", "Costs", "Criterion", "Group", "Statistics", "criterion"]
