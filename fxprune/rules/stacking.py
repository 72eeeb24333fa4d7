"""Joining and cutting along a dimension that the operator's name says, grids, blocks and diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.axes import ONE, Dim, Fixed, concat, product, size_of
from fxprune.rules.core import Dims, Literals, Site, aten, positive, rule
from fxprune.rules.movement import cat, cut_along, flip


# ---------------------------------------------------------------------- joining
def _with_rank(x: Dims, rank: int) -> Dims:
    """The dimensions of `atleast_1d`, `atleast_2d` and `atleast_3d`."""
    if len(x) >= rank:
        return x
    if rank == 3 and len(x) == 2:
        return (*x, ONE)
    if rank == 3 and len(x) == 1:
        return (ONE, *x, ONE)
    return (ONE,) * (rank - len(x)) + x


@rule(aten.hstack.default)
def hstack(site: Site, tensors: Sequence[Dims]) -> Any:
    """Along dimension 1, or 0 of vectors."""
    tensors = [_with_rank(t, 1) for t in tensors]
    return cat(site, tensors, 0 if len(tensors[0]) == 1 else 1)


@rule(aten.vstack.default, aten.row_stack.default)
def vstack(site: Site, tensors: Sequence[Dims]) -> Any:
    """Along dimension 0; a vector is a row."""
    return cat(site, [_with_rank(t, 2) for t in tensors], 0)


@rule(aten.dstack.default)
def dstack(site: Site, tensors: Sequence[Dims]) -> Any:
    """Along dimension 2."""
    return cat(site, [_with_rank(t, 3) for t in tensors], 2)


@rule(aten.column_stack.default)
def column_stack(site: Site, tensors: Sequence[Dims]) -> Any:
    """Along dimension 1; a vector is a column."""
    return cat(site, [(*t, *(ONE,) * (2 - len(t))) for t in tensors], 1)


@rule(aten.block_diag.default)
def block_diag(site: Site, tensors: Sequence[Dims]) -> Dims:
    """Matrices along the diagonal of a larger one; a vector is a row."""
    blocks = [_with_rank(t, 2) for t in tensors]
    return concat([b[0] for b in blocks]), concat([b[1] for b in blocks])


@rule(aten.broadcast_tensors.default)
def broadcast_tensors(site: Site, tensors: Sequence[Dims]) -> list[Dims]:
    """All are stretched to their common shape."""
    return [site.broadcast(*tensors)] * len(tensors)


@rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(site: Site, tensors: Sequence[Dims], *_: Any, indexing: str = "ij") -> list[Dims]:
    """Every tensor gives one dimension to all results; `xy` swaps the first two."""
    dims = [t[0] if t else ONE for t in tensors]
    if indexing == "xy" and len(dims) > 1:
        dims[:2] = dims[1::-1]
    return [tuple(dims)] * len(tensors)


@rule(aten.cartesian_prod.default)
def cartesian_prod(site: Site, tensors: Sequence[Dims]) -> Dims:
    """Every combination of entries is one row."""
    rows = product([t[0] for t in tensors])
    return (rows,) if len(tensors) == 1 else (rows, Fixed(len(tensors), "one for each factor of a product"))


# ---------------------------------------------------------------------- cutting
def _along(name: str, x: Sequence[Any]) -> int:
    return {"hsplit": min(1, len(x) - 1), "vsplit": 0, "dsplit": 2}[name]


def _parts(node: fx.Node) -> str:
    return str(node.target.overloadpacket.__name__)  # type: ignore[union-attr]


def _part_sizes(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """Unequal parts after pruning: `split_with_sizes`."""
    dim, outs = _along(_parts(node), rw.dims(args["self"])), rw.dims(node)
    if not any(rw.cut(o[dim]) for o in outs):
        return {}
    sizes = [rw.size(o[dim]) for o in outs]
    return {"": aten.split_with_sizes.default, "self": args["self"], "split_sizes": sizes, "dim": dim}


@rule(aten.hsplit, aten.vsplit, aten.dsplit, literals=_part_sizes)
def split_named(site: Site, x: Dims, _parts_or_indices: Any) -> list[Dims]:
    return cut_along(site, x, _along(_parts(site.node), x))


@rule(aten.as_strided.default)
def as_strided(site: Site, x: Dims, *_: Any) -> Any:
    """Memory is read at places that are counted, whatever the shape."""
    for d in x:
        site.freeze(d, "its memory is read at counted places")
    return site.outputs("memory read at counted places")


# ---------------------------------------------------------------------- order of indices
@rule(aten.fliplr.default, aten.flipud.default)
def flip_named(site: Site, x: Dims) -> Any:
    return flip(site, x, [1 if _parts(site.node) == "fliplr" else 0])


@rule(aten.rot90.default)
def rot90(site: Site, x: Dims, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    """Quarter turns in a plane: an odd number swaps its two dimensions."""
    result = list(flip(site, x, dims))
    if k % 2:
        a, b = dims
        result[a], result[b] = result[b], result[a]
    return tuple(result)


# ---------------------------------------------------------------------- diagonals
def _common(site: Site, a: Dim, b: Dim, offset: int, size: Any) -> Dim:
    """The main diagonal of a square takes the same index of both dimensions, any other one counts."""
    if offset == 0 and size_of(a) == size_of(b):
        return site.unify(a, b)
    for d in (a, b):
        site.freeze(d, "a diagonal of it is taken that is not the main one of a square")
    return Fixed(size, "a diagonal")


@rule(aten.diagonal.default)
def diagonal(site: Site, x: Dims, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dims:
    """Two dimensions become one, which comes last."""
    a, b = positive(dim1, len(x)), positive(dim2, len(x))
    rest = [d for i, d in enumerate(x) if i not in (a, b)]
    return (*rest, _common(site, x[a], x[b], offset, site.shape[-1]))


@rule(aten.linalg_diagonal.default)
def linalg_diagonal(site: Site, x: Dims, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    return diagonal(site, x, offset, dim1, dim2)


@rule(aten.diagonal_scatter.default)
def diagonal_scatter(site: Site, x: Dims, source: Dims, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dims:
    """A diagonal is overwritten."""
    a, b = positive(dim1, len(x)), positive(dim2, len(x))
    site.unify(_common(site, x[a], x[b], offset, size_of(source[-1])), source[-1])
    rest = iter(site.broadcast(tuple(d for i, d in enumerate(x) if i not in (a, b)), source[:-1]))
    return tuple(site.axes.resolve(d) if i in (a, b) else next(rest) for i, d in enumerate(x))


@rule(aten.diag_embed.default)
def diag_embed(site: Site, x: Dims, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Dims:
    """The last dimension becomes the diagonal of two."""
    rank = len(x) + 1
    a, b = positive(dim1, rank), positive(dim2, rank)
    side = x[-1]
    if offset:
        site.freeze(side, "it is put on a diagonal that is not the main one")
        side = Fixed(site.shape[a], "a diagonal")
    rest = iter(x[:-1])
    return tuple(side if i in (a, b) else next(rest) for i in range(rank))


@rule(aten.diag.default)
def diag(site: Site, x: Dims, offset: int = 0) -> Any:
    """A vector becomes the diagonal of a matrix, a matrix gives its own."""
    return diag_embed(site, x, offset) if len(x) == 1 else diagonal(site, x, offset)


@rule(aten.trace.default)
def trace(site: Site, x: Dims) -> Dims:
    """The sum of a diagonal."""
    _common(site, x[0], x[1], 0, 0)
    return ()
