"""Operators that rank entries, or look for their place in an order: what is ranked stays whole, the others pass."""

from __future__ import annotations

from typing import Any

from fxprune.axes import Fixed
from fxprune.rules.core import Dims, Site, aten, positive, rule
from fxprune.rules.reduction import reduced


@rule(aten.cummax.default, aten.cummin.default)
def running(site: Site, x: Dims, dim: int) -> list[Dims]:
    """The largest so far, and its index."""
    at = positive(dim, len(x))
    kept = site.freeze(x[at], "it is accumulated index by index") if x else None
    return [(*x[:at], kept, *x[at + 1 :]) if kept is not None else x] * 2


@rule(aten.msort.default)
def msort(site: Site, x: Dims) -> Dims:
    """Sorted along dimension 0."""
    return (site.freeze(x[0], "its entries are ranked"), *x[1:])


@rule(aten.median.default, aten.nanmedian.default)
def median(site: Site, x: Dims) -> Dims:
    for d in x:
        site.freeze(d, "its entries are ranked")
    return ()


@rule(aten.median.dim, aten.nanmedian.dim, aten.mode.default)
def median_along(site: Site, x: Dims, dim: int = -1, keepdim: bool = False) -> list[Dims]:
    """An entry in the middle, or the most frequent one, and its index."""
    site.freeze(x[dim], "its entries are ranked")
    return [reduced(x, dim, keepdim)] * 2


@rule(aten.kthvalue.default)
def kthvalue(site: Site, x: Dims, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return median_along(site, x, dim, keepdim)


@rule(aten.quantile.scalar, aten.quantile.default, aten.nanquantile.scalar, aten.nanquantile.default)
def quantile(site: Site, x: Dims, q: Any, dim: int | None = None, keepdim: bool = False, **_: Any) -> Dims:
    """One dimension, or all, become one number; several quantiles come first."""
    for d in x if dim is None else [x[dim]]:
        site.freeze(d, "its entries are ranked")
    first = q if isinstance(q, tuple) else ()
    for d in first:
        site.freeze(d, "quantiles")
    return (*first, *reduced(x, dim, keepdim))


@rule(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(site: Site, order: Dims, x: Any, *_: Any, **options: Any) -> Dims:
    """order (..., n) or (n) and x (..., m) or (m) -> the place of each entry of x."""
    sorter = options.get("sorter")
    for dims in (order, sorter or ()):
        site.freeze(dims[-1], "places in it are looked for") if dims else None
    if not isinstance(x, tuple):
        return ()
    if len(order) > 1:
        site.broadcast((*order[:-1], Fixed(1)), (*x[:-1], Fixed(1)))
    return tuple(site.axes.resolve(d) for d in x)


@rule(aten.bucketize.Tensor, aten.bucketize.Scalar)
def bucketize(site: Site, x: Any, borders: Dims, **_: Any) -> Dims:
    """The place of each entry of x between borders."""
    site.freeze(borders[0], "places in it are looked for")
    return x if isinstance(x, tuple) else ()


@rule(aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar, aten.isin.Scalar_Tensor)
def isin(site: Site, x: Any, among: Any, **_: Any) -> Dims:
    """Whether each entry of x is among others."""
    for d in among if isinstance(among, tuple) else ():
        site.freeze(d, "its entries are looked for")
    return x if isinstance(x, tuple) else ()


@rule(aten.trapezoid.x, aten.trapezoid.dx, aten.trapz.x, aten.trapz.dx)
@rule(aten.cumulative_trapezoid.x, aten.cumulative_trapezoid.dx)
def trapezoid(site: Site, y: Dims, x: Any = None, *, dim: int = -1, **_: Any) -> Dims:
    """Neighbours are added along one dimension, and summed up or accumulated."""
    at = positive(dim, len(y))
    site.freeze(y[at], "neighbouring indices are added")
    for d in x if isinstance(x, tuple) else ():
        site.freeze(d, "places of neighbours")
    left = (Fixed(site.shape[at], "between neighbours"),) if len(site.shape) == len(y) else ()
    return (*y[:at], *left, *y[at + 1 :])


@rule(aten.gradient.scalarint, aten.gradient.array)
def gradient(site: Site, x: Dims, *_: Any, dim: Any = None, **__: Any) -> list[Dims]:
    """Differences of neighbours along some dimensions, one result for each."""
    named = range(len(x)) if dim is None else [dim] if isinstance(dim, int) else dim
    for d in named:
        site.freeze(x[d], "neighbouring indices are subtracted")
    return [tuple(site.axes.resolve(d) for d in x)] * len(site.shape)


@rule(aten.multinomial.default)
def multinomial(site: Site, x: Dims, *_: Any, **__: Any) -> Dims:
    """Indices are drawn by their weights."""
    site.freeze(x[-1], "indices of it are drawn")
    return (*x[:-1], Fixed(site.shape[-1], "drawn indices"))
