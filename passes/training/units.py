"""What goes as one: blocks of a weight, indices of an axis, whole layers; scores of entries in, masks of weights out.

A `Units` has a number of units, each of as many weight entries as any other of it. `reduce` adds a tensor of the shape
of a weight up by unit, `expand` makes masks of weights from a mask of units.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.analyse import Analysis
from fxprune.blocks import Block
from fxprune.groups import Group, positions
from fxprune.passes.consumers import Contraction
from fxprune.passes.patterns.pattern import NOfM

#: Name of a weight -> a tensor of its shape.
Values = Callable[[str], Tensor]


class Units(abc.ABC):
    """Units of one weight, of one axis, or of the model.

    Attributes:
        name: of the weight or of the group.
        size: how many units there are.
        entries: weight entries of one unit.
        counts: what one unit counts in a sparsity: its entries, or 1 where units are what is counted.
        weights: names of the parameters that have entries of units.
        kind: what of the recipe's patterns it is; only those of one kind compete.
    """

    name: str
    size: int
    entries: float
    counts: float = 1.0
    weights: tuple[str, ...]
    kind: str

    def gated(self) -> tuple[str, ...]:
        """Return the names of the parameters that a mask of real numbers is put on: one that ends the unit, too."""
        return self.weights

    @abc.abstractmethod
    def reduce(self, values: Values) -> Tensor:
        """Return the sum of values over the entries of each unit: (units,)."""

    def at_reads(self, values: Values) -> Tensor:
        """Return the sum of values over the entries of each unit in the parameters that `gated` names."""
        return self.reduce(values)

    @abc.abstractmethod
    def expand(self, mask: Tensor) -> dict[str, Tensor]:
        """Return for each weight what the mask of units, bool or of real numbers, says of its entries."""

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """Return for each weight the value of the unit that an entry is of, the sum where it is of several."""
        return self.expand(values)


class WeightUnits(Units):
    """Blocks of rows x columns of one weight; blocks of 1 x 1 are single entries.

    Args:
        contraction: what the weight is used in; None for any parameter, whose entries have no rows and columns.
        shape: of the weight.
        rows, columns: of a block; 0 for all there are.
    """

    def __init__(
        self, name: str, shape: Sequence[int], contraction: Contraction | None, rows: int, columns: int, kind: str
    ) -> None:
        self.name, self.weights, self.kind, self.shape = name, (name,), kind, tuple(shape)
        self._order = _order(contraction, shape)
        high, wide = self._matrix(torch.empty(tuple(shape), device="meta")).shape
        self.rows, self.columns = rows or high, columns or wide
        self._blocks = high // self.rows, wide // self.columns
        self.size = self._blocks[0] * self._blocks[1]
        self.entries = self.counts = float(self.rows * self.columns)

    def _matrix(self, weight: Tensor) -> Tensor:
        """The weight as (rows, columns), channels of a position side by side."""
        flat = weight.reshape(len(weight), -1)
        if self._order is None:
            return flat
        if self._order == "transposed":
            return flat.t()
        positions = int(np.prod(self.shape[2:]))
        return flat.reshape(len(flat), -1, positions).transpose(1, 2).reshape(len(flat), -1)

    def _tensor(self, matrix: Tensor) -> Tensor:
        if self._order is None:
            return matrix.reshape(self.shape)
        if self._order == "transposed":
            return matrix.t().reshape(self.shape)
        positions = int(np.prod(self.shape[2:]))
        return matrix.reshape(len(matrix), positions, -1).transpose(1, 2).reshape(self.shape)

    def grid(self, values: Tensor) -> Tensor:
        """Return values of units, (units,), as they lie: (rows of blocks, columns of blocks)."""
        return values.reshape(self._blocks)

    def reduce(self, values: Values) -> Tensor:
        """Return the sum over each block."""
        matrix = self._matrix(values(self.name))
        if self.rows == self.columns == 1:
            return matrix.reshape(-1)
        high, wide = self._blocks
        return matrix.reshape(high, self.rows, wide, self.columns).sum((1, 3)).reshape(-1)

    def expand(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the mask of the weight."""
        grid = self.grid(mask)
        if self.rows > 1 or self.columns > 1:
            high, wide = self._blocks
            grid = grid[:, None, :, None].expand(high, self.rows, wide, self.columns)
            grid = grid.reshape(high * self.rows, wide * self.columns)
        return {self.name: self._tensor(grid).contiguous()}


