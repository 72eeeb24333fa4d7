"""Normalisation layers. Statistics taken over a pruned axis are those of what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxprune.axes import product
from fxprune.rules.core import Dims, Literals, Site, aten, positive, rule


@rule(aten.batch_norm.default)
def batch_norm(site: Site, x: Dims, *rest: Any) -> Dims:
    """x (N, C, ...); weight, bias, running mean and variance (C)."""
    for vector in rest[:4]:
        if vector is not None:
            site.unify(x[1], vector[0])
    return x


@rule(aten.instance_norm.default)
def instance_norm(site: Site, x: Dims, *rest: Any) -> Dims:
    """x (N, C, ...), normalised over what follows C; weight, bias, running statistics (C)."""
    for d in x[2:]:
        site.freeze(d, "it is a spatial dimension")
    return batch_norm(site, x, *rest)  # type: ignore[no-any-return]


def _normalized_shape(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    dims = rw.dims(node)
    shape = args["normalized_shape"]
    return {"normalized_shape": [rw.size(d) for d in dims[len(dims) - len(shape) :]]}


@rule(aten.layer_norm.default, aten.rms_norm.default, literals=_normalized_shape)
def layer_norm(site: Site, x: Dims, shape: Sequence[int], *rest: Any) -> Dims:
    """Normalised over the last dimensions; weight and bias have their shape."""
    dims = x[len(x) - len(shape) :]
    for vector in rest:
        if isinstance(vector, tuple):
            for d, w in zip(dims, vector, strict=True):
                site.unify(d, w)
    return x


def _num_groups(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    major, _ = rw.split(rw.dims(args["input"])[1], args["num_groups"])
    return {"num_groups": rw.size(major)}


@rule(aten.group_norm.default, literals=_num_groups)
def group_norm(site: Site, x: Dims, groups: int, *rest: Any) -> Dims:
    """x (N, groups * C, ...), normalised over C and what follows; weight and bias (groups * C)."""
    site.axes.split(x[1], groups, site.node)
    for vector in rest[:2]:
        if vector is not None:
            site.unify(x[1], vector[0])
    for d in x[2:]:
        site.freeze(d, "it is a spatial dimension")
    return x


@rule(aten.prelu.default)
def prelu(site: Site, x: Dims, weight: Dims) -> Dims:
    """One slope for all, or one for each channel."""
    if len(x) > 1 and product(weight) != product(()):
        site.unify(x[positive(1, len(x))], weight[0])
    return x
