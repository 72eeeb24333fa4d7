"""Operators that pick entries by index. What is picked by index keeps all its entries; the other dimensions pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.axes import ONE, Fixed, size_of
from fxprune.rules.core import Dims, Literals, Site, aten, positive, rule


@rule(aten.embedding.default)
def embedding(site: Site, weight: Dims, index: Dims, *_: Any) -> Dims:
    """weight (rows, width), index (...) -> (..., width)."""
    site.picked(weight[0], site.node.args[1], "its rows are looked up by index")
    return (*index, *weight[1:])


@rule(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag(site: Site, weight: Dims, index: Dims, offsets: Dims, *rest: Any) -> list[Dims]:
    """Rows are summed, averaged or compared in bags -> (bags, width), and three tensors for the backward pass."""
    site.freeze(weight[0], "its rows are looked up by index")
    for dims in (index, offsets, rest[3] or ()):
        for d in dims:
            site.freeze(d, "it is put into bags")
    outs: Any = site.outputs("for the backward pass")
    if any(user.args[1] != 0 for user in site.node.users):
        site.freeze(weight[1], "how its bags were made is used")
    return [(Fixed(site.shape[0][0], "bags"), weight[1]), *outs[1:]]


@rule(aten.embedding_renorm.default)
def embedding_renorm(site: Site, weight: Dims, index: Dims, *_: Any) -> Dims:
    """Rows that are looked up are scaled down to a norm, which all their entries take part in."""
    for d in (*weight, *index):
        site.freeze(d, "a norm is taken of its rows")
    return tuple(site.axes.resolve(d) for d in weight)


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
    site.picked(x[dim], site.node.args[2], "its entries are picked by index")
    return (*x[:dim], index[0] if index else ONE, *x[dim + 1 :])


def _along(site: Site, x: Dims, dim: int, index: Dims, node: Any) -> int:
    """Position by position the dimensions of x and of an index are the same, but for `dim`, whose entries it picks."""
    dim = positive(dim, len(x)) if x else 0
    for i, (a, b) in enumerate(zip(x, index, strict=True)):
        if i == dim:
            site.picked(a, node, "its entries are picked by index")
            site.freeze(b, "it is a dimension of an index")
        elif size_of(a) == size_of(b):
            site.unify(a, b)
        else:
            site.freeze(a, "an index takes part of it")
            site.freeze(b, "it is a dimension of an index")
    return dim


@rule(aten.gather.default)
def gather(site: Site, x: Dims, dim: int, index: Dims, **_: Any) -> Dims:
    """Along `dim` entries are picked; the other dimensions are those of the index, position by position."""
    _along(site, x, dim, index, site.node.args[2])
    return tuple(site.axes.resolve(d) for d in index)


@rule(aten.take_along_dim.default)
def take_along_dim(site: Site, x: Dims, index: Dims, dim: int | None = None) -> Dims:
    """The same, where dimensions of size 1 are stretched; without a dimension, of all entries in a row."""
    if dim is None or len(x) != len(index):
        for d in (*x, *index):
            site.freeze(d, "its entries are picked by index")
        return site.outputs("picked entries")  # type: ignore[no-any-return]
    at = positive(dim, len(x))
    site.picked(x[at], site.node.args[1], "its entries are picked by index")
    rest = site.broadcast((*x[:at], ONE, *x[at + 1 :]), (*index[:at], ONE, *index[at + 1 :]))
    return (*rest[:at], site.freeze(index[at], "it is a dimension of an index"), *rest[at + 1 :])


@rule(aten.take.default)
def take(site: Site, x: Dims, index: Dims) -> Dims:
    """Entries are picked from all in a row."""
    for d in x:
        site.freeze(d, "its entries are picked by index")
    return index


@rule(aten.put.default, aten.masked_scatter.default)
def put(site: Site, x: Dims, *rest: Any) -> Dims:
    """Entries are overwritten one after the other: which is which depends on how many there are."""
    for dims in (x, *rest):
        for d in dims if isinstance(dims, tuple) else ():
            site.freeze(d, "its entries are overwritten one after the other")
    return site.outputs("some of it is overwritten")  # type: ignore[no-any-return]


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(site: Site, x: Dims, dim: int, index: Dims, _value: Any) -> Dims:
    """Entries along `dim` get one value."""
    site.freeze(x[positive(dim, len(x))], "its entries are overwritten by index")
    return x


@rule(aten.index_reduce.default)
def index_reduce(site: Site, x: Dims, dim: int, index: Dims, source: Dims, *_: Any, **__: Any) -> Dims:
    """Entries along `dim` are multiplied, averaged or compared with others by index."""
    dim = positive(dim, len(x))
    site.freeze(x[dim], "its entries are written by index")
    site.freeze(source[dim], "it is written by index")
    return site.broadcast((*x[:dim], ONE, *x[dim + 1 :]), (*source[:dim], x[dim], *source[dim + 1 :]))


@rule(aten.scatter.reduce, aten.scatter.value_reduce, aten.scatter_reduce.two)
@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def scatter(site: Site, x: Dims, dim: int, index: Dims, source: Any = None, *_: Any, **__: Any) -> Dims:
    """Along `dim` entries are overwritten, or added to; index and source have the same dimensions."""
    dim = _along(site, x, dim, index, site.node.args[2])
    if isinstance(source, tuple):
        for i, d in enumerate(source):
            if i != dim and size_of(d) == size_of(x[i]):
                site.unify(d, x[i])
            else:
                site.freeze(d, "it is written by index")
    return tuple(site.axes.resolve(d) for d in x)


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(site: Site, x: Dims, dim: int, index: Dims, source: Dims, **_: Any) -> Dims:
    """Entries along `dim` are added to, or overwritten, by index; the other dimensions are those of the source."""
    dim = positive(dim, len(x))
    site.picked(x[dim], site.node.args[2], "its entries are written by index")
    site.freeze(source[dim], "it is written by index")
    rest = site.broadcast((*x[:dim], ONE, *x[dim + 1 :]), (*source[:dim], ONE, *source[dim + 1 :]))
    return (*rest[:dim], site.axes.resolve(x[dim]), *rest[dim + 1 :])


@rule(aten.index.Tensor)
def index(site: Site, x: Dims, indices: Sequence[Dims | None]) -> Dims:
    """Indexed dimensions are replaced by those of the (broadcast) indices, as in NumPy."""
    where = [i for i, ix in enumerate(indices) if ix is not None]
    given = [ix for ix in indices if ix is not None]
    nodes: Any = site.node.args[1]
    for i in where:
        site.picked(x[i], nodes[i], "its entries are picked by index")
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


def _classes(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    classes = rw.dims(node)[-1]
    return {"num_classes": rw.size(classes)} if rw.cut(classes) else {}


@rule(aten.one_hot.default, literals=_classes)
def one_hot(site: Site, x: Dims, classes: int = -1) -> Dims:
    """One more dimension of so many classes: the axis, where the numbers are all indices of one."""
    counted = site.counted.get(site.node.args[0])  # type: ignore[arg-type]
    if counted is not None and counted.kind == "index" and classes == size_of(counted.dim):
        return (*x, site.axes.resolve(counted.dim))
    if counted is not None:
        site.freeze(counted.dim, "its indices are coded with another number of classes")
    return (*x, Fixed(site.shape[-1], "classes of a one-hot code"))
