"""Depth: which blocks of a residual network go whole, and in which order.

A block is a branch that is added to the stream (`fxprune.blocks`): attention, an MLP, the inside of a residual unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.axes import atoms
from fxprune.blocks import Block
from fxprune.errors import InputError
from fxprune.kept import Kept
from fxprune.passes.calibration import Calibration
from fxprune.passes.observe import observe
from fxprune.registry import Registry

if TYPE_CHECKING:
    from fxprune.analyse import Analysis

#: (blocks, analysis, data, error of what is kept) -> the blocks in the order in which they go.
Depth = Callable[..., Iterator[Block]]

DEPTHS: Registry[Depth] = Registry("way to remove blocks")


@DEPTHS.register("influence")
def influence(
    blocks: Sequence[Block], analysis: Analysis, data: Calibration, error: Callable[[Kept], float]
) -> Iterator[Block]:
    """Blocks that change the direction of the stream the least go first: 1 - E cos(stream, stream + branch).

    The cosine is over the channels, the mean over samples and positions, of the dense model. Men et al., "ShortGPT"
    (2024), equation 1; Muralidharan et al., "Minitron" (2024).
    """
    sums = {b.total: [0.0, 0.0] for b in blocks}
    streams: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node) -> Callable[[Tensor], None]:
        def look(value: Tensor) -> None:
            if node in wanted:
                streams[node] = value
            for block in of.get(node, ()):
                dim = _channel(analysis, node)
                alike = torch.nn.functional.cosine_similarity(streams[block.stream], value, dim=dim).double()
                sums[node][0] += float((1 - alike).sum())
                sums[node][1] += alike.numel()

        return look

    wanted = {b.stream for b in blocks}
    of: dict[fx.Node, list[Block]] = {}
    for block in blocks:
        of.setdefault(block.total, []).append(block)
    for batch in data.batches:
        observe(analysis, [batch], {node: keep(node) for node in {*wanted, *of}})
        streams.clear()
    yield from sorted(blocks, key=lambda b: sums[b.total][0] / max(sums[b.total][1], 1.0))


@DEPTHS.register("greedy")
def greedy(
    blocks: Sequence[Block], analysis: Analysis, data: Calibration, error: Callable[[Kept], float]
) -> Iterator[Block]:
    """Each time the block goes without which the outputs on calibration data are nearest to the dense model's.

    Song et al., "SLEB" (2024), algorithm 1, with the error of the outputs in place of the loss.
    """
    left, removed = list(blocks), dict[fx.Node, fx.Node]()
    while left:
        best = min(left, key=lambda b: error(Kept({}, {**removed, b.total: b.stream})))
        removed[best.total] = best.stream
        left.remove(best)
        yield best


def _channel(analysis: Analysis, node: fx.Node) -> int:
    """The dimension of an activation that is made of units: the last of those, or the last of all."""
    dims = analysis.dims[node]
    free = [i for i, dim in enumerate(dims) if any(True for _ in atoms(dim))]
    return free[-1] if free else len(dims) - 1


def ranking(
    setting: str | Mapping[str, Any],
    blocks: Sequence[Block],
    analysis: Analysis,
    data: Calibration | None,
    error: Callable[[Kept], float] | None,
) -> Iterator[Block]:
    """Return the blocks in the order in which a recipe's `blocks` lets them go.

    Raises:
        InputError: there are no calibration data.
    """
    name = setting if isinstance(setting, str) else setting["name"]
    if data is None or error is None:
        raise InputError(f"blocks '{name}' are chosen on calibration data: pass `calibration`")
    return DEPTHS[name](blocks, analysis, data, error)
