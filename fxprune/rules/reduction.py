"""Operators that reduce, scan or rank a dimension.

Reducing a pruned axis is legal: it means "as if what was removed were not there". Scanning or ranking it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxprune.axes import ONE
from fxprune.rules.core import Dims, Site, aten, positive, rule


def reduced(x: Dims, dims: Any, keepdim: bool) -> Dims:
    """The dimensions that are left."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        gone = set(range(len(x)))
    else:
        gone = {positive(d, len(x)) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    return tuple(ONE if i in gone else d for i, d in enumerate(x) if keepdim or i not in gone)


@rule(aten.sum, aten.mean, aten.amax, aten.amin, aten.logsumexp, aten.prod.dim_int, aten.prod.default, aten.nansum)
@rule(aten.any.dim, aten.any.default, aten.all.dim, aten.all.default, aten.max.default, aten.min.default)
@rule(aten.any.dims, aten.all.dims, aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def reduce(site: Site, x: Dims, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.linalg_vector_norm.default)
def vector_norm(site: Site, x: Dims, order: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.norm.ScalarOpt_dim, aten.norm.Scalar)
def norm(site: Site, x: Dims, order: Any = 2, dims: Any = None, keepdim: bool = False) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.var.correction, aten.std.correction)
def variance(site: Site, x: Dims, dims: Any = None, *, keepdim: bool = False, **_: Any) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.var.dim, aten.std.dim)
def variance_dim(site: Site, x: Dims, dims: Any, unbiased: bool = True, keepdim: bool = False) -> Dims:
    return reduced(x, dims, keepdim)


@rule(aten.var_mean.correction)
def variance_and_mean(site: Site, x: Dims, dims: Any = None, *, keepdim: bool = False, **_: Any) -> list[Dims]:
    return [reduced(x, dims, keepdim)] * 2


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    return x


@rule(aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default)
def scan(site: Site, x: Dims, dim: int, **_: Any) -> Dims:
    result = list(x)
    result[dim] = site.freeze(x[dim], "it is accumulated index by index")
    return tuple(result)


@rule(aten.diff.default)
def diff(site: Site, x: Dims, n: int = 1, dim: int = -1, *rest: Any) -> Dims:
    site.freeze(x[dim], "neighbouring indices are subtracted")
    outs: Dims = site.outputs("differences of neighbours")
    return tuple(outs[i] if i == positive(dim, len(x)) else d for i, d in enumerate(x))


@rule(aten.argmax.default, aten.argmin.default)
def arg(site: Site, x: Dims, dim: int | None = None, keepdim: bool = False) -> Dims:
    for i in range(len(x)) if dim is None else [dim]:
        site.freeze(x[i], "the index of its largest entry is used")
    return reduced(x, dim, keepdim)


@rule(aten.max.dim, aten.min.dim)
def arg_and_value(site: Site, x: Dims, dim: int, keepdim: bool = False) -> list[Dims]:
    site.freeze(x[dim], "the index of its largest entry is used")
    return [reduced(x, dim, keepdim)] * 2


@rule(aten.sort.default, aten.sort.stable, aten.argsort.default, aten.topk.default)
def rank(site: Site, x: Dims, *args: Any, **kwargs: Any) -> Any:
    """The ranked dimension is frozen whole; the others pass."""
    number = 1 if site.node.target is aten.topk.default else 0
    dim = kwargs.get("dim", args[number] if len(args) > number else -1)
    dim = positive(dim, len(x))
    site.freeze(x[dim], "its entries are ranked")
    outs: Any = site.outputs("ranked entries")
    merged = [
        tuple(o[i] if i == dim else d for i, d in enumerate(x)) for o in (outs if isinstance(outs, list) else [outs])
    ]
    return merged if isinstance(outs, list) else merged[0]


@rule(aten.glu.default)
def glu(site: Site, x: Dims, dim: int = -1) -> Dims:
    """Two halves, multiplied after one went through a sigmoid."""
    dim = positive(dim, len(x))
    half: Sequence[Any] = site.shape[dim]
    first, second = site.axes.cut(x[dim], [half, half], site.node)  # type: ignore[list-item]
    return (*x[:dim], site.unify(first, second), *x[dim + 1 :])
