"""Contractions of activations with weights, seen as matrix products: what reads a group, and what can be refitted.

Each is y = W x + b over rows x: a linear layer's inputs, or a convolution's patches. Criteria and reconstruction need
nothing else of a layer, whatever its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.analyse import Analysis
from fxprune.axes import Axis, Dim, atoms
from fxprune.groups import Group, positions
from fxprune.rules.core import bind

aten = torch.ops.aten
Units = npt.NDArray[np.int64]

_CONVOLUTIONS = {
    getattr(getattr(aten, f"conv{rank}d"), overload): rank for rank in (1, 2, 3) for overload in ("default", "padding")
}
_TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
_PRODUCTS = (aten.matmul.default, aten.mm.default)


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """y = W x + b with weights that are parameters.

    Attributes:
        node: the operator in the captured graph.
        operand: the node that gives x.
        weight, bias: names of the tensors; the bias may be None.
        kind: linear (weight (out, in)), product (weight (in, out)), conv or transposed.
        rank: spatial dimensions.
        options: the operator's other arguments by name.
        groups: how many independent matrices there are.
    """

    node: fx.Node
    operand: fx.Node
    weight: str
    bias: str | None
    kind: str
    rank: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """The number of groups of a convolution."""
        return int(self.options.get("groups", 1))

    @property
    def channel(self) -> int:
        """The dimension of operand and result that is contracted or made."""
        return -1 if self.rank == 0 else -self.rank - 1

    def matrix(self, weight: Tensor, groups: int | None = None) -> Tensor:
        """Return a weight as matrices of shape (groups, out, in)."""
        groups = groups or self.groups
        if self.kind == "linear":
            return weight.unsqueeze(0)
        if self.kind == "product":
            return weight.t().unsqueeze(0)
        if self.kind == "conv":
            return weight.reshape(groups, weight.shape[0] // groups, -1)
        flipped = weight.flip(list(range(2, weight.dim())))
        split = flipped.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return split.transpose(1, 2).reshape(groups, weight.shape[1], -1)

    def tensor(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Return matrices of shape (groups, out, in) as a weight of this shape."""
        if self.kind == "linear":
            return matrix[0]
        if self.kind == "product":
            return matrix[0].t()
        if self.kind == "conv":
            return matrix.reshape(shape)
        groups = matrix.shape[0]
        split = matrix.reshape(groups, shape[1], shape[0] // groups, *shape[2:]).transpose(1, 2)
        return split.reshape(shape).flip(list(range(2, len(shape))))

    def rows(self, x: Tensor, kernel: Sequence[int], groups: int | None = None) -> Tensor:
        """Return what the operand's positions feed to the matrices: shape (groups, rows, in).

        Args:
            kernel: the weight's spatial shape, () for linear layers.
        """
        groups = groups or self.groups
        if self.rank == 0:
            return x.reshape(1, -1, x.shape[-1])
        if x.dim() == self.rank + 1:
            x = x.unsqueeze(0)
        if self.kind == "transposed":
            x, stride, padding, dilation = self._spread(x, kernel)
        else:
            stride, padding, dilation = (self._every(k) for k in ("stride", "padding", "dilation"))
            if isinstance(padding, str):
                padding = (
                    [(0, 0)] * self.rank
                    if padding == "valid"
                    else [_same(k, d) for k, d in zip(kernel, dilation, strict=True)]
                )
        pairs = [p if isinstance(p, tuple) else (p, p) for p in padding]
        x = F.pad(x, [n for pair in reversed(pairs) for n in pair])
        for i in range(self.rank):
            x = x.unfold(2 + i, (kernel[i] - 1) * dilation[i] + 1, stride[i])[..., :: dilation[i]]
        spatial, window = range(2, 2 + self.rank), range(2 + self.rank, 2 + 2 * self.rank)
        x = x.permute(0, *spatial, 1, *window).reshape(-1, groups, x.shape[1] // groups * int(np.prod(kernel)))
        return x.transpose(0, 1)

    def _spread(self, x: Tensor, kernel: Sequence[int]) -> tuple[Tensor, list[int], list[Any], list[int]]:
        """A transposed convolution as a plain one: zeros between the pixels, the kernel flipped."""
        stride, padding, dilation = (self._every(k) for k in ("stride", "padding", "dilation"))
        more = self._every("output_padding")
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *sizes)
        wide[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
        full = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        return wide, [1] * self.rank, [(f, f + m) for f, m in zip(full, more, strict=True)], list(dilation)

    def _every(self, option: str) -> Any:
        value = self.options[option]
        if isinstance(value, str):
            return value
        values = list(value) if isinstance(value, list | tuple) else [value]
        return values * self.rank if len(values) == 1 else values

    def results(self, y: Tensor, groups: int | None = None) -> Tensor:
        """Return results in the order of `rows`: shape (groups, rows, out)."""
        groups = groups or self.groups
        if self.rank == 0:
            return y.reshape(1, -1, y.shape[-1])
        if y.dim() == self.rank + 1:
            y = y.unsqueeze(0)
        y = y.movedim(1, -1).reshape(-1, groups, y.shape[1] // groups)
        return y.transpose(0, 1)

    def units(self, dim: Dim, axis: Axis, kernel: Sequence[int]) -> Units:
        """Return which unit of `axis` each input of the matrices belongs to, or -1: shape (groups, in)."""
        found = positions(dim, axis)
        flat = np.full(found[0].shape, -1) if found else np.zeros(0, dtype=np.int64)
        for one in found:
            flat = np.where(one >= 0, one, flat)
        return np.repeat(flat.reshape(self.groups, -1), int(np.prod(kernel)), axis=1)


def _same(kernel: int, dilation: int) -> tuple[int, int]:
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def contractions(analysis: Analysis) -> list[Contraction]:
    """Return every product of an activation with a parameter, in the order of the graph."""
    found = []
    for node in analysis.captured.graph.nodes:
        if node.op == "call_function":
            contraction = _contraction(node)
            if contraction is not None and isinstance(analysis.dims[contraction.operand], tuple):
                found.append(contraction)
    return found


def _contraction(node: fx.Node) -> Contraction | None:
    if node.target is aten.linear.default:
        keys, kind, rank = ("input", "weight", "bias"), "linear", 0
    elif node.target is aten.addmm.default:
        keys, kind, rank = ("mat1", "mat2", "self"), "product", 0
    elif node.target in _PRODUCTS:
        keys, kind, rank = ("self", "other" if node.target is aten.matmul.default else "mat2", ""), "product", 0
    elif node.target in _CONVOLUTIONS or node.target in _TRANSPOSED:
        rank = {**_CONVOLUTIONS, **_TRANSPOSED}[node.target]
        keys, kind = ("input", "weight", "bias"), "conv" if node.target in _CONVOLUTIONS else "transposed"
    else:
        return None
    named, more = bind(node.target, node.args, dict(node.kwargs))
    operand, weight, bias = named[keys[0]], named[keys[1]], named.get(keys[2])
    if (
        kind == "product"
        and node.target is aten.addmm.default
        and (more.get("alpha", 1), more.get("beta", 1)) != (1, 1)
    ):
        return None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or operand.op == "get_attr":
        return None
    if kind == "product" and len(weight.meta["shape"]) != 2:
        return None
    if isinstance(bias, fx.Node) and (bias.op != "get_attr" or len(bias.meta["shape"]) != 1):
        return None
    options = {k: v for k, v in named.items() if k not in keys}
    return Contraction(node, operand, str(weight.target), str(bias.target) if bias else None, kind, rank, options)


@dataclass(frozen=True, slots=True)
class Read:
    """Where a group's units are used up: they are a dimension of an operand, and none of the result.

    Attributes:
        node, operand: the operator and the operand that holds the units.
        dim: of the operand.
        by: the contraction that sums over them, if it is one.
        other: where two activations are multiplied and summed over the units, the other one and its dimension.
    """

    node: fx.Node
    operand: fx.Node
    dim: int
    by: Contraction | None = None
    other: tuple[fx.Node, int] | None = None


def reads(analysis: Analysis, group: Group, of: Sequence[Contraction]) -> list[Read]:
    """Return where a group's units are used up.

    These are the contractions that sum over them, and products of activations, as of queries and keys, of which only
    the first counts. Where there is neither, they are whatever else makes an end of them: a mean, a recurrent layer, a
    product of weights.
    """
    found = [
        Read(c.node, c.operand, c.channel % len(analysis.dims[c.operand]), c) for c in consumers(analysis, group, of)
    ]
    found += [Read(node, *first, None, second) for node, first, second in matched(analysis, group)]
    return found or list(_ends(analysis, group))


def consumers(analysis: Analysis, group: Group, of: Sequence[Contraction]) -> list[Contraction]:
    """Return the contractions that sum over a group's units, so that its removal changes what they give."""
    return [c for c in of if _sums(analysis, c, group.axis)]


def only_readers(analysis: Analysis, group: Group, of: Sequence[Contraction]) -> list[str]:
    """Return the weights through which alone a group's units reach anything; none where something else uses them, too.

    With those of a unit's columns at zero the unit is as good as gone.
    """
    found = consumers(analysis, group, of)
    nodes = {c.node for c in found}
    return [c.weight for c in found] if all(end.node in nodes for end in _ends(analysis, group)) else []


def _sums(analysis: Analysis, c: Contraction, axis: Axis) -> bool:
    """Whether a contraction sums over an axis; a convolution does not over its own groups."""
    dims = analysis.tensors[c.weight]
    if c.kind != "transposed":
        return axis in set(atoms(dims[0 if c.kind == "product" else 1]))
    groups = set(atoms(analysis.dims[c.node][c.channel])) if c.groups > 1 else set()
    return axis in set(atoms(dims[0])) - groups


def matched(analysis: Analysis, group: Group) -> list[tuple[fx.Node, tuple[fx.Node, int], tuple[fx.Node, int]]]:
    """Return (product, first, second) where two activations are multiplied and summed over the group: queries, keys.

    First and second are (activation, dimension).
    """
    found = []
    for node in dict.fromkeys(node for node, _ in analysis.macs):
        pair = _pair(node)
        if pair is None or group.axis in _axes(analysis.dims[node]):
            continue
        ends = [
            (n, i)
            for n in pair
            for i, d in enumerate(analysis.dims[n])
            if n.op != "get_attr" and group.axis in set(atoms(d))
        ]
        if len(ends) == 2 and ends[0][0] is not ends[1][0]:
            found.append((node, ends[0], ends[1]))
    return found


def _ends(analysis: Analysis, group: Group) -> Iterator[Read]:
    """One operand of each node that takes the units and does not pass them on, an activation where there is one."""
    for node in analysis.captured.graph.nodes:
        if node.op != "call_function" or group.axis in _axes(analysis.dims[node]):
            continue
        operands = [n for n in node.all_input_nodes if not isinstance(analysis.dims[n], list)]
        for operand in sorted(operands, key=lambda n: n.op == "get_attr"):
            dims = analysis.dims[operand]
            found = [i for i, d in enumerate(dims) if group.axis in set(atoms(d))]
            if found:
                yield Read(node, operand, found[0])
                break


def _axes(dims: Any) -> set[Axis]:
    """All axes of a result, or of several."""
    return {axis for ds in (dims if isinstance(dims, list) else [dims]) for d in ds for axis in atoms(d)}


def _pair(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Queries and keys of attention, or the two factors of a product of activations."""
    if node.target is aten.scaled_dot_product_attention.default:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target in (aten.matmul.default, aten.bmm.default):
        return node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten.baddbmm.default:
        return node.args[1], node.args[2]  # type: ignore[return-value]
    return None
