"""Orders of axes in which n:m keeps more, jointly for all layers that share one.

An axis may be put in any order as long as every tensor that carries it follows; the model computes the same. For the
inputs of the layers that sum over it the order says which of them share a group of m.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.analyse import Analysis
from fxprune.groups import Group, positions
from fxprune.kept import Indices, Kept
from fxprune.passes.consumers import Contraction
from fxprune.passes.patterns.pattern import NOfM
from fxprune.passes.patterns.permute import permutation

#: Rows that an order is looked for on: more, drawn at random, say little more.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Ordered:
    """What the order of one group's units does for the layers that read it.

    Attributes:
        plain, found: the share of their weights' magnitude that the pattern keeps, before and after.
    """

    group: str
    plain: float
    found: float


def ordered(
    analysis: Analysis,
    groups: Sequence[Group],
    kept: Kept,
    layers: Mapping[Contraction, Tensor],
    pattern: NOfM,
    seed: int = 0,
) -> tuple[Kept, list[Ordered]]:
    """Return what is kept in the order in which the pattern keeps the most of the layers.

    Args:
        groups: those that may be put in another order.
        layers: that get the pattern, each with its kept weight as a matrix (out, kernel positions, channels).
    """
    result: dict[object, Indices] = {axis: kept[axis] for axis in kept}
    said: list[Ordered] = []
    for group in groups:
        units = kept[group.axis] if group.axis in kept else np.arange(group.size)
        pieces = [
            piece
            for c, matrix in layers.items()
            for piece in _pieces(analysis, kept, group, units, c, matrix, pattern.m)
        ]
        if not pieces or len(units) <= pattern.m or len(units) % pattern.m:
            continue
        scores = torch.cat(pieces).abs()
        sample = scores
        if len(scores) > _ROWS:
            generator = torch.Generator().manual_seed(seed)
            sample = scores[torch.randperm(len(scores), generator=generator)[:_ROWS]]
        found = permutation(sample, pattern.n, pattern.m, seed)
        before, after = (_share(s, pattern) for s in (scores, scores[:, torch.from_numpy(found.order)]))
        if after > before:  # on all rows, not on the sample alone
            result[group.axis] = units[found.order]
            said.append(Ordered(group.name, before, after))
    return Kept(result, kept.removed), said  # type: ignore[arg-type]


def _share(scores: Tensor, pattern: NOfM) -> float:
    kept = scores.double().reshape(len(scores), -1, pattern.m).topk(pattern.n, dim=2).values.sum()
    return float(kept / scores.double().sum().clamp_min(1e-300))


def _pieces(
    analysis: Analysis, kept: Kept, group: Group, units: Indices, c: Contraction, matrix: Tensor, m: int
) -> Iterator[Tensor]:
    """The columns of a matrix that are the group's units in their order, one piece (rows, units) for each such run.

    Runs that do not begin where a group of m does share that group with others, and are left out.
    """
    dim = analysis.dims[c.operand][c.channel]
    for of in positions(dim, group.axis):
        at = of[kept.index(dim)]
        for start in np.flatnonzero(at == units[0]):
            if start % m == 0 and np.array_equal(at[start : start + len(units)], units):
                yield matrix[:, :, start : start + len(units)].reshape(-1, len(units))
