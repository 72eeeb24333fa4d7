"""Groups: the axes that can be cut, what each cuts, and the graph that says why dimensions belong together.

A group is one free axis: everything that must shrink together. A unit is one of its indices.
"""

from __future__ import annotations

import fnmatch
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx, nn

from fxprune.analyse import Analysis
from fxprune.axes import Axis, Concat, Dim, Fixed, Product, atoms, size_of
from fxprune.kept import Indices

aten = torch.ops.aten
KINDS = ("channels", "heads", "head_dims", "hidden")


@dataclass(frozen=True, slots=True)
class Group:
    """One free axis.

    Attributes:
        name: the first parameter dimension it cuts, "layer1.0.conv1.weight.0".
        axis: its axis.
        kind: channels, heads, head_dims or hidden.
        members: (tensor name, dimension number) of everything it cuts, parameters first.
        inner: how many consecutive entries of a parameter dimension one unit is (64 for a head of width 64).
        least: how many units must stay, because an operator needs them.
        form: groups with equal ones cut layers of the same shape in the same way, or are heads of the same number or
            width.
    """

    name: str
    axis: Axis
    kind: str
    members: tuple[tuple[str, int], ...]
    inner: int
    least: int = 1
    form: Any = None

    @property
    def size(self) -> int:
        """The number of units."""
        return self.axis.size


def find_groups(analysis: Analysis) -> list[Group]:
    """Return all groups, in the order of the graph."""
    parameters: dict[Axis, list[tuple[str, int]]] = {}
    others: dict[Axis, list[tuple[str, int]]] = defaultdict(list)
    inner: dict[Axis, int] = {}
    for name, dims in analysis.tensors.items():
        is_parameter = isinstance(analysis.captured.tensors[name], nn.Parameter)
        for i, dim in enumerate(dims):
            for axis, width in _widths(dim, 1):
                table = parameters.setdefault(axis, []) if is_parameter else others[axis]
                if (name, i) not in table:
                    table.append((name, i))
                inner[axis] = min(inner.get(axis, width), width)
    kinds = _kinds(analysis)
    shapes = {name: tuple(tensor.shape) for name, tensor in analysis.captured.tensors.items()}
    groups = []
    for axis, members in parameters.items():
        name, number = members[0]
        label = f"{name}.{number}"
        if analysis.tensors[name][number] is not axis:  # several groups share the dimension: say which part this one is
            label = axis.birth if axis.birth.startswith(label) else f"{label}:{axis.birth}"
        kind = kinds.get(axis, "hidden")
        layers = None if "head" in kind else tuple(sorted((shapes[name], dim) for name, dim in members))
        groups.append(
            Group(
                name=label,
                axis=axis,
                kind=kind,
                members=tuple(members + others.get(axis, [])),
                inner=inner[axis],
                least=analysis.least.get(axis, 1),
                form=(kind, axis.size, layers),
            )
        )
    return groups


def _widths(dim: Dim, right: int) -> Iterator[tuple[Axis, int]]:
    """The axes of a dimension, each with the number of entries that one of its indices stands for."""
    if isinstance(dim, Axis):
        yield dim, right
    elif isinstance(dim, Product):
        width = right
        for factor in reversed(dim.factors):
            yield from _widths(factor, width)
            size = size_of(factor)
            width *= size if isinstance(size, int) else 1
    elif isinstance(dim, Concat):
        for part in dim.parts:
            yield from _widths(part, right)


def _kinds(analysis: Analysis) -> dict[Axis, str]:
    """Heads are what attention runs in parallel over, head dims what it contracts; channels what a convolution cuts."""
    kinds: dict[Axis, str] = {}

    def mark(dims: Any, kind: str) -> None:
        for dim in dims:
            for axis in atoms(dim):
                kinds.setdefault(axis, kind)

    for node, dims in analysis.macs:
        if node.target is aten.scaled_dot_product_attention.default or _multiplies_activations(node):
            mark(dims[:-3], "heads")
            mark(dims[-3:], "head_dims")
    for node, _ in analysis.macs:
        if str(node.target).startswith("aten.conv"):
            for operand in node.all_input_nodes:
                mark(analysis.dims[operand], "channels")
            mark(analysis.dims[node], "channels")
    return kinds


def _multiplies_activations(node: fx.Node) -> bool:
    matmuls = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
    return node.target in matmuls and not any(map(_of_weights, node.all_input_nodes[-2:]))


