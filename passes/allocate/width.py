"""Width multiplier: every group keeps exactly the same share, and heads stay; a narrower model of the same family.

Every product of sizes that a class may have written down (heads times their width, a multiple of the hidden size) holds
as it did, so that nearly any class can express the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.ladder import climb
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores

#: Sizes with no more common steps than this are left out, smallest first.
_STEPS = 4


@ALLOCATORS.register("width")
def width(
    groups: list[Group], scores: Mapping[str, Scores], costs: Costs, budget: Budget, *, strict: bool = False
) -> dict[str, int]:
    """The largest share n / steps, with as many common steps as the sizes have, that stays within the budget.

    Args:
        strict: no group that has more than one unit is left out, however coarse the steps become; otherwise those stay
            whole of which the share is no whole number of units.
    """
    free = [g for g in groups if g.name not in budget.limits]
    moving = [g for g in free if g.kind != "heads" and g.size >= (2 if strict else _STEPS)]
    steps = gcd(*(g.size for g in moving)) if moving else 1
    while moving and steps < _STEPS and not strict:  # the odd one out stays whole
        largest = max(g.size for g in moving)
        moving.remove(min(moving, key=lambda g: (gcd(g.size, largest), g.size)))
        steps = gcd(*(g.size for g in moving)) if moving else 1
    least = max((budget.least[g.name] / g.size for g in moving), default=0.0)
    tables = [{g.axis: n * (g.size // steps) for g in moving} for n in range(1, steps + 1) if n >= least * steps]
    whole = {g.axis: budget.limits[g.name][1] if g.name in budget.limits else g.size for g in groups}
    kept = climb({**whole, **(tables[0] if tables else {})}, tables[1:], costs, budget)
    return {g.name: kept[g.axis] for g in groups}
