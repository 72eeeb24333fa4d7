"""Patterns of what a weight keeps: n of every m along its inputs, whole blocks, or single entries anywhere.

Matrices are (outputs, inputs). Of a convolution the inputs come in the order (kernel position, channel), so that groups
of m are m channels at one position, which is what accelerators take (`columns`).
"""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.errors import RecipeError
from fxprune.passes.consumers import Contraction
from fxprune.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Pattern(abc.ABC):
    """What may stay of a matrix.

    Attributes:
        name: as a recipe spells it.
        density: the share of the entries that stays.
    """

    name: str
    density: float

    @abc.abstractmethod
    def misfit(self, rows: int, channels: int) -> str | None:
        """Return why matrices of these sizes cannot have the pattern, or None."""

    @abc.abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """Return which entries stay, those with the highest scores: bool, (rows, columns) like the scores."""

    @property
    @abc.abstractmethod
    def window(self) -> int:
        """How many columns are decided upon together, at least."""


@dataclass(frozen=True, slots=True)
class NOfM(Pattern):
    """The n largest of every m consecutive inputs stay."""

    n: int
    m: int

    def misfit(self, rows: int, channels: int) -> str | None:
        """Return why not, or None."""
        return f"{channels} inputs do not divide by {self.m}" if channels % self.m else None

    def mask(self, scores: Tensor) -> Tensor:
        """Return which entries stay."""
        groups = scores.reshape(len(scores), -1, self.m)
        best = groups.topk(self.n, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True).reshape(scores.shape)

    @property
    def window(self) -> int:
        """How many columns are decided upon together."""
        return self.m


@dataclass(frozen=True, slots=True)
class Blocks(Pattern):
    """The blocks of rows x columns with the largest sums stay; blocks of 1 x 1 are single entries."""

    rows: int
    columns: int

    def misfit(self, rows: int, channels: int) -> str | None:
        """Return why not, or None."""
        if rows % self.rows or channels % self.columns:
            return f"{rows} x {channels} does not divide into blocks of {self.rows} x {self.columns}"
        return None

    def mask(self, scores: Tensor) -> Tensor:
        """Return which entries stay."""
        high, wide = len(scores) // self.rows, scores.shape[1] // self.columns
        sums = scores.reshape(high, self.rows, wide, self.columns).sum((1, 3))
        best = sums.flatten().topk(max(1, round(self.density * sums.numel()))).indices
        chosen = torch.zeros(sums.numel(), dtype=torch.bool).index_fill_(0, best, True).reshape(high, wide)
        return chosen.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    @property
    def window(self) -> int:
        """How many columns are decided upon together."""
        return -(-128 // self.columns) * self.columns


def pattern(name: str, density: float | None = None) -> Pattern:
    """Return the pattern that a recipe names: "2:4", any n:m, "32x32", any rows x columns, or "unstructured".

    Args:
        density: the share that stays, for blocks and single entries; n:m says it already. 0.5 by default.

    Raises:
        RecipeError: there is no such pattern, or the share is not one.

    >>> pattern("2:4").mask(torch.tensor([[1.0, 4.0, 2.0, 3.0]])).tolist()
    [[False, True, False, True]]
    >>> pattern("1x2", 0.5).mask(torch.tensor([[1.0, 4.0, 2.0, 2.0]])).tolist()
    [[True, True, False, False]]
    >>> pattern("4:2")
    Traceback (most recent call last):
        ...
    fxprune.errors.RecipeError: sparsity '4:2' keeps 4 of every 2: the smaller number comes first, '2:4'
    """
    counted = re.fullmatch(r"(\d+)([:x])(\d+)", name)
    if density is not None and not 0 < density < 1:
        raise RecipeError(f"sparsity '{name}': density is the share that stays, between 0 and 1, not {density:g}")
    if name == "unstructured":
        return Blocks(name, density or 0.5, 1, 1)
    if counted is None or not int(counted[1]) or not int(counted[3]):
        raise RecipeError(
            f"there is no sparsity '{name}'; known: 2:4 or any n:m, 32x32 or any rows x columns, unstructured"
        )
    first, second = int(counted[1]), int(counted[3])
    if counted[2] == "x":
        return Blocks(name, density or 0.5, first, second)
    if first >= second:
        raise RecipeError(
            f"sparsity '{name}' keeps {first} of every {second}: the smaller number comes first, '{second}:{first}'"
        )
    if density is not None:
        raise RecipeError(f"sparsity '{name}' keeps {first / second:g} of all entries; density says nothing more")
    return NOfM(name, first / second, first, second)


def of_recipe(recipe: Recipe) -> Pattern | None:
    """Return the pattern that a recipe names, or None; raises RecipeError where there is no such."""
    given = recipe.sparsity
    if given is None:
        return None
    if isinstance(given, str):
        return pattern(given)
    return pattern(str(given.get("pattern", "2:4")), given.get("density"))


def columns(contraction: Contraction, kernel: Sequence[int], width: int) -> Tensor:
    """Return the order (kernel position, channel) of the columns of a contraction's matrix: new -> old, (width,).

    >>> import torch.fx
    >>> node = torch.fx.Graph().placeholder("x")
    >>> conv = Contraction(node, node, "w", None, "conv", 2)
    >>> columns(conv, (1, 3), 6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    positions = int(np.prod(kernel)) if contraction.rank else 1
    return torch.arange(width).reshape(-1, positions).t().reshape(-1)
