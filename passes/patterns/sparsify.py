"""Giving a pruned module's weights a pattern: which layers can have it, and what their weights become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.analyse import Analysis
from fxprune.errors import RecipeError
from fxprune.groups import Group
from fxprune.kept import Kept
from fxprune.passes.consumers import Contraction, contractions
from fxprune.passes.obs import DAMPING
from fxprune.passes.patterns import METHODS
from fxprune.passes.patterns.order import Ordered, ordered
from fxprune.passes.patterns.pattern import NOfM, Pattern, columns, of_recipe
from fxprune.passes.patterns.registry import Method, Weight
from fxprune.passes.patterns.support import refit
from fxprune.recipe import Recipe
from fxprune.registry import nearest
from fxprune.report import Sparse
from fxprune.rewrite import Rewritten
from fxprune.select import Patterns, say

#: What is done where the recipe names no method: the best with data, and without.
_WITH_DATA, _WITHOUT = "alps", "magnitude"


@dataclass(frozen=True, slots=True)
class Settings:
    """The `sparsity` of a recipe.

    Attributes:
        pattern: what stays of each weight.
        name, method: how it is chosen.
        refit: whether what stays is refitted exactly.
        permute: whether axes are put in the order in which the pattern keeps the most.
        when: "always", or "faster": only if the model is measured to be.
        max_drop: the most that it may cost (of the metric, or of the outputs' variance), None for any.
    """

    pattern: Pattern
    name: str
    method: Method
    refit: bool
    permute: bool
    when: str
    max_drop: float | None


_OPTIONS: dict[str, Any] = {
    "pattern": "2:4",
    "density": None,
    "method": "auto",
    "refit": None,
    "permute": True,
    "when": "always",
    "max_drop": None,
}


def settings(recipe: Recipe, data: bool) -> Settings | None:
    """Return what a recipe says about patterns, or None.

    Raises:
        RecipeError: it names what there is not, or a method that takes data and there are none.
    """
    if recipe.sparsity is None:
        return None
    given = {"pattern": recipe.sparsity} if isinstance(recipe.sparsity, str) else dict(recipe.sparsity)
    for option in given:
        if option not in _OPTIONS:
            known = list(_OPTIONS)
            raise RecipeError(
                f"sparsity has no option '{option}'{nearest(option, known) or '.'} Known: {', '.join(known)}"
            )
    given = _OPTIONS | given
    name = given["method"]
    if name == "auto":
        name = _WITH_DATA if data else _WITHOUT
    found = METHODS[name]
    if found.data and not data:
        raise RecipeError(
            f"sparsity method '{name}' takes calibration data: pass `calibration`, or choose 'magnitude', which needs "
            "none"
        )
    if given["when"] not in ("always", "faster"):
        raise RecipeError(f"sparsity: when is 'always' or 'faster', not {given['when']!r}")
    limit = given["max_drop"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0):
        raise RecipeError(f"sparsity: max_drop is a number from 0 on, not {limit!r}")
    if limit is not None and not data:
        raise RecipeError("sparsity: max_drop takes calibration data to measure the drop on: pass `calibration`")
    again = (found.refit and data) if given["refit"] is None else bool(given["refit"])
    if again and not data:
        raise RecipeError("sparsity: refit takes calibration data: pass `calibration`, or leave it out")
    shape = of_recipe(recipe)
    assert shape is not None
    permute = bool(given["permute"]) and isinstance(shape, NOfM)
    return Settings(shape, name, found, again, permute, given["when"], limit)


def eligible(
    analysis: Analysis, groups: Sequence[Group], kept: Kept, recipe: Recipe, shape: Pattern
) -> tuple[list[Contraction], dict[str, str]]:
    """Return the layers that can have a pattern, and why the others cannot, by the name of their weight."""
    patterns = Patterns(analysis, groups)
    whole = {t: glob for glob in recipe.keep for t in patterns.tensors(glob, "keep")}
    found, reasons = [], {}
    for c in contractions(analysis):
        reason = _unfit(analysis, kept, c, shape)
        if c.weight in whole:
            reason = f"the recipe keeps '{whole[c.weight]}'"
        if reason is None:
            found.append(c)
        else:
            reasons[c.weight] = reason
    return found, reasons


def _unfit(analysis: Analysis, kept: Kept, c: Contraction, shape: Pattern) -> str | None:
    """Why a layer's weight cannot have the pattern."""
    users = [n for n in analysis.captured.graph.nodes if n.op == "get_attr" and n.target == c.weight]
    if c.groups > 1:
        return "a grouped convolution"
    if not isinstance(analysis.captured.tensors[c.weight], nn.Parameter):
        return "its weight is no parameter"
    if len(users) != 1 or len(users[0].users) != 1:
        return "its weight is used more than once"
    rows, channels = (kept.size(analysis.dims[n][c.channel]) for n in (c.node, c.operand))
    if not isinstance(rows, int) or not isinstance(channels, int):
        return "its width is not fixed"
    return shape.misfit(rows, channels)


def reordered(
    analysis: Analysis, groups: Sequence[Group], kept: Kept, recipe: Recipe, shape: Pattern
) -> tuple[Kept, list[Ordered]]:
    """Return what is kept, with axes in the order in which the pattern keeps the most of the layers that read them.

    Groups that the recipe keeps whole stay in their order, too.
    """
    assert isinstance(shape, NOfM)
    layers, _ = eligible(analysis, groups, kept, recipe, shape)
    said = say(analysis, groups, recipe)
    free = [g for g in groups if not (g.name in said and said[g.name].whole)]
    matrices = {}
    for c in layers:
        dense = analysis.captured.tensors[c.weight].detach()
        small = kept.select(dense, analysis.tensors[c.weight]).float()
        matrix = c.matrix(small, 1)[0]
        order = columns(c, tuple(dense.shape[2:]) if c.rank else (), matrix.shape[1])
        places = int(np.prod(dense.shape[2:])) if c.rank else 1
        matrices[c] = matrix[:, order].reshape(len(matrix), places, -1)
    return ordered(analysis, free, kept, matrices, shape, recipe.seed)


@dataclass
class Sparsifier:
    """Gives layers their pattern, one by one.

    Attributes:
        layers: the captured names of the weights that get it.
        given: masks that are decided already, by the name of the weight.
        masks: those that were chosen, bool, of the shape of the weight, by its name in the module.
        rows: what each lost.
    """

    settings: Settings
    layers: set[str]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Sparse] = field(default_factory=list)

    def __contains__(self, c: Contraction) -> bool:
        """Whether a layer gets the pattern."""
        return c.weight in self.layers

    def fit(
        self,
        c: Contraction,
        name: str,
        shape: Sequence[int],
        goal: Tensor,
        moment: Tensor | None,
        damping: float = DAMPING,
    ) -> Tensor:
        """Return the matrix with the pattern that does best what another would do.

        Args:
            name: of the weight in the module.
            shape: of the weight.
            goal: the other matrix, float64 (out, in), a bias behind where the layer has one.
            moment: E[x x^T] of its inputs, float64 (in, in), or None.
            damping: added to the moment's diagonal, as a share of its mean.
        """
        width = int(np.prod(shape)) // len(goal)
        order = columns(c, tuple(shape[2:]) if c.rank else (), width)
        all_columns = torch.cat([order, torch.arange(width, goal.shape[1])])
        back = torch.argsort(all_columns)
        sorted_moment = None if moment is None else moment[all_columns][:, all_columns]
        weight = Weight(goal[:, all_columns], sorted_moment, self.settings.pattern, goal.shape[1] - width, damping)
        if name in self.given:
            mask = c.matrix(self.given[name].reshape(tuple(shape)), 1)[0][:, order]
            matrix = weight.matrix * weight.whole(mask)
        else:
            matrix, mask = self.settings.method.choose(weight)
        if self.settings.refit and moment is not None:
            matrix = refit(weight, mask)
        self.masks[name] = c.tensor(mask[:, back[:width]].unsqueeze(0), shape).reshape(tuple(shape)).contiguous()
        share = float(mask.double().mean())
        self.rows.append(Sparse(name, tuple(shape), self.settings.pattern.name, share, weight.error(matrix)))
        return matrix[:, back]


def mask_weights(analysis: Analysis, pruned: Rewritten, sparsifier: Sparsifier) -> None:
    """Give the layers of a module their pattern where there are no data."""
    names = {dense: small for small, dense in pruned.names.items()}
    for c in contractions(analysis):
        name = names.get(c.weight)
        if name is None or c not in sparsifier:
            continue
        parameter = pruned.module.get_parameter(name)
        goal = c.matrix(parameter.detach(), 1)[0].double()
        matrix = sparsifier.fit(c, name, tuple(parameter.shape), goal, None)
        parameter.data = (
            c.tensor(matrix.unsqueeze(0), parameter.shape).reshape(parameter.shape).to(parameter.dtype).contiguous()
        )
