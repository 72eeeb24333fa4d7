"""One plan out of two: what a later stage removed, said of the model that the first stage began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fxprune.admit import admit
from fxprune.analyse import Analysis, analyse
from fxprune.blocks import find_blocks
from fxprune.capture import capture
from fxprune.costs import Costs
from fxprune.emptied import composed_kept
from fxprune.groups import find_groups
from fxprune.masks import Masks
from fxprune.plan import Plan
from fxprune.pruned import Pruned
from fxprune.report import Pair
from fxprune.rewrite import rewrite


def composed(dense: nn.Module, before: Plan, small: Analysis, result: Pruned) -> bool:
    """Say in a result's plan and report what is kept of the dense model; return whether that can be said.

    Args:
        dense: the model that the first stage began with.
        before: the plan of that model that led to the one that the result was made of.
        small: the captured model that the result was made of.

    Where the dense model's couplings cannot say it, the result is left as it is.
    """
    dense = admit(dense).model
    args: tuple[Any, ...] = result.args
    analysis = analyse(capture(dense, args, result.kwargs, before.dynamic or False))
    groups, costs = find_groups(analysis), Costs(analysis)
    names = rewrite(analysis, before.selection(analysis), dense).names
    blocks = _blocks(analysis, small, result.plan, names)
    if blocks is None:
        return False
    base = replace(before, blocks=[*before.blocks, *blocks])
    kept = composed_kept(analysis, base, names, small, result.plan.selection(small))
    if kept is None:
        return False
    biases = sorted({*before.biases, *result.plan.biases})
    plan = Plan.of(analysis, groups, kept, costs, {}, recipe=result.plan.recipe, biases=biases)
    plan.masks = Masks(result.plan.masks)
    result.plan = plan
    counts = {axis: len(indices) for axis, indices in kept.items()}
    left = costs.without(kept.removed)
    report = result.report
    report.groups = plan.groups
    report.macs = Pair(costs.macs({}), left.macs(counts))
    report.params = Pair(costs.params({}), left.params(counts))
    report.memory = Pair(costs.memory({}), left.memory(counts))
    return True


def _blocks(analysis: Analysis, small: Analysis, plan: Plan, names: Mapping[str, str]) -> list[str] | None:
    """What blocks that are removed from the smaller model are called in the dense one; None where one is not found."""
    dense = {frozenset(b.parameters): b.name for b in find_blocks(analysis)} if plan.blocks else {}
    found = []
    for block in find_blocks(small) if plan.blocks else ():
        if block.name in plan.blocks:
            name = dense.get(frozenset(names.get(p, p) for p in block.parameters))
            if name is None:
                return None
            found.append(name)
    return found
