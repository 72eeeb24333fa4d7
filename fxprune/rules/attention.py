"""Scaled dot product attention as one operator."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fxprune.axes import ONE, divide, product, size_of
from fxprune.rules.core import Dims, Literals, Site, aten, rule


def _scale(rw: Literals, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """The default scale is the root of the head size: bake the dense one in before the head size changes."""
    width = rw.dims(args["query"])[-1]
    if args.get("scale") is not None or not rw.cut(width):
        return {}
    size = size_of(width)
    assert isinstance(size, int)
    return {"scale": 1.0 / math.sqrt(size)}


@rule(aten.scaled_dot_product_attention.default, literals=_scale)
def attention(
    site: Site,
    query: Dims,
    key: Dims,
    value: Dims,
    mask: Dims | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    enable_gqa: bool = False,
    **_: Any,
) -> Dims:
    """query (..., H, L, E), key (..., H, S, E), value (..., H, S, V), mask (..., H, L, S) -> (..., H, L, V).

    With `enable_gqa`, key and value have fewer heads, each of which serves a run of consecutive query heads.
    """
    site.unify(query[-1], key[-1])
    for d in (query[-2], key[-2], value[-2]):
        site.freeze(d, "it is a sequence of positions")
    heads = query[:-2]
    if enable_gqa and len(query) > 2 and size_of(query[-3]) != size_of(key[-3]):
        site.broadcast(key[:-2], value[:-2])
        groups, repeat = site.axes.split(query[-3], size_of(key[-3]), site.node)
        site.freeze(repeat, "query heads that share one key head are one unit")
        site.unify(groups, key[-3])
        site.broadcast((*query[:-3], ONE), (*key[:-3], ONE))
        heads = (*query[:-3], site.axes.resolve(product([groups, repeat])))
        assert divide(size_of(heads[-1]), size_of(key[-3])) is not None
    else:
        heads = site.broadcast(query[:-2], key[:-2], value[:-2])
    if mask is not None:
        site.broadcast(mask, (*heads, query[-2], key[-2]))
    site.multiply(*heads, query[-2], key[-2], query[-1])
    site.multiply(*heads, query[-2], key[-2], value[-1])
    return (*heads, query[-2], value[-1])
