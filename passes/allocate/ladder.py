"""The common search: widths are raised step by step in an order, as far as the budget goes.

Every allocator that ranks its steps uses it. Starting from the floor, a *rung* widens one group by one step; the rungs
are taken in order, and the longest run of them that stays within the budget is found by bisection. Afterwards single
rungs that still fit are taken out of turn, so that the target is met within one unit's worth.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.axes import Axis
from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import Group
from fxprune.passes.registries import Budget


@dataclass(frozen=True, slots=True)
class Rung:
    """Widening `group` to `count` units; rungs of one group must come with growing counts."""

    group: Group
    count: int


def widths(group: Group, budget: Budget) -> list[int]:
    """Return the counts a group may keep, ascending: multiples of its step from its floor on, and all of it."""
    step, least = budget.step[group.name], budget.least[group.name]
    counts = [n for n in range(step, group.size + 1, step) if n >= least]
    return counts if counts and counts[-1] == group.size else [*counts, group.size]


def climb(groups: list[Group], order: list[Rung], costs: Costs, budget: Budget) -> dict[str, int]:
    """Return the kept units by group name.

    Raises:
        TargetError: even the floor of every group costs more than the budget.
    """
    lowest = {g.axis: widths(g, budget)[0] for g in groups}
    dense = costs.of(budget.kind, {})
    allowed = budget.share * dense

    def counts(number: int) -> dict[Axis, int]:
        return {**lowest, **{rung.group.axis: rung.count for rung in order[:number]}}

    def cost(number: int) -> int:
        return costs.of(budget.kind, counts(number))

    if cost(0) > allowed:
        raise TargetError(
            f"the target of {budget.share:.3g} of the {budget.kind} cannot be reached: with every group at its floor, "
            f"{cost(0) / dense:.3g} are left"
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= allowed else (low, middle - 1)
    kept, total = counts(low), cost(low)
    full: set[Axis] = set()
    for rung in order[low:]:
        axis = rung.group.axis
        if axis in full:
            continue
        growth = costs.change(budget.kind, axis, kept, rung.count)
        if total + growth <= allowed:
            kept[axis], total = rung.count, total + growth
        else:
            full.add(axis)
    return {g.name: kept[g.axis] for g in groups}
