"""Normalisation layers. Statistics taken over a pruned axis are those of what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.axes import ONE, product, size_of
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


def _native_shape(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    dims, shape = rw.dims(node)[0], args["normalized_shape"]
    return {"normalized_shape": [rw.size(d) for d in dims[len(dims) - len(shape) :]]}


@rule(aten.native_layer_norm.default, literals=_native_shape)
def native_layer_norm(site: Site, x: Dims, shape: Sequence[int], *rest: Any) -> list[Dims]:
    """The same with its statistics: what layer norm is made of, as `torch.vmap` records it."""
    layer_norm(site, x, shape, *rest)
    statistics = (*x[: len(x) - len(shape)], *(ONE,) * len(shape))
    return [x, statistics, statistics]


@rule(aten.fake_quantize_per_channel_affine.default)
def fake_quantize(site: Site, x: Dims, scale: Dims, zero: Dims, axis: int, *_: Any) -> Dims:
    """Rounded with a scale and a zero point for each index along an axis."""
    for vector in (scale, zero):
        site.unify(x[axis], vector[0])
    return x


@rule(aten.fake_quantize_per_tensor_affine)
def fake_quantize_whole(site: Site, x: Dims, *_: Any) -> Dims:
    """Rounded with one scale and one zero point."""
    return x


def _num_groups(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    major, _ = rw.split(rw.dims(args["input"])[1], args["num_groups"])
    return {"num_groups": rw.size(major)}


@rule(aten.group_norm.default, literals=_num_groups)
def group_norm(site: Site, x: Dims, groups: int, *rest: Any) -> Dims:
    """x (N, groups * C, ...), normalised over C and what follows; weight and bias (groups * C)."""
    _, minor = site.axes.split(x[1], groups, site.node)
    if len(x) == 2 and size_of(minor) != 1:
        site.at_least(minor, 2)  # torch refuses to normalise single numbers
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


def kept_norms(weights: Any, v: str, dims: Dims, dim: int, kept: Any) -> Tensor:
    """The share of its norm that each slice of a weight along `dim` keeps, (1, ..., kept, ..., 1) in double precision.

    Args:
        weights: tensor name -> its dense value.
        v: name of the weight; `dims` are its dimensions.
    """
    others = [i for i in range(len(dims)) if i != dim]
    dense = weights(v).double()
    whole = torch.linalg.vector_norm(dense, dim=others, keepdim=True)
    left = torch.linalg.vector_norm(kept.select(dense, dims), dim=others, keepdim=True)
    whole = kept.select(whole, tuple(d if i == dim else ONE for i, d in enumerate(dims)))
    result: Tensor = left / whole.clamp_min(1e-300)
    return result


@rule(aten._weight_norm.default)
def weight_norm(site: Site, v: Dims, g: Dims, dim: int = 0) -> Dims:
    """v scaled to the norm g in each slice along `dim`.

    What is removed from a slice takes no part in its norm; the rewriter lowers g by as much (`kept_norms`), so that the
    scaled weights stay what they were. It can where both are parameters of this one operator.
    """
    operands = site.node.all_input_nodes
    alone = len(operands) == 2 and all(n.op == "get_attr" and len(n.users) == 1 for n in operands)
    for i, d in enumerate(v):
        if len(g) == len(v) and i == positive(dim, len(v)):
            site.unify(d, g[i])
        elif not alone:
            site.freeze(d, "a norm is taken over it, which more than this weight depends on")
    return tuple(site.axes.resolve(d) for d in v)