class CountedUnits(WeightUnits):
    """The entries of a weight of which n of every m along the inputs stay, or all of them.

    A unit is an entry. Sparse groups are those whose lost scores are the least.
    """

    def __init__(self, name: str, shape: Sequence[int], contraction: Contraction, pattern: NOfM, kind: str) -> None:
        super().__init__(name, shape, contraction, 1, 1, kind)
        self.pattern = pattern

    def best(self, scores: Tensor, gone: float) -> Tensor:
        """Return which entries stay: the n best of as many groups as make up a share of all entries that is gone.

        A group's entries are compared with each other one pair at a time, which is many times as fast as sorting.
        """
        n, m = self.pattern.n, self.pattern.m
        columns = scores.reshape(-1, m).unbind(1)
        best = torch.empty(len(columns[0]), m, dtype=torch.bool, device=scores.device)
        better = [torch.full_like(best[:, 0], m - 1 - i, dtype=torch.uint8) for i in range(m)]
        for i, j in itertools.combinations(range(m), 2):
            first = (columns[i] >= columns[j]).view(torch.uint8)
            better[j] += first
            better[i] -= first
        for i, rank in enumerate(better):
            torch.lt(rank, n, out=best[:, i])
        count = round(gone / (1 - self.pattern.density) * len(best))
        if count < len(best):
            lost = torch.where(best, 0.0, scores.reshape(-1, m).double()).sum(1)
            best[torch.argsort(lost, stable=True)[count:]] = True
        return best.reshape(-1)


class AxisUnits(Units):
    """The indices of a group's axis: each is a slice of every parameter that carries it.

    Args:
        read: names of the parameters that read the axis, as contractions do: what `expand` scales where a mask is of
            real numbers. Empty: all that carry it.
    """

    def __init__(self, analysis: Analysis, group: Group, read: Sequence[str], kind: str) -> None:
        self.name, self.size, self.kind, self.group = group.name, group.size, kind, group
        tensors = analysis.captured.tensors
        self._places: dict[str, list[tuple[int, Tensor]]] = {}
        for name, dim in group.members:
            if not isinstance(tensors[name], torch.nn.Parameter):
                continue
            for found in positions(analysis.tensors[name][dim], group.axis):
                self._places.setdefault(name, []).append((dim, torch.from_numpy(found)))
        self._shapes = {name: tuple(tensors[name].shape) for name in self._places}
        self.weights = tuple(self._places)
        self._read = tuple(name for name in read if name in self._places) or self.weights
        self.entries = sum(int(np.prod(shape)) for shape in self._shapes.values()) / group.size

    def reduce(self, values: Values) -> Tensor:
        """Return the sum over all slices of each index."""
        return self.total(values, self.weights)

    def at_reads(self, values: Values) -> Tensor:
        """Return the sum over the slices in the parameters that read the axis."""
        return self.total(values, self._read)

    def total(self, values: Values, names: Sequence[str]) -> Tensor:
        """Return the sum over the slices in some of the parameters."""
        total: Tensor | None = None
        for name in names:
            value = values(name)
            for dim, units in self._places[name]:
                others = [d for d in range(value.dim()) if d != dim]
                sums = value.sum(others) if others else value
                inside = (units >= 0).to(sums.device)
                one = sums.new_zeros(self.size).index_add_(0, units.to(sums.device)[inside], sums[inside])
                total = one if total is None else total + one
        assert total is not None
        return total

    def gated(self) -> tuple[str, ...]:
        """Return the names of the parameters that read the axis."""
        return self._read

    def expand(self, mask: Tensor) -> dict[str, Tensor]:
        """Return masks of all parameters for a bool mask, of those that read the axis for one of real numbers.

        The latter are of shapes that broadcast to those of the parameters.
        """
        result = {}
        for name in self.weights if mask.dtype == torch.bool else self._read:
            whole: Tensor | None = None
            for dim, units in self._places[name]:
                line = torch.where(
                    (units >= 0).to(mask.device), mask[units.clamp_min(0).to(mask.device)], mask.new_ones(())
                )
                shape = [1] * len(self._shapes[name])
                shape[dim] = -1
                line = line.reshape(shape)
                whole = line if whole is None else whole * line
            assert whole is not None
            result[name] = whole.expand(self._shapes[name]).contiguous() if whole.dtype == torch.bool else whole
        return result

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """Return for each weight the value of the unit that an entry is of, the sum where it is of several."""
        result = {}
        for name in self.weights:
            total = values.new_zeros(self._shapes[name])
            for dim, units in self._places[name]:
                units = units.to(values.device)
                line = torch.where(units >= 0, values[units.clamp_min(0)], values.new_zeros(()))
                shape = [1] * total.dim()
                shape[dim] = -1
                total = total + line.reshape(shape)
            result[name] = total
        return result


