"""Operators that reduce, scan or rank a dimension.

Reducing a pruned axis is legal: it means "as if what was removed were not there". Scanning or ranking it is not.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.axes import ONE, Concat, Fixed, size_of
from fxprune.rules.core import Counted, Dims, Literals, Site, aten, positive, rule


def reduced(x: Dims, dims: Any, keepdim: bool) -> Dims:
    """The dimensions that are left."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        gone = set(range(len(x)))
    else:
        gone = {positive(d, len(x)) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    return tuple(ONE if i in gone else d for i, d in enumerate(x) if keepdim or i not in gone)


@rule(aten.sum, aten.mean, aten.amax, aten.amin, aten.logsumexp, aten.prod.dim_int, aten.prod.default, aten.nansum)
@rule(aten.any.dim, aten.any.default, aten.all.dim, aten.all.default, aten.max.default, aten.min.default)
@rule(aten.any.dims, aten.all.dims, aten.count_nonzero.default, aten.count_nonzero.dim_IntList, aten.nanmean)
def reduce(site: Site, x: Dims, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.linalg_vector_norm.default)
def vector_norm(site: Site, x: Dims, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.norm.ScalarOpt_dim_dtype, aten.norm.ScalarOpt_dtype)
def norm(site: Site, x: Dims, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.frobenius_norm.dim)
def frobenius_norm(site: Site, x: Dims, dims: Any, keepdim: bool = False) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.linalg_norm.default, aten.linalg_norm.ord_str)
def linalg_norm(site: Site, x: Dims, order: Any = None, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    """Of vectors, of matrices where two dimensions are named, of all entries where nothing is."""
    if order is None:
        return reduced(x, dims, keepdim)
    return matrix_norm(site, x, order, range(len(x)) if dims is None else dims, keepdim)  # type: ignore[no-any-return]


@rule(aten.linalg_matrix_norm.default, aten.linalg_matrix_norm.str_ord)
def matrix_norm(
    site: Site, x: Dims, order: Any = "fro", dims: Sequence[int] = (-2, -1), keepdim: bool = False, **_: Any
) -> Dims:
    """Sums and singular values that are zero do not show in a norm, unless the smallest is asked for."""
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not isinstance(order, str) and order < 0:
        for d in dims:
            site.freeze(x[d], "the smallest of its entries counts")
    return reduced(x, dims, keepdim)


@rule(aten.renorm.default)
def renorm(site: Site, x: Dims, order: Any, dim: int, _most: Any) -> Dims:
    """Every slice along a dimension is scaled down to a norm."""
    return x


def _enough(site: Site, x: Dims, dims: Any, correction: float) -> None:
    """An unbiased variance divides by one less than the number of entries."""
    if correction > 0:
        for d in x if dims is None else [x[i] for i in (dims if isinstance(dims, list | tuple) else [dims])]:
            site.at_least(d, int(correction) + 1)


@rule(aten.var.correction, aten.std.correction)
def variance(site: Site, x: Dims, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Dims:
    _enough(site, x, dims, 1 if correction is None else correction)
    return reduced(x, dims, keepdim)


@rule(aten.var.dim, aten.std.dim)
def variance_dim(site: Site, x: Dims, dims: Any, unbiased: bool = True, keepdim: bool = False) -> Dims:
    _enough(site, x, dims, int(unbiased))
    return reduced(x, dims, keepdim)


@rule(aten.var.default, aten.std.default)
def variance_of_all(site: Site, x: Dims, unbiased: bool = True) -> Dims:
    return variance_dim(site, x, list(range(len(x))), unbiased)  # type: ignore[no-any-return]


@rule(aten.var_mean.default, aten.std_mean.default)
def variance_of_all_and_mean(site: Site, x: Dims, unbiased: bool = True) -> list[Dims]:
    return [variance_of_all(site, x, unbiased)] * 2


@rule(aten.var_mean.dim, aten.std_mean.dim)
def variance_dim_and_mean(site: Site, x: Dims, dims: Any, unbiased: bool = True, keepdim: bool = False) -> list[Dims]:
    return [variance_dim(site, x, dims, unbiased, keepdim)] * 2


@rule(aten.aminmax.default)
def aminmax(site: Site, x: Dims, *, dim: int | None = None, keepdim: bool = False) -> list[Dims]:
    """The smallest and the largest of what is kept."""
    return [reduced(x, dim, keepdim)] * 2


@rule(aten.var_mean.correction, aten.std_mean.correction)
def variance_and_mean(
    site: Site, x: Dims, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> list[Dims]:
    _enough(site, x, dims, 1 if correction is None else correction)
    return [reduced(x, dims, keepdim)] * 2


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
@rule(aten._safe_softmax.default, aten.special_softmax.default, aten.special_log_softmax.default)
def softmax(site: Site, x: Dims, dim: int, *_: Any, **__: Any) -> Dims:
    """Shares of what is kept; learned positions beside those of the input stay, as they do in fused attention."""
    d = site.axes.resolve(x[dim]) if x else ONE
    if isinstance(d, Concat) and any(isinstance(part, Fixed) for part in d.parts):
        site.freeze(d, "a softmax weighs it against fixed entries")
    return x


@rule(aten.cumprod.default, aten.logcumsumexp.default)
def scan(site: Site, x: Dims, dim: int, **_: Any) -> Dims:
    result = list(x)
    result[dim] = site.freeze(x[dim], "it is accumulated index by index")
    return tuple(result)


@rule(aten.diff.default)
def diff(site: Site, x: Dims, n: int = 1, dim: int = -1, *rest: Any) -> Dims:
    site.freeze(x[dim], "neighbouring indices are subtracted")
    outs: Dims = site.outputs("differences of neighbours")
    return tuple(outs[i] if i == positive(dim, len(x)) else d for i, d in enumerate(x))


def _indices(site: Site, x: Dims, dim: int, result: fx.Node | None) -> None:
    """The node holds indices of x's dimension; while they are only used as such it can be cut (`fxprune.counted`)."""
    if result is not None:
        site.counted[result] = Counted(x[dim], "index")


def _second(node: fx.Node) -> fx.Node | None:
    """The node that takes the second result."""
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == 1), None)


@rule(aten.topk.default)
def topk(site: Site, x: Dims, k: int, dim: int = -1, *_: Any, **__: Any) -> list[Dims]:
    """The k largest or smallest of what is kept, and their indices."""
    dim = positive(dim, len(x))
    site.at_least(x[dim], k)
    _indices(site, x, dim, _second(site.node))
    return [tuple(Fixed(k, "ranked entries") if i == dim else d for i, d in enumerate(x))] * 2


@rule(aten.argmax.default, aten.argmin.default)
def arg(site: Site, x: Dims, dim: int | None = None, keepdim: bool = False) -> Dims:
    if dim is None:
        for d in x:
            site.freeze(d, "the index of its largest entry is used")
    else:
        _indices(site, x, dim, site.node)
    return reduced(x, dim, keepdim)


@rule(aten.max.dim, aten.min.dim)
def arg_and_value(site: Site, x: Dims, dim: int, keepdim: bool = False) -> list[Dims]:
    _indices(site, x, dim, _second(site.node))
    return [reduced(x, dim, keepdim)] * 2


@rule(aten.sort.default, aten.sort.stable, aten.argsort.default)
def rank(site: Site, x: Dims, *args: Any, **kwargs: Any) -> Any:
    """The ranked dimension is frozen whole; the others pass."""
    dim = kwargs.get("dim", args[0] if args else -1)
    dim = positive(dim, len(x))
    site.freeze(x[dim], "its entries are ranked")
    outs: Any = site.outputs("ranked entries")
    merged = [
        tuple(o[i] if i == dim else d for i, d in enumerate(x)) for o in (outs if isinstance(outs, list) else [outs])
    ]
    return merged if isinstance(outs, list) else merged[0]


@rule(aten.cross.default, aten.linalg_cross.default)
def cross(site: Site, a: Dims, b: Dims, dim: int | None = -1) -> Dims:
    """Vectors of three entries; where no dimension is named, the first that is so long."""
    at = dim if dim is not None else next((i for i, d in enumerate(a) if size_of(d) == 3), -1)
    for dims in (a, b):
        site.freeze(dims[at], "it holds the coordinates of a vector product")
    return site.broadcast(a, b)


@rule(aten.glu.default)
def glu(site: Site, x: Dims, dim: int = -1) -> Dims:
    """Two halves, multiplied after one went through a sigmoid."""
    dim = positive(dim, len(x))
    half: Sequence[Any] = site.shape[dim]
    first, second = site.axes.cut(x[dim], [half, half], site.node)  # type: ignore[list-item]
    return (*x[:dim], site.unify(first, second), *x[dim + 1 :])


def _bins(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    (bins,) = rw.dims(node)
    return {"bins": rw.size(bins), "max": rw.size(bins) - 1} if rw.cut(bins) else {}


@rule(aten.histc.default, literals=_bins)
def histc(site: Site, x: Dims, bins: int = 100, low: Any = 0, high: Any = 0) -> Dims:
    """Of indices of an axis, one bin for each of them: a histogram along the axis."""
    for d in x:
        site.freeze(d, "its entries are counted together")
    source = site.node.args[0]
    counted = site.counted.get(source)  # type: ignore[arg-type]
    if counted is None:
        return (Fixed(bins, "bins"),)
    if counted.kind != "index" or (bins, low, high) != (size_of(counted.dim), 0, bins - 1):
        site.freeze(counted.dim, "its indices are counted in bins of another number")
        return (Fixed(bins, "bins"),)
    site.counted[site.node] = Counted(counted.dim, "histogram")
    return (site.axes.resolve(counted.dim),)


@rule(aten.cumsum.default)
def cumsum(site: Site, x: Dims, dim: int, **_: Any) -> Dims:
    """Summing up a histogram of indices, what is removed adds nothing; any other dimension stays whole."""
    counted = site.counted.get(site.node.args[0])  # type: ignore[arg-type]
    return x if counted is not None and counted.kind == "histogram" else scan(site, x, dim)
