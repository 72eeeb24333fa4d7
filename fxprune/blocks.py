"""Blocks of a residual network: branches that are added to the stream that they read, and can be left out whole.

The block of an addition `stream + branch`, where the branch is computed from the stream, is the branch. Without it the
addition gives the stream, and the branch's nodes and parameters, as far as nothing else uses them, are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxprune.analyse import Analysis

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Block:
    """One branch.

    Attributes:
        name: the path of the innermost module that holds all its parameters, numbered where several have that.
        total: the addition.
        stream: the operand of the addition that stays.
        parameters: names of those that nothing else uses.
    """

    name: str
    total: fx.Node
    stream: fx.Node
    parameters: frozenset[str]


def find_blocks(analysis: Analysis) -> list[Block]:
    """Return all blocks with parameters, in the order of the graph.

    >>> from fxprune.analyse import analyse
    >>> from fxprune.capture import capture
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.branch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    ...         self.head = nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         return self.head(x + self.branch(x))
    >>> [b.name for b in find_blocks(analyse(capture(Net(), (torch.randn(2, 4),), {})))]
    ['branch']
    """
    before = _ancestors(analysis)
    order = {node: i for i, node in enumerate(analysis.captured.graph.nodes)}
    everything = live(analysis, {})
    found: list[Block] = []
    for total in analysis.captured.graph.nodes:
        if total.target is not aten.add.Tensor or total.kwargs or total not in everything:
            continue
        operands = total.args[:2]
        if len(total.args) > 2 or any(not isinstance(n, fx.Node) or n.op == "get_attr" for n in operands):
            continue
        for stream, branch in (operands, operands[::-1]):
            assert isinstance(stream, fx.Node)
            assert isinstance(branch, fx.Node)
            reads = before[branch] >> order[stream] & 1
            if not reads or analysis.dims[stream] != analysis.dims[total]:
                continue
            left = live(analysis, {total: stream})
            parameters = _parameters(analysis, everything) - _parameters(analysis, left)
            if parameters:
                found.append(Block(_path(parameters), total, stream, frozenset(parameters)))
    return _numbered(found)


def live(analysis: Analysis, removed: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Return the nodes that the outputs depend on, when each of some nodes is replaced by another.

    Inputs count as live.
    """
    found: set[fx.Node] = set()
    nodes = list(analysis.captured.graph.nodes)
    waiting = [n for n in nodes if n.op in ("output", "placeholder")]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting += [removed[node]] if node in removed else node.all_input_nodes
    return found


def tensors_of(nodes: Iterable[fx.Node]) -> set[str]:
    """Return the names of the tensors that are among some nodes."""
    return {str(n.target) for n in nodes if n.op == "get_attr"}


def _parameters(analysis: Analysis, nodes: Iterable[fx.Node]) -> set[str]:
    tensors = analysis.captured.tensors
    return {name for name in tensors_of(nodes) if isinstance(tensors.get(name), nn.Parameter)}


def _ancestors(analysis: Analysis) -> dict[fx.Node, int]:
    """For each node, the nodes that it is computed from, as bits by their place in the graph."""
    result: dict[fx.Node, int] = {}
    for i, node in enumerate(analysis.captured.graph.nodes):
        bits = 1 << i
        for operand in node.all_input_nodes:
            bits |= result[operand]
        result[node] = bits
    return result


def _path(parameters: Iterable[str]) -> str:
    """The innermost module that all parameters are below."""
    paths = [name.split(".")[:-1] for name in parameters]
    common = paths[0]
    for path in paths[1:]:
        same = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common) or "block"


def _numbered(blocks: list[Block]) -> list[Block]:
    names = [b.name for b in blocks]
    seen: dict[str, int] = {}
    result = []
    for block in blocks:
        number = seen[block.name] = seen.get(block.name, -1) + 1
        name = block.name if names.count(block.name) == 1 else f"{block.name}:{number}"
        result.append(Block(name, block.total, block.stream, block.parameters))
    return result
