"""Where the samples of a batch are in an activation: in a dimension of their own, or merged with others by a reshape.

Sizes alone do not say whether a dimension of batch times tokens holds one sample after the other, or one token of all
samples after the other. A change of one sample of two does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxprune.axes import size_of
from fxprune.errors import NonFiniteError
from fxprune.passes.calibration import Batch
from fxprune.passes.observe import observe
from fxprune.proof_inputs import random_inputs

if TYPE_CHECKING:
    from fxprune.analyse import Analysis


@dataclass(frozen=True, slots=True)
class Layout:
    """Position p of dimension `dim` belongs to sample (p // inner) % samples.

    Attributes:
        dim: the dimension that samples are in.
        inner: how many positions of one sample follow each other; None where these are all that it has.
    """

    dim: int
    inner: int | None = None

    def samples(self, length: int, samples: int) -> Tensor:
        """Return the number of the sample of each position.

        >>> Layout(0).samples(6, 2).tolist(), Layout(0, 1).samples(6, 2).tolist()
        ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1])
        """
        return torch.arange(length) // (self.inner or length // samples) % samples


def layouts(analysis: Analysis, nodes: Iterable[fx.Node], seed: int = 0) -> Mapping[fx.Node, Layout]:
    """Return where the samples are in the values of some nodes; what cannot be told, or has no batch, is left out.

    The graph runs twice on two samples, of which the second stays the same: what differs is of the first.
    """
    captured = analysis.captured
    batched = {place for s in captured.symbols if s.name == "batch" for place in s.places}
    wanted = dict.fromkeys(n for n in nodes if n.op == "call_function")
    if not batched or not wanted:
        return {}
    names = [str(n.target) for n in captured.graph.nodes if n.op == "placeholder"]
    one, other = (random_inputs(captured, seed + i, batch=2) for i in range(2))
    mixed = [
        torch.cat([b[:1], a[1:]]) if (name, 0) in batched else a for name, a, b in zip(names, one, other, strict=True)
    ]
    values: dict[fx.Node, list[Tensor]] = {node: [] for node in wanted}
    try:
        observe(analysis, [Batch(one), Batch(mixed)], {node: values[node].append for node in wanted})
    except (RuntimeError, IndexError, NonFiniteError):  # not every graph takes every number
        return {}
    found = {node: _layout(analysis, node, *pair) for node, pair in values.items()}
    return {node: layout for node, layout in found.items() if layout is not None}


def _layout(analysis: Analysis, node: fx.Node, a: Tensor, b: Tensor) -> Layout | None:
    """The first way of cutting a dynamic dimension that has all differences in the first sample.

    How many positions follow each other is known only at this size, unless these are all of a sample or one.
    """
    only_batch = len(analysis.captured.symbols) == 1
    changed = (a != b).nonzero()
    for dim, size in enumerate(map(size_of, analysis.dims[node])):
        length = a.shape[dim]
        if isinstance(size, int) or length % 2 or not len(changed):
            continue
        each = length // 2
        for inner in [n for n in range(each, 0, -1) if each % n == 0]:
            if not bool((changed[:, dim] // inner % 2).any()):
                if inner == each:
                    return Layout(dim)
                return Layout(dim, inner) if only_batch or inner == 1 else None
    return None
