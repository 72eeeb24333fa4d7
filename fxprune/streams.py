"""What part of a network a group is, read off the graph: the residual stream, or the inner width of an MLP.

- The *residual stream* is every axis carried by both operands of an addition of which one is a value (or one projection
  of it) and the other was computed from that value through more contractions: a skip connection.
- *ffn* is every other axis that a matrix product with weights makes and matrix products with weights alone take away
  again, attention's heads and head dimensions apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxprune.analyse import Analysis
from fxprune.axes import Axis, atoms
from fxprune.groups import Group

aten = torch.ops.aten

#: What a recipe calls the two.
ROLES = ("residual", "ffn")

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_GATES = {aten.mul.Tensor, aten.div.Tensor}
_PRODUCTS = {
    *(aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default),
    *(aten.baddbmm.default, aten.einsum.default),
}


def roles(analysis: Analysis, groups: Sequence[Group]) -> dict[str, str]:
    """Return "residual" or "ffn" for each group that is one of them, by name.

    >>> from fxprune.capture import capture
    >>> from fxprune.analyse import analyse
    >>> from fxprune.groups import find_groups
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         sizes = (4, 8), (8, 16), (16, 8), (8, 2)
    ...         self.stem, self.up, self.down, self.head = (torch.nn.Linear(*s) for s in sizes)
    ...     def forward(self, x):
    ...         x = self.stem(x)
    ...         return self.head(x + self.down(self.up(x).relu()))
    >>> analysis = analyse(capture(Block(), (torch.randn(2, 4),), {}))
    >>> roles(analysis, find_groups(analysis))
    {'stem.weight.0': 'residual', 'up.weight.0': 'ffn'}
    """
    residual = _residual(analysis)
    inner = _inner(analysis)
    found: dict[str, str] = {}
    for group in groups:
        if group.axis in residual:
            found[group.name] = "residual"
        elif group.axis in inner and "head" not in group.kind:
            found[group.name] = "ffn"
    return found


def activations(analysis: Analysis) -> set[fx.Node]:
    """Return the nodes that depend on an input; all others are weights, constants, or computed from them."""
    found: set[fx.Node] = set()
    for node in analysis.captured.graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def axes_of(analysis: Analysis, node: fx.Node) -> frozenset[Axis]:
    """Return the axes of a node's results."""
    dims = analysis.dims.get(node, ())
    several = dims if isinstance(dims, list) else [dims]
    return frozenset(axis for ds in several for d in ds for axis in atoms(d))


def _residual(analysis: Analysis) -> set[Axis]:
    """Axes of skip connections.

    Sets of nodes are bits of integers. Of every node: which of those that depend on the inputs it was computed from at
    all, without a contraction in between, and with at most one. The product of two such values carries neither: rotary
    cosines multiply the queries of every layer, and are no stream for that.
    """
    contractions = {node for node, _ in analysis.macs}
    ancestors: dict[fx.Node, int] = {}
    direct: dict[fx.Node, int] = {}
    once: dict[fx.Node, int] = {}
    found: set[Axis] = set()
    for number, node in enumerate(analysis.captured.graph.nodes):
        operands = [n for n in node.all_input_nodes if n in ancestors]
        if node.op == "output" or not (operands or node.op == "placeholder"):
            continue
        own = 1 << number
        carried = [] if node.target in _GATES and len(operands) > 1 else operands
        ancestors[node] = own | _union(ancestors, operands)
        direct[node] = own if node in contractions else own | _union(direct, carried)
        once[node] = own | _union(direct if node in contractions else once, carried)
        if node.target in _SUMS and len(operands) == 2:
            for short, long in (operands, reversed(operands)):
                skipped = direct[short] & ancestors[long] & ~direct[long]
                projected = once[short] & ancestors[long] & ~once[long]
                if skipped or projected:
                    found |= axes_of(analysis, short) & axes_of(analysis, long)
    return found


def _union(sets: Mapping[fx.Node, int], nodes: Sequence[fx.Node]) -> int:
    result = 0
    for node in nodes:
        result |= sets[node]
    return result


def _inner(analysis: Analysis) -> set[Axis]:
    """Axes that products with weights make, and nothing but such products take away."""
    made: set[Axis] = set()
    taken: set[Axis] = set()
    elsewhere: set[Axis] = set()
    computed = activations(analysis)
    for node in {node for node, _ in analysis.macs}:
        inputs = frozenset[Axis]().union(*(axes_of(analysis, n) for n in node.all_input_nodes if n in computed))
        result = axes_of(analysis, node)
        weighted = node.target in _PRODUCTS and any(n not in computed for n in node.all_input_nodes)
        if weighted:
            made |= result - inputs
            taken |= inputs - result
        else:
            elsewhere |= inputs ^ result
    return (made & taken) - elsewhere
