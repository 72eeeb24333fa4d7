"""Rows, columns and heads that a pattern of blocks has emptied: they are removed, which changes no output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.analyse import Analysis, analyse
from fxprune.capture import capture
from fxprune.errors import SavedModelError
from fxprune.groups import find_groups
from fxprune.kept import Kept
from fxprune.plan import Plan
from fxprune.prove import Proof, prove
from fxprune.recipe import Recipe, read_recipe
from fxprune.rewrite import Rewritten, rewrite


@dataclass(frozen=True, slots=True)
class Emptied:
    """The module without what was empty.

    Attributes:
        kept: what is kept of the dense model, all in all.
        module: the smaller module.
        biases: names of biases of it that took up constants.
        masks: what is left of the masks.
        units: how many were removed.
    """

    kept: Kept
    module: fx.GraphModule
    biases: list[str]
    masks: dict[str, Tensor]
    units: int
    proof: Proof


def without_empty(
    analysis: Analysis,
    plan: Plan,
    rewritten: Rewritten,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recipe: Recipe,
    masks: Mapping[str, Tensor],
) -> Emptied | None:
    """Return the module without units that are dead now, or None where there are none.

    Args:
        analysis, plan: of the dense model.
        rewritten: the module whose weights have the masks.

    Raises:
        ProofError: the smaller module computes something else.
    """
    from fxprune.passes.dead import find_dead

    small = analyse(capture(rewritten.module, args, kwargs, plan.dynamic or False))
    settings = read_recipe({"target": {"dead": True}, "seed": recipe.seed})
    kept, biases = find_dead(small, find_groups(small), settings)
    if not kept.smaller:
        return None
    composed = composed_kept(analysis, plan, rewritten.names, small, kept)
    if composed is None:
        return None
    result = rewrite(small, kept, rewritten.module, biases)
    proof = prove(small, kept, result, rewritten.module, recipe.proof, recipe.seed, lossless=True)
    result.module.train(rewritten.module.training)
    left = {name: kept.select(mask, small.tensors[name]) for name, mask in masks.items() if name in small.tensors}
    units = sum(axis.size - len(indices) for axis, indices in kept.items())
    return Emptied(composed, result.module, sorted({*plan.biases, *biases}), left, units, proof)


def composed_kept(analysis: Analysis, plan: Plan, names: Mapping[str, str], small: Analysis, kept: Kept) -> Kept | None:
    """Return what is kept of the dense model when less is kept of the pruned one; None where its axes forbid it.

    Args:
        analysis, plan: of the dense model.
        names: of tensors in the pruned model -> in the dense one.
        small, kept: of the pruned model.
    """
    table = {name: dict(dims) for name, dims in plan.kept.items()}
    aliases = analysis.captured.aliases
    for name, dims in small.tensors.items():
        dense = names.get(name, name)
        dense = aliases.get(dense, dense)
        if dense not in analysis.tensors:
            continue  # a bias that took up constants before
        for i, dim in enumerate(dims):
            if not kept.cut(dim):
                continue
            before = table.get(dense, {}).get(i)
            size = int(analysis.captured.tensors[dense].shape[i])
            indices = torch.arange(size).tolist() if before is None else before
            table.setdefault(dense, {})[i] = [indices[j] for j in kept.index(dim).tolist()]
    try:
        return Plan(kept=table, groups=[], blocks=plan.blocks).selection(analysis)
    except SavedModelError:
        return None
