"""What is kept: indices per axis, and what follows from them for any dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxprune.axes import Axis, Concat, Dim, Fixed, Product, Size, atoms, plus, size_of, times

Indices = npt.NDArray[np.int64]


class Kept(Mapping[Axis, Indices]):
    """Kept indices for every axis that is cut or put in another order; axes that are not in it stay as they are.

    The order of an axis is free: every tensor that carries it follows.

    `removed` are the additions whose branch is left out whole, each with the stream that takes its place
    (`fxprune.blocks`).

    >>> from fxprune.axes import Axis, Fixed, concat, product
    >>> heads, width = Axis(3, "heads"), Axis(4, "width")
    >>> kept = Kept({heads: np.array([0, 2]), width: np.array([1, 3])})
    >>> kept.index(product([heads, width])).tolist()
    [1, 3, 9, 11]
    >>> kept.index(concat([Fixed(2), width])).tolist()
    [0, 1, 3, 5]
    """

    def __init__(self, kept: Mapping[Axis, Indices], removed: Mapping[fx.Node, fx.Node] | None = None) -> None:
        indices = {axis: np.asarray(ix, dtype=np.int64) for axis, ix in kept.items()}
        self._kept = {
            axis: ix
            for axis, ix in indices.items()
            if len(ix) < axis.size or not np.array_equal(ix, np.arange(len(ix)))
        }
        self.removed = dict(removed or {})
        self._index: dict[Dim, Indices | None] = {}

    def __getitem__(self, axis: Axis) -> Indices:
        return self._kept[axis]

    def __iter__(self) -> Iterator[Axis]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def cut(self, dim: Dim) -> bool:
        """Whether anything of the dimension is removed or moved."""
        return any(axis in self._kept for axis in atoms(dim))

    def shrinks(self, dim: Dim) -> bool:
        """Whether anything of the dimension is removed."""
        return any(axis in self._kept and len(self._kept[axis]) < axis.size for axis in atoms(dim))

    @property
    def smaller(self) -> bool:
        """Whether anything is removed at all."""
        return bool(self.removed) or any(len(ix) < axis.size for axis, ix in self._kept.items())

    def size(self, dim: Dim) -> Size:
        """Return the size of the dimension after pruning."""
        if isinstance(dim, Axis):
            return len(self._kept[dim]) if dim in self._kept else dim.size
        if isinstance(dim, Fixed):
            return dim.size
        total: Size = 1 if isinstance(dim, Product) else 0
        for part in dim.factors if isinstance(dim, Product) else dim.parts:
            total = times(total, self.size(part)) if isinstance(dim, Product) else plus(total, self.size(part))
        return total

    def index(self, dim: Dim) -> Indices:
        """Return the kept positions of a dimension of static size."""
        cached = self._index.get(dim)
        if cached is None:
            cached = self._index[dim] = self._positions(dim)
        return cached

    def _positions(self, dim: Dim) -> Indices:
        size = size_of(dim)
        if isinstance(dim, Axis) and dim in self._kept:
            return self._kept[dim]
        if not isinstance(size, int):
            raise ValueError(f"{dim} has a dynamic size")
        if not self.cut(dim):
            return np.arange(size)
        if isinstance(dim, Product):
            result = np.zeros(1, dtype=np.int64)
            for factor in dim.factors:
                inner = size_of(factor)
                assert isinstance(inner, int)
                result = (result[:, None] * inner + self._positions(factor)[None, :]).reshape(-1)
            return result
        assert isinstance(dim, Concat)
        pieces, offset = [], 0
        for part in dim.parts:
            pieces.append(self._positions(part) + offset)
            step = size_of(part)
            assert isinstance(step, int)
            offset += step
        return np.concatenate(pieces)

    def select(self, tensor: Tensor, dims: tuple[Dim, ...]) -> Tensor:
        """Return the kept part of a tensor with these dimensions; the tensor itself where nothing is cut."""
        for i, dim in reversed(list(enumerate(dims))):  # the last first: its pieces are the smallest to copy
            if self.cut(dim):
                tensor = tensor.index_select(i, torch.from_numpy(self.index(dim)).to(tensor.device))
        return tensor

    def mask(self, dim: Dim) -> npt.NDArray[np.bool_] | None:
        """Return True at the kept positions of a dimension, or None where all of it is kept."""
        if not self.cut(dim):
            return None
        size = size_of(dim)
        assert isinstance(size, int)
        result = np.zeros(size, dtype=bool)
        result[self.index(dim)] = True
        return result