def _of_weights(node: fx.Node) -> bool:
    """Whether the node holds weights as they are, or moved about."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def positions(dim: Dim, axis: Axis) -> list[Indices]:
    """For every position of a dimension the index of `axis` it belongs to, or -1; one array for each occurrence.

    >>> from fxprune.axes import Axis, Fixed, concat, product
    >>> a = Axis(2, "a")
    >>> [p.tolist() for p in positions(concat([Fixed(1), product([a, Fixed(2)])]), a)]
    [[-1, 0, 0, 1, 1]]
    """
    if isinstance(dim, Axis):
        return [np.arange(axis.size)] if dim is axis else []
    size = size_of(dim)
    if isinstance(dim, Fixed) or not isinstance(size, int):
        return []
    result: list[Indices] = []
    if isinstance(dim, Product):
        sizes = [size_of(f) for f in dim.factors]
        for i, factor in enumerate(dim.factors):
            before, after = int(np.prod(sizes[:i])), int(np.prod(sizes[i + 1 :]))
            result += [np.tile(np.repeat(p, after), before) for p in positions(factor, axis)]
        return result
    offset = 0
    for part in dim.parts:
        length = size_of(part)
        assert isinstance(length, int)
        for p in positions(part, axis):
            whole = np.full(size, -1, dtype=np.int64)
            whole[offset : offset + length] = p
            result.append(whole)
        offset += length
    return result


# ---------------------------------------------------------------------- explanations
def dependency_graph(analysis: Analysis, groups: list[Group]) -> nx.Graph:
    """Return the graph of groups, parameter dimensions and the nodes that tie them.

    Vertices are ("group", name), ("dimension", tensor, number) and ("node", fx name); a path between two parameter
    dimensions inside the sub-graph of one group says why they are coupled.
    """
    graph = nx.Graph()
    carried = {node: _carried(analysis.dims[node]) for node in analysis.captured.graph.nodes}
    for group in groups:
        for name, number in group.members:
            graph.add_edge(("group", group.name), ("dimension", name, number))
    for node in analysis.captured.graph.nodes:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr":
                name = str(operand.target)
                for i, dim in enumerate(analysis.tensors[name]):
                    for axis in atoms(dim):
                        _tie(graph, ("dimension", name, i), ("node", node.name), axis)
            else:
                # Also those that the node does not pass on: a contraction is where two operands' dimensions meet.
                for axis in carried[operand]:
                    _tie(graph, ("node", operand.name), ("node", node.name), axis)
    return graph


def _tie(graph: nx.Graph, a: tuple[Any, ...], b: tuple[Any, ...], axis: Axis) -> None:
    axes = graph.get_edge_data(a, b, {}).get("axes", frozenset())
    graph.add_edge(a, b, axes=axes | {axis})


def _carried(dims: Any) -> frozenset[Axis]:
    tensors = dims if isinstance(dims, list) else [dims]
    return frozenset(axis for ds in tensors for d in ds for axis in atoms(d))


def why_coupled(analysis: Analysis, groups: list[Group], first: str, second: str) -> list[str]:
    """Return the path of source lines that ties two parameter dimensions ("conv1.weight.0"), or [] where none does."""
    graph = dependency_graph(analysis, groups)
    ends = []
    for label in (first, second):
        name, _, dim = label.rpartition(".")
        ends.append(("dimension", name, int(dim)))
    nodes = {n.name: n for n in analysis.captured.graph.nodes}
    for group in groups:
        if {(e[1], e[2]) for e in ends} <= set(group.members):
            tied = nx.Graph((a, b) for a, b, d in graph.edges(data=True) if group.axis in d.get("axes", ()))
            path = nx.shortest_path(tied, *ends) if all(e in tied for e in ends) and nx.has_path(tied, *ends) else []
            return [describe(nodes[v[1]]) if v[0] == "node" else f"{v[1]}, dimension {v[2]}" for v in path]
    return []


def describe(node: fx.Node) -> str:
    """Return operator, module path and source line of a node, in one line."""
    target = node.target.__name__ if node.target is operator.getitem else str(node.target)
    path = f" in {node.meta['path']}" if node.meta.get("path") else ""
    source = f" ({node.meta['source']})" if node.meta.get("source") else ""
    return f"{node.name} = {target}{path}{source}"


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter dimension that stays whole, and why."""

    tensor: str
    dim: int
    size: int
    reason: str
    node: fx.Node | None


def frozen_dimensions(analysis: Analysis) -> list[Whole]:
    """Return every dimension longer than 1 of every parameter of which nothing can be removed."""
    result = []
    for node in analysis.captured.graph.nodes:
        if node.op != "get_attr" or not isinstance(analysis.captured.tensors[str(node.target)], nn.Parameter):
            continue
        for i, dim in enumerate(analysis.tensors[str(node.target)]):
            size = size_of(dim)
            if any(True for _ in atoms(dim)) or not isinstance(size, int) or size == 1:
                continue
            cause = analysis.axes.reason(analysis.births[str(node.target)][i])
            reason = cause.reason if cause else (dim.why if isinstance(dim, Fixed) else "it meets a fixed dimension")
            result.append(Whole(str(node.target), i, size, reason, cause.node if cause else None))
    return result


def matches(name: str, globs: list[str]) -> bool:
    """Whether a tensor (or the module that owns it) matches one of the globs.

    >>> matches("layer1.0.conv1.weight", ["layer1.*"]), matches("fc.weight", ["fc"])
    (True, True)
    """
    owners = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(owners[:n]), g) for g in globs for n in range(1, len(owners) + 1))