class LayerUnits(Units):
    """Residual branches, each of which can be left out whole: without its parameters it adds nothing to the stream.

    Args:
        outputs: of each branch, the parameters whose product with a factor is the branch's product with it: where a
            mask of real numbers is put.
    """

    def __init__(
        self, blocks: Sequence[Block], outputs: Sequence[frozenset[str]], shapes: Mapping[str, Sequence[int]], kind: str
    ) -> None:
        self.name, self.kind, self.blocks, self.size = "branches", kind, list(blocks), len(blocks)
        self.weights = tuple(sorted({name for b in blocks for name in b.parameters}))
        self._all = [sorted(b.parameters) for b in self.blocks]
        self._outputs = [sorted(names) for names in outputs]
        self._shapes = shapes
        self.entries = sum(int(np.prod(shapes[n])) for n in self.weights) / max(self.size, 1)

    def gated(self) -> tuple[str, ...]:
        """Return the names of the parameters that scale what branches give."""
        return tuple(sorted({name for names in self._outputs for name in names}))

    def reduce(self, values: Values) -> Tensor:
        """Return the sum over the parameters of each branch."""
        return self._total(values, self._all)

    def at_reads(self, values: Values) -> Tensor:
        """Return the sum over the parameters that scale what each branch gives."""
        return self._total(values, self._outputs)

    def _total(self, values: Values, names: Sequence[Sequence[str]]) -> Tensor:
        return torch.stack([torch.stack([values(n).sum() for n in some]).sum() for some in names])

    def expand(self, mask: Tensor) -> dict[str, Tensor]:
        """Return masks that are the same all over a parameter; of those that scale for one of real numbers."""
        return self._of_parameters(mask, self._all if mask.dtype == torch.bool else self._outputs)

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """Return for each parameter the value of its branch, the product where it is in several."""
        return self._of_parameters(values, self._all)

    def _of_parameters(self, values: Tensor, names: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for number, some in enumerate(names):
            for name in some:
                one = values[number].expand(tuple(self._shapes[name])).contiguous()
                result[name] = result[name] * one if name in result else one
        return result


def _order(contraction: Contraction | None, shape: Sequence[int]) -> str | None:
    """How the columns of a weight lie: as they are, transposed, or channels within positions."""
    if contraction is None or len(shape) < 2:
        return None
    if contraction.kind == "product":
        return "transposed"
    if contraction.rank and int(np.prod(shape[2:])) > 1:
        return "positions"
    return None
