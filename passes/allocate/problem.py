"""Widths as a problem of numbers: items with options, what each option loses, tables of what few items cost together.

`relax` solves it for any tables, without promise; `passes/allocate/chain.py` solves it exactly where the tables tie few
items together at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.knapsack import losses as lost
from fxprune.passes.statistics import Scores

Floats = npt.NDArray[np.float64]
Scope = tuple[int, ...]

#: No table has more entries; costs of more combinations than these are not tabulated.
MAX_ENTRIES = 1 << 23
#: Bisections of the price of a unit of cost.
_BISECTIONS = 40
#: Sweeps over all items at one price.
_SWEEPS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Choose one option of each item: the least total loss whose total cost stays within the budget.

    Attributes:
        losses: of each item, (options,).
        tables: items, ascending -> what their options cost together, one dimension for each of the items. The cost of a
            choice is the sum over all tables.
        budget: the most that a choice may cost.
    """

    losses: Sequence[Floats]
    tables: Mapping[Scope, Floats]
    budget: float

    def loss(self, choice: Sequence[int]) -> float:
        """Return what a choice loses."""
        return float(sum(loss[i] for loss, i in zip(self.losses, choice, strict=True)))

    def cost(self, choice: Sequence[int]) -> float:
        """Return what a choice costs."""
        return float(sum(table[tuple(choice[i] for i in scope)] for scope, table in self.tables.items()))

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice stays within the budget."""
        return self.cost(choice) <= self.budget

    def within(self, options: Sequence[npt.NDArray[np.int64]]) -> Problem:
        """Return the problem with some of the options only."""
        tables = {scope: table[np.ix_(*(options[i] for i in scope))] for scope, table in self.tables.items()}
        return Problem([loss[o] for loss, o in zip(self.losses, options, strict=True)], tables, self.budget)

    def scopes(self) -> list[list[Scope]]:
        """Return the scopes that each item is in."""
        result: list[list[Scope]] = [[] for _ in self.losses]
        for scope in self.tables:
            for i in scope:
                result[i].append(scope)
        return result

    def row(self, item: int, choice: Sequence[int], scopes: Sequence[Scope]) -> Floats:
        """Return what each option of an item costs in these scopes, where the others are as chosen."""
        total = np.zeros(len(self.losses[item]))
        for scope in scopes:
            total += self.tables[scope][tuple(slice(None) if i == item else choice[i] for i in scope)]
        return total


def tabulate(
    groups: Sequence[Group],
    options: Mapping[str, Sequence[int]],
    scores: Mapping[str, Scores],
    costs: Costs,
    kind: str,
    budget: float,
) -> Problem | None:
    """Return the problem of a model's widths; None where the cost is no sum, or a table of it would be too large.

    Args:
        options: group name -> its widths.
        budget: the most that all may cost, in the units of `kind`.
    """
    terms = costs.terms(kind)
    if terms is None:
        return None
    places = {g.axis: i for i, g in enumerate(groups)}
    tables: dict[Scope, Floats] = {}
    for term in terms:
        axes = sorted((a for a in term.axes if a in places), key=places.__getitem__)
        scope = tuple(places[a] for a in axes)
        shape = tuple(len(options[groups[i].name]) for i in scope)
        if np.prod([float(n) for n in shape]) > MAX_ENTRIES:
            return None
        counts = {}
        for dim, (axis, i) in enumerate(zip(axes, scope, strict=True)):
            column = np.array(options[groups[i].name], dtype=np.float64)
            counts[axis] = column.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        table = np.broadcast_to(np.asarray(term.cost(counts), dtype=np.float64), shape)
        tables[scope] = tables[scope] + table if scope in tables else table.copy()
    return Problem([lost(g, scores[g.name], options[g.name]) for g in groups], tables, budget)


def relax(problem: Problem, start: Sequence[int]) -> list[int]:
    """Return a choice within the budget that no other choice of one or two items' options improves.

    A price of cost is bisected; at each price loss + price * cost is descended item by item, from all items at their
    dearest, all at their cheapest and where the last price ended (Everett, "Generalized Lagrange Multiplier Method",
    1963). The best choice within the budget is mended by `repair`.

    Args:
        start: a choice within the budget.
    """
    scopes = problem.scopes()
    wide = [len(loss) - 1 for loss in problem.losses]
    narrow = [0] * len(wide)
    best, value = list(start), problem.loss(start)
    low, high = 0.0, max(value, 1e-12) / max(abs(problem.budget), 1e-12)
    last, bracketed = list(start), False
    for _ in range(_BISECTIONS):
        price = (low + high) / 2 if bracketed else high
        found = [_descend(problem, price, begin, scopes) for begin in (wide, narrow, last)]
        last = min(found, key=lambda c: problem.loss(c) + price * problem.cost(c))
        for choice in found:
            if problem.fits(choice) and problem.loss(choice) < value:
                best, value = choice, problem.loss(choice)
        if problem.fits(last):
            high, bracketed = price, True
        elif bracketed:
            low = price
        else:
            low, high = high, high * 4
    return repair(problem, best)


def _descend(problem: Problem, price: float, begin: Sequence[int], scopes: Sequence[Sequence[Scope]]) -> list[int]:
    """Each item in turn takes its best option for loss + price * cost, until none changes."""
    choice = list(begin)
    for _ in range(_SWEEPS):
        changed = False
        for i, loss in enumerate(problem.losses):
            total = loss + price * problem.row(i, choice, scopes[i])
            option = int(np.argmin(total))
            if total[option] < total[choice[i]] - 1e-15 * abs(total[choice[i]]):
                choice[i], changed = option, True
        if not changed:
            break
    return choice


def repair(problem: Problem, start: Sequence[int]) -> list[int]:
    """Return a choice within the budget that loses no more: one item changes, or one changes and another makes room.

    Args:
        start: a choice within the budget.
    """
    scopes, choice = problem.scopes(), list(start)
    items = range(len(choice))
    while True:
        spent = problem.cost(choice)
        value, move = -1e-12 * max(problem.loss(choice), 1e-300), {}  # a gain smaller than rounding is none
        rows = {j: _growth(problem, j, choice, scopes) for j in items}
        for i in items:
            gains, growth = problem.losses[i] - problem.losses[i][choice[i]], rows[i]
            alone = np.where(spent + growth <= problem.budget, gains, np.inf)
            if alone.min() < value:
                value, move = float(alone.min()), {i: int(alone.argmin())}
            option = choice[i] + 1  # by one step at a time where another has to make room
            if option == len(gains) or spent + growth[option] <= problem.budget:
                continue
            near = {j for scope in scopes[i] for j in scope} - {i}
            widened = list(choice)
            widened[i] = option
            for j in items:
                if j == i:
                    continue
                after = _growth(problem, j, widened, scopes) if j in near else rows[j]
                both = gains[option] + problem.losses[j] - problem.losses[j][choice[j]]
                both = np.where(spent + growth[option] + after <= problem.budget, both, np.inf)
                if both.min() < value:
                    value, move = float(both.min()), {i: option, j: int(both.argmin())}
        changed = list(choice)
        for i, option in move.items():
            changed[i] = option
        if not move or not problem.fits(changed):
            return choice
        choice = changed


def _growth(problem: Problem, item: int, choice: Sequence[int], scopes: Sequence[Sequence[Scope]]) -> Floats:
    """By how much the cost grows with each option of an item."""
    row = problem.row(item, choice, scopes[item])
    growth: Floats = row - row[choice[item]]
    return growth
