"""Mixtures of experts: one matrix for each run of consecutive rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.axes import Misfit
from fxprune.rules.core import Dims, Site, aten, rule


@rule(aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
def grouped_mm(site: Site, x: Dims, weight: Dims, offsets: Dims | None = None, *rest: Any, **_: Any) -> Dims:
    """x (rows, in), weight (experts, in, out), offsets (experts), where each expert's rows end -> (rows, out).

    Experts can be removed where the offsets come from a histogram of the indices that a router chose.
    """
    if len(x) != 2 or len(weight) != 3 or offsets is None or any(r is not None for r in rest):
        raise Misfit("only rows sorted by expert are multiplied with matrices of experts")
    site.freeze(x[0], "rows are dealt to experts")
    site.unify(x[1], weight[1])
    counted = site.counted.get(site.node.args[2])  # type: ignore[arg-type]
    if counted is not None and counted.kind == "offsets":
        site.unify(weight[0], counted.dim)
    else:
        site.freeze(weight[0], "its rows belong to it by number")
    site.unify(offsets[0], weight[0])
    if site.node.target is aten._grouped_mm.default:
        for d in weight[1:]:
            site.freeze(d, "torch's grouped product takes rows of a multiple of 16 bytes only")
    site.multiply(x[0], *weight[1:])
    return (x[0], weight[2])


def by_expert(x: Tensor, weight: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the grouped product in any precision: torch's kernel takes no double one."""
    result = torch.zeros(len(x), weight.shape[2], dtype=x.dtype, device=x.device)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        result[start:end] = x[start:end] @ weight[expert]
        start = end
    return result
