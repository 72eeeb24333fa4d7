"""Operators that pick entries by index. What is picked by index keeps all its entries; the other dimensions pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.axes import ONE, Fixed
from fxprune.rules.core import Dims, Site, aten, positive, rule


@rule(aten.embedding.default)
def embedding(site: Site, weight: Dims, index: Dims, *_: Any) -> Dims:
    """weight (rows, width), index (...) -> (..., width)."""
    site.freeze(weight[0], "its rows are looked up by index")
    return (*index, *weight[1:])


@rule(aten.select.int)
def select(site: Site, x: Dims, dim: int, _index: Any) -> Dims:
    dim = positive(dim, len(x))
    site.freeze(x[dim], "one of its entries is taken by number")
    return (*x[:dim], *x[dim + 1 :])


@rule(aten.unbind.int)
def unbind(site: Site, x: Dims, dim: int = 0) -> list[Dims]:
    dim = positive(dim, len(x))
    site.freeze(x[dim], "its entries are taken apart")
    return [(*x[:dim], *x[dim + 1 :])] * len(site.shape)


@rule(aten.select_scatter.default)
def select_scatter(site: Site, x: Dims, source: Dims, dim: int, _index: Any) -> Dims:
    dim = positive(dim, len(x))
    site.freeze(x[dim], "one of its entries is overwritten")
    rest = site.broadcast((*x[:dim], *x[dim + 1 :]), source)
    return (*rest[:dim], x[dim], *rest[dim:])


@rule(aten.index_select.default)
def index_select(site: Site, x: Dims, dim: int, index: Dims) -> Dims:
    dim = positive(dim, len(x))
    site.freeze(x[dim], "its entries are picked by index")
    return (*x[:dim], index[0] if index else ONE, *x[dim + 1 :])


@rule(aten.gather.default)
def gather(site: Site, x: Dims, dim: int, index: Dims, **_: Any) -> Dims:
    """Along `dim` entries are picked; the other dimensions are those of the index, position by position."""
    dim = positive(dim, len(x)) if x else 0
    for i, (a, b) in enumerate(zip(x, index, strict=True)):
        if i == dim or a != b:
            site.freeze(a, "its entries are picked by index")
            site.freeze(b, "it is a dimension of an index")
    return tuple(site.axes.resolve(d) for d in index)


@rule(aten.index.Tensor)
def index(site: Site, x: Dims, indices: Sequence[Dims | None]) -> Dims:
    """Indexed dimensions are replaced by those of the (broadcast) indices, as in NumPy."""
    where = [i for i, ix in enumerate(indices) if ix is not None]
    given = [ix for ix in indices if ix is not None]
    for i in where:
        site.freeze(x[i], "its entries are picked by index")
    picked = site.broadcast(*given)
    rest = [d for i, d in enumerate(x) if i >= len(indices) or indices[i] is None]
    if where == list(range(where[0], where[-1] + 1)):
        return (*rest[: where[0]], *picked, *rest[where[0] :])
    return (*picked, *rest)


@rule(aten.index_put.default)
def index_put(site: Site, x: Dims, indices: Sequence[Dims | None], values: Dims, *_: Any) -> Dims:
    """Entries are overwritten: indexed dimensions and what is written stay whole, the others pass."""
    for i, ix in enumerate(indices):
        if ix is not None:
            site.freeze(x[i], "its entries are overwritten by index")
    for d in values:
        site.freeze(d, "it overwrites entries by index")
    for i, d in enumerate(x):
        if (i >= len(indices) or indices[i] is None) and values:
            site.freeze(d, "some of its entries are overwritten by index")
    return tuple(site.axes.resolve(d) for d in x)


@rule(aten.one_hot.default)
def one_hot(site: Site, x: Dims, *_: Any) -> Dims:
    return (*x, Fixed(site.shape[-1], "classes of a one-hot code"))
