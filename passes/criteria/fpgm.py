"""FPGM: units whose weights others nearly have as well go first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxprune.axes import Axis, Dim
from fxprune.groups import Group, positions
from fxprune.passes.registries import criterion
from fxprune.passes.scales import normalised
from fxprune.passes.statistics import Scores, Statistics


@criterion("fpgm")
def fpgm(group: Group, statistics: Statistics, *, normalize: str = "mean") -> Scores:
    """How far the unit's weights are from those of the other units: sum over v of |w_u - w_v|.

    w_u is what makes the unit: its rows of all matrices, kernels and embeddings that give the group, one behind the
    other, without those that read it. Where there are none it is all that the unit cuts. He et al., "Filter Pruning via
    Geometric Median" (2019).

    Args:
        normalize: what scores are divided by to be comparable across groups: the group's mean, max, or none.
    """
    vectors = _made(group, statistics)
    distances = torch.cdist(vectors, vectors).sum(1)
    return normalised(distances.numpy(), normalize, "fpgm")


def _made(group: Group, statistics: Statistics) -> Tensor:
    """The weights that give each unit, float64 (units, weights)."""
    reading = {(c.weight, 0 if c.kind in ("product", "transposed") else 1) for c in statistics.consumers(group)}
    members = statistics.parameters(group)
    matrices = [m for m in members if statistics.weight(m[0]).dim() > 1]
    chosen = [m for m in matrices if m not in reading] or matrices or members
    dims = statistics.analysis.tensors
    return torch.cat([_rows(statistics.weight(n), dims[n][d], d, group.axis) for n, d in chosen], 1)


def _rows(weight: Tensor, dim: Dim, number: int, axis: Axis) -> Tensor:
    """A parameter's entries by unit of an axis, (units, entries)."""
    flat = weight.double().cpu().movedim(number, 0).flatten(1)
    parts = []
    for units in positions(dim, axis):
        order = np.argsort(units, kind="stable")[int((units < 0).sum()) :]
        parts.append(flat[torch.from_numpy(order)].reshape(axis.size, -1))
    return torch.cat(parts, 1)
