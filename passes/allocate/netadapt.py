"""NetAdapt: the budget falls little by little, each time by narrowing the one group that the model misses least."""

from __future__ import annotations

from collections.abc import Mapping

from fxprune.costs import Costs
from fxprune.groups import Group
from fxprune.passes.allocate.knapsack import losses
from fxprune.passes.allocate.ladder import climb, widths
from fxprune.passes.registries import ALLOCATORS, Budget
from fxprune.passes.statistics import Scores


@ALLOCATORS.register("netadapt")
def netadapt(
    groups: list[Group],
    scores: Mapping[str, Scores],
    costs: Costs,
    budget: Budget,
    *,
    first: float = 0.05,
    decay: float = 0.96,
    shortlist: int = 4,
) -> dict[str, int]:
    """In each round every group offers the widest width that saves enough; the offer that loses the least is taken.

    Yang et al., "NetAdapt" (2018), algorithm 1. Without data an offer's loss is the sum of the scores it removes; with
    data the best of these are tried on the whole model. The first round saves `first` of the dense cost, each further
    one `decay` times as much.
    """
    options = {g.name: widths([g], budget) for g in groups}
    current = {g.name: options[g.name][-1] for g in groups}
    lost = {g.name: dict(zip(options[g.name], losses(g, scores[g.name], options[g.name]), strict=True)) for g in groups}
    dense = float(costs.of(budget.kind, {}))
    allowed, step = budget.share * dense, first * dense

    def axes(counts: Mapping[str, int]) -> dict[object, int]:
        return {g.axis: counts[g.name] for g in groups}

    spent = float(costs.of(budget.kind, axes(current)))  # type: ignore[arg-type]
    while spent > allowed:
        goal = max(spent - step, allowed)
        offers: list[tuple[float, str, int, float]] = []
        for g in groups:
            for count in reversed([n for n in options[g.name] if n < current[g.name]]):
                saved = costs.change(budget.kind, {g.axis: count}, axes(current))  # type: ignore[arg-type]
                if spent + saved <= goal or count == options[g.name][0]:
                    if saved < 0:
                        offers.append(
                            (float(lost[g.name][count] - lost[g.name][current[g.name]]), g.name, count, saved)
                        )
                    break
        if not offers:
            climb({g.axis: options[g.name][0] for g in groups}, [], costs, budget)
            break
        # An offer that saves less than the round asks for is as good as what it saves.
        offers.sort(key=lambda o: o[0] / min(1.0, -o[3] / max(spent - goal, 1e-12)))
        best = offers[0]
        if budget.error is not None and len(offers) > 1:
            tried = offers[:shortlist]
            best = min(tried, key=lambda o: budget.error({**current, o[1]: o[2]}) / max(-o[3], 1e-12))  # type: ignore[misc]
        current[best[1]] = best[2]
        spent += best[3]
        step *= decay
    return current
