"""The common search: widths are raised step by step in an order, as far as the budget goes.

Every allocator that ranks its steps uses it. Starting from the floor, a *rung* widens one group, or several at once, by
one step; the rungs are taken in order, and the longest run of them that stays within the budget is found by bisection.
Afterwards single rungs that still fit are taken out of turn, so that the target is met within one rung's worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm

from fxprune.axes import Axis
from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import Group
from fxprune.passes.registries import Budget

#: Axes and the numbers of units that they are widened to; those of one axis must come with growing numbers.
Rung = Mapping[Axis, int]


def widths(groups: Sequence[Group], budget: Budget) -> list[int]:
    """Return the counts that groups of one size may keep alike, ascending: multiples of their steps from the floor on,
    and all.
    """
    size = groups[0].size
    step, least = lcm(*(budget.step[g.name] for g in groups)), max(budget.least[g.name] for g in groups)
    most = min((budget.limits[g.name][1] for g in groups if g.name in budget.limits), default=size)
    counts = [n for n in range(step, most + 1, step) if n >= least]
    if counts and (counts[-1] == size or most < size):
        return counts
    return [*counts, most]


def climb(lowest: Mapping[Axis, int], order: Sequence[Rung], costs: Costs, budget: Budget) -> dict[Axis, int]:
    """Return the kept units of every axis in `lowest`, which says where each begins.

    Raises:
        TargetError: even the floor of every group costs more than the budget.
    """
    dense = costs.of(budget.kind, {})
    allowed = budget.share * dense

    def counts(number: int) -> dict[Axis, int]:
        kept = dict(lowest)
        for rung in order[:number]:
            kept.update(rung)
        return kept

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
        if full & rung.keys():
            continue
        growth = costs.change(budget.kind, rung, kept)
        if total + growth <= allowed:
            kept.update(rung)
            total += growth
        else:
            full |= rung.keys()
    return kept
