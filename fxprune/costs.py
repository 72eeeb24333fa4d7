"""What a selection costs, as a function of how many units each group keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx, nn

from fxprune.analyse import Analysis
from fxprune.axes import Axis, Dim, Fixed, Product, atoms
from fxprune.blocks import live, tensors_of
from fxprune.rules.core import Dims

Counts = Mapping[Axis, int]


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a cost.

    Attributes:
        axes: those that it depends on.
        cost: kept units of these axes (of others: all) -> cost. Takes arrays that broadcast against each other in the
            place of numbers, and then returns the table of all their combinations.
    """

    axes: frozenset[Axis]
    cost: Callable[[Mapping[Axis, Any]], Any]


class Costs:
    """MACs, parameters and memory of a model under kept counts. MACs are those of the example inputs.

    Multiply-accumulates are counted for matrix products, convolutions and attention, as `torch.utils.flop_counter`
    does (one multiply-accumulate is two of its FLOPs).
    """

    def __init__(self, analysis: Analysis, removed: Mapping[fx.Node, fx.Node] | None = None) -> None:
        captured = analysis.captured
        alive = live(analysis, removed) if removed else set(captured.graph.nodes)
        used = tensors_of(alive) if removed else set(analysis.tensors)
        self._analysis = analysis
        self._captured = captured
        self._symbols = {s.name: _example_size(analysis, s.places[0]) for s in captured.symbols}
        self._macs = [dims for node, dims in analysis.macs if node in alive]
        self._nodes = [node for node, _ in analysis.macs if node in alive]
        self._parameters = {
            name: dims
            for name, dims in analysis.tensors.items()
            if name in used and isinstance(captured.tensors[name], nn.Parameter)
        }
        tensors = captured.tensors
        self._stored = [(tensors[n].element_size(), dims) for n, dims in analysis.tensors.items() if n in used]
        self._results: dict[fx.Node, list[tuple[int, Dims]]] = {}
        self._last: dict[fx.Node, list[fx.Node]] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in (n for n in captured.graph.nodes if n in alive and n not in (removed or {})):
            dims = analysis.dims.get(node, ())
            dtype = node.meta.get("dtype")
            width = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
            self._results[node] = [(width, ds) for ds in (dims if isinstance(dims, list) else [dims])]
            for operand in node.all_input_nodes:
                last[(removed or {}).get(operand, operand)] = node
        for node, user in last.items():
            self._last.setdefault(user, []).append(node)
        self._users: dict[tuple[str, Axis], list[Dims]] = {}
        for kind, many in (("macs", self._macs), ("params", self._parameters.values())):
            for dims in many:
                for axis in {a for d in dims for a in atoms(d)}:
                    self._users.setdefault((kind, axis), []).append(dims)

    def without(self, removed: Mapping[fx.Node, fx.Node]) -> Costs:
        """Return the costs of the model without some blocks: see `Kept.removed`."""
        return Costs(self._analysis, removed) if removed else self

    def macs(self, counts: Counts) -> int:
        """Return the multiply-accumulates of one forward pass on the example inputs."""
        return int(self._total(self._macs, counts))

    def params(self, counts: Counts) -> int:
        """Return the number of parameters that the graph uses."""
        return int(self._total(list(self._parameters.values()), counts))

    def memory(self, counts: Counts) -> int:
        """Return the bytes of all tensors of the graph and of the most activations alive at a time.

        Views count as copies, inputs do not count.
        """
        weights = sum(width * self._total([dims], counts) for width, dims in self._stored)
        alive = most = 0
        sizes: dict[fx.Node, int] = {}
        for node in self._captured.graph.nodes:
            if node.op == "call_function" and node in self._results:
                sizes[node] = sum(width * self._total([dims], counts) for width, dims in self._results[node])
                alive += sizes[node]
                most = max(most, alive)
            alive -= sum(sizes.get(n, 0) for n in self._last.get(node, ()))
        return int(weights + most)

    def of(self, kind: str, counts: Counts) -> int:
        """Return the cost called "macs", "params" or "memory"."""
        return {"macs": self.macs, "params": self.params, "memory": self.memory}[kind](counts)

    def by_node(self, counts: Counts) -> dict[str, int]:
        """Return the multiply-accumulates of each contraction by node name."""
        result: dict[str, int] = {}
        for node, dims in zip(self._nodes, self._macs, strict=True):
            result[node.name] = result.get(node.name, 0) + self._total([dims], counts)
        return result

    def change(self, kind: str, new: Counts, counts: Counts) -> int:
        """Return by how much the cost grows when the axes of `new` keep so many units instead of what `counts` says."""
        if kind == "memory":
            return self.memory({**counts, **new}) - self.memory(counts)
        users = {id(dims): dims for axis in new for dims in self._users.get((kind, axis), [])}
        many = list(users.values())
        return int(self._total(many, {**counts, **new}) - self._total(many, counts))

    def terms(self, kind: str) -> list[Term] | None:
        """Return the summands of a cost, those of the same axes as one; None where it is no sum, as memory is none."""
        if kind not in ("macs", "params"):
            return None
        scopes: dict[frozenset[Axis], list[Dims]] = {}
        for dims in self._macs if kind == "macs" else self._parameters.values():
            scopes.setdefault(frozenset(a for d in dims for a in atoms(d)), []).append(dims)
        return [Term(axes, partial(self._total, many)) for axes, many in scopes.items()]

    def per_unit(self, kind: str, axis: Axis) -> int:
        """Return how much of the dense cost goes with one unit of an axis."""
        return -self.change(kind, {axis: axis.size - 1}, {})

    def _total(self, many: list[Dims], counts: Mapping[Axis, Any]) -> Any:
        known: dict[Dim, Any] = {}
        total: Any = 0
        for dims in many:
            cost: Any = 1
            for dim in dims:
                size = known.get(dim)
                if size is None:
                    size = known[dim] = self._size(dim, counts)
                cost = cost * size  # not in place: sizes may be arrays that broadcast
            total = total + cost
        return total

    def _size(self, dim: Dim, counts: Mapping[Axis, Any]) -> Any:
        if isinstance(dim, Axis):
            return counts.get(dim, dim.size)
        if isinstance(dim, Fixed):
            terms = self._captured.affine(dim.size)
            return sum(factor * prod(self._symbols[s] for s in term) for term, factor in terms.items())
        if isinstance(dim, Product):
            return prod(self._size(f, counts) for f in dim.factors)
        return sum(self._size(p, counts) for p in dim.parts)


def _example_size(analysis: Analysis, place: tuple[str, int]) -> int:
    names = [n.target for n in analysis.captured.graph.nodes if n.op == "placeholder"]
    return int(analysis.captured.inputs[names.index(place[0])].shape[place[1]])
