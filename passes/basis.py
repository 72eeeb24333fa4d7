"""A basis in which little of attention is lost: queries and keys, values and outputs, in principal components.

Scores depend on queries and keys through q . k alone, so that T q and T^-T k are as good, for any invertible T of each
head. Nothing but linear maps lies between values and the layer that reads them, so that T v and W T^-1 are as good. The
model computes the same; what its head dimensions mean can be chosen. Here they are ordered by how much they do:

    queries and keys: Cq^1/2 Ck^1/2 = U S V',  T = S^1/2 U' Cq^-1/2                                                 (1)
    values, outputs:  D^1/2 W C^1/2 = U S V',  T = V' C^-1/2                                                        (2)

with second moments C on calibration data (of keys around their mean, which softmax does not see) and the slopes D of
the objective: the least squared error of scores and of outputs for any number of dimensions kept, if queries and keys
are independent. Compare Ashkboos et al., "SliceGPT" (2024), who turn the residual stream.

What may lie between is found by following the number of each row of a weight through the graph: shapes may change,
constant factors come in; whatever else is on the way (rotary positions, norms) leaves the basis as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.capture import Varying
from fxprune.groups import Group, positions
from fxprune.kept import Kept
from fxprune.passes import gather
from fxprune.passes.calibration import Batch, Calibration
from fxprune.passes.consumers import Contraction
from fxprune.passes.statistics import Statistics
from fxprune.passes.trial import some_samples
from fxprune.prove import Reference, dense_weights
from fxprune.rules.core import overloads

aten = torch.ops.aten
#: Samples that the second moments are taken of.
SAMPLES = 128
#: The outputs may change by so much at most, relative to the largest: rounding.
TOLERANCE = 1e-4
#: Added to second moments, as a share of their mean diagonal: bounds how far a basis is from an orthogonal one.
_DAMPING = 1e-4

#: Operators that only move numbers.
_MOVES = {
    overload
    for target in (
        *(aten.view, aten.reshape, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.unsqueeze),
        *(aten.squeeze, aten.unbind, aten.split, aten.split_with_sizes, aten.chunk, aten.select, aten.slice),
        *(aten.expand, aten.contiguous, aten.clone, aten.alias, aten.detach, aten.flatten, aten.unflatten),
        *(aten.movedim, aten.swapaxes),
    )
    for overload in overloads(target)
} | {operator.getitem}
_SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True, slots=True)
class End:
    """Where rows of a linear layer arrive.

    Attributes:
        node, place: the operator and which operand of it.
        rows: the number of the row that each entry of the operand is of.
    """

    node: fx.Node
    place: int
    rows: Tensor


@dataclass(slots=True)
class Pair:
    """Rows of two layers, or rows of one and columns of another, that only meet each other in a product.

    Attributes:
        rows: of queries, one (dimensions,) for each head that shares the keys; or of values.
        others: of keys, or the columns of what reads the values.
    """

    source: Contraction
    other: Contraction
    rows: list[Tensor]
    others: Tensor
    columns: bool


@dataclass
class _Traced:
    """Runs of row numbers through the graph, for the shapes of one batch."""

    analysis: Analysis
    statistics: Statistics
    batch: Batch
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = _Shapes(self.analysis, self.shapes)
        with torch.no_grad():
            self.reference.run(self.batch.inputs)
        self.linear = {c.node: c for c in self.statistics.contractions if c.rank == 0 and c.groups == 1}

    def ends(self, node: fx.Node, rows: Tensor) -> list[End] | None:
        """Follow numbers from a node to all that does more than move them; None where one is an output."""
        found: list[End] = []
        for user in node.users:
            if user.op == "output":
                return None
            places = [i for i, a in enumerate(user.args) if a is node]
            if user.target in _MOVES and places == [0] and user.all_input_nodes == [node]:
                more = self._moved(user, rows)
            elif (user.target in _SCALES and self._constant(user, node)) or user.target in (aten.dropout.default,):
                more = self.ends(user, rows)
            else:
                found += [End(user, i, rows) for i in places or [-1]]
                continue
            if more is None:
                return None
            found += more
        return found

    def _moved(self, user: fx.Node, rows: Any) -> list[End] | None:
        args, kwargs = pytree.tree_map(
            lambda v: rows if isinstance(v, fx.Node) else self.reference._literal(v),
            (user.args, dict(user.kwargs)),
            is_leaf=lambda v: isinstance(v, fx.Node | Varying),
        )
        assert callable(user.target)
        return self.ends(user, user.target(*args, **kwargs))

    def _constant(self, user: fx.Node, node: fx.Node) -> bool:
        others = [a for a in user.args if a is not node]
        return len(others) == 1 and not isinstance(others[0], fx.Node)


class _Shapes(Reference):
    """The dense graph; remembers the shape of every result."""

    def __init__(self, analysis: Analysis, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        super().__init__(analysis, Kept({}), dense_weights(analysis.captured), None)
        self.shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


# ---------------------------------------------------------------------- who meets whom
def pairs(analysis: Analysis, groups: Sequence[Group], statistics: Statistics, batch: Batch) -> list[Pair]:
    """Return all pairs whose basis is free and which have a dimension of the groups."""
    traced = _Traced(analysis, statistics, batch)
    axes = {g.axis for g in groups}
    known = {node: c for node, c in traced.linear.items() if _own(analysis, c)}
    ends: dict[tuple[fx.Node, int], tuple[Contraction, End]] = {}
    free: dict[fx.Node, Tensor] = {}  # how often each row of a layer arrives anywhere
    for node, c in known.items():
        if not any(a in axes for a in _atoms(analysis.tensors[c.weight][_row_dim(c)])):
            continue
        width = traced.shapes[node][-1]
        arrived = traced.ends(node, torch.arange(width).expand(traced.shapes[node]))
        if arrived is None:
            continue
        counts = torch.zeros(width, dtype=torch.long)
        for end in arrived:
            counts[_unique(end.rows.reshape(-1))] += 1
            ends[end.node, end.place] = (c, end)
        free[node] = counts
    result: list[Pair] = []
    for node in analysis.captured.graph.nodes:
        if node.target is _ATTENTION or node.target in _PRODUCTS:
            result += _scores(node, ends)
            result += _values(node, ends, traced, known)
    return [p for p in result if _alone(p, free)]


def _own(analysis: Analysis, c: Contraction) -> bool:
    """Whether nothing else uses a layer's weight and bias."""
    tensors = analysis.captured.tensors
    for name in (c.weight, c.bias):
        users = [n for n in analysis.captured.graph.nodes if n.op == "get_attr" and n.target == name]
        if name is not None and (
            len(users) != 1 or len(users[0].users) != 1 or not isinstance(tensors[name], nn.Parameter)
        ):
            return False
    return c.weight not in analysis.captured.aliases.values()


def _atoms(dim: Any) -> set[Any]:
    from fxprune.axes import atoms

    return set(atoms(dim))


def _row_dim(c: Contraction) -> int:
    return 1 if c.kind == "product" else 0


def _scores(node: fx.Node, ends: Mapping[tuple[fx.Node, int], tuple[Contraction, End]]) -> Iterator[Pair]:
    """Queries and keys, head by head."""
    if (node, 0) not in ends or (node, 1) not in ends or node.kwargs.get("enable_gqa"):
        return
    (first, a), (second, b) = ends[node, 0], ends[node, 1]
    left, right = a.rows, b.rows if node.target is _ATTENTION else b.rows.transpose(-1, -2)
    if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-1]:
        return
    if not _same_at_all_positions(left) or not _same_at_all_positions(right):
        return
    width = left.shape[-1]
    both = _unique(torch.cat([left[..., 0, :], right[..., 0, :]], -1).reshape(-1, 2 * width))
    for keys in _unique(both[:, width:]):
        queries = both[(both[:, width:] == keys).all(1), :width]
        yield Pair(first, second, list(queries), keys, False)


def _values(
    node: fx.Node,
    ends: Mapping[tuple[fx.Node, int], tuple[Contraction, End]],
    traced: _Traced,
    known: Mapping[fx.Node, Contraction],
) -> Iterator[Pair]:
    """Values, and the columns of the one layer that reads their mixture."""
    place = 2 if node.target is _ATTENTION else 1
    if (node, place) not in ends or node.kwargs.get("enable_gqa"):
        return
    source, end = ends[node, place]
    if not _same_at_all_positions(end.rows):
        return
    shape = traced.shapes[node]
    if end.rows.shape[:-2] != shape[:-2]:
        return
    arrived = traced.ends(node, end.rows[..., :1, :].expand(shape))
    if arrived is None or len(arrived) != 1 or arrived[0].node not in known or arrived[0].place != 0:
        return
    reader, rows = known[arrived[0].node], arrived[0].rows
    columns = rows.reshape(-1, rows.shape[-1])
    if not bool((columns == columns[0]).all()) or len(_unique(columns[0])) != len(columns[0]):
        return
    place_of = torch.full((int(columns.max()) + 1,), -1)
    place_of[columns[0]] = torch.arange(len(columns[0]))
    for head in _unique(end.rows[..., 0, :].reshape(-1, end.rows.shape[-1])):
        if bool((place_of[head] >= 0).all()):
            yield Pair(source, reader, [head], place_of[head], True)


def _same_at_all_positions(rows: Tensor) -> bool:
    """(..., positions, dimensions): the same rows at each position, and none twice."""
    first = rows[..., :1, :]
    return bool((rows == first).all()) and len(_unique(first.reshape(-1, rows.shape[-1])[0])) == rows.shape[-1] > 1


def _unique(rows: Tensor) -> Tensor:
    """The different rows, or numbers."""
    return torch.from_numpy(np.unique(rows.numpy(), axis=0))


def _alone(pair: Pair, free: Mapping[fx.Node, Tensor]) -> bool:
    """Whether the rows arrive nowhere else."""
    ends = [(pair.source, torch.cat(pair.rows))] + ([] if pair.columns else [(pair.other, pair.others)])
    return all(bool((free[c.node][rows] == 1).all()) for c, rows in ends)


# ---------------------------------------------------------------------- the change
@dataclass(frozen=True, slots=True)
class Changed:
    """How many heads' bases were changed, and by how much the outputs differ, relative to the largest."""

    scores: int
    values: int
    error: float

    def line(self) -> str:
        """The change as a sentence."""
        what = [f"queries and keys of {self.scores} heads"] * bool(self.scores)
        what += [f"values of {self.values} heads"] * bool(self.values)
        return (
            f"{' and '.join(what)} are in principal components before anything is removed: the same function "
            f"(outputs differ by {self.error:.1e}), least of which is lost by fewer dimensions"
        )


def principal(analysis: Analysis, groups: Sequence[Group], data: Calibration, max_memory: float) -> Changed | None:
    """Change the basis of every head whose dimensions may be cut; the captured tensors are replaced, not written to.

    Returns None, and changes nothing, where there is no such head or rounding would show.
    """
    cut = [g for g in groups if g.kind == "head_dims"]
    if not cut:
        return None
    few = some_samples(analysis, data, SAMPLES)
    statistics = Statistics(analysis, 0, few, max_memory)
    found = pairs(analysis, cut, statistics, few.batches[0])
    if not found:
        return None
    layers = list(dict.fromkeys(c for p in found for c in (p.source, p.other)))
    known = gather.collect(statistics, few, layers, [], {"moments"})
    tensors = analysis.captured.tensors
    before = dict(tensors)
    dense = _outputs(analysis, few.batches[0])
    new = {n: tensors[n].detach().double().clone() for c in layers for n in (c.weight, c.bias) if n is not None}
    for pair in found:
        _change(pair, new, known, analysis, cut)
    for name, value in new.items():
        tensors[name] = nn.Parameter(value.to(before[name].dtype), requires_grad=before[name].requires_grad)
    error = _difference(dense, _outputs(analysis, few.batches[0]))
    if not error <= TOLERANCE:
        tensors.update(before)
        return None
    scores = sum(len(p.rows) for p in found if not p.columns)
    return Changed(scores, sum(p.columns for p in found), error)


def _change(
    pair: Pair, new: dict[str, Tensor], known: gather.Gathered, analysis: Analysis, groups: Sequence[Group]
) -> None:
    first, second = (c.matrix(new[c.weight])[0] for c in (pair.source, pair.other))  # views of the new weights
    moment = known.moments[pair.source][0]
    width = len(pair.others)
    if pair.columns:
        rows = pair.rows[0]
        block = known.moments[pair.other][0][pair.others][:, pair.others]
        root, inverse = _roots(block)
        slope = known.slopes[pair.other][0].clamp_min(0).sqrt()
        _, _, turned = torch.linalg.svd(slope[:, None] * second[:, pair.others] @ root, full_matrices=False)
        change = _placed(turned @ inverse, pair.source, rows, analysis, groups)
        second[:, pair.others] = second[:, pair.others] @ torch.linalg.inv(change)
        _apply(change, pair.source, rows, first, new)
    else:
        queries = sum(_covariance(first, rows, pair.source, new, moment, False) for rows in pair.rows)
        keys = _covariance(second, pair.others, pair.other, new, known.moments[pair.other][0], True)
        assert isinstance(queries, Tensor)
        (root, inverse), (other, _) = _roots(queries), _roots(keys)
        left, sizes, _ = torch.linalg.svd(root @ other)
        scale = (sizes / sizes[0]).clamp_min(_DAMPING).sqrt()
        change = _placed(scale[:, None] * left.t() @ inverse, pair.source, pair.rows[0], analysis, groups)
        for rows in pair.rows:
            _apply(change, pair.source, rows, first, new)
        _apply(torch.linalg.inv(change).t(), pair.other, pair.others, second, new)
    assert change.shape == (width, width)


def _apply(change: Tensor, c: Contraction, rows: Tensor, matrix: Tensor, new: dict[str, Tensor]) -> None:
    matrix[rows] = change @ matrix[rows]
    if c.bias is not None:
        new[c.bias][rows] = change @ new[c.bias][rows]


def _covariance(
    matrix: Tensor, rows: Tensor, c: Contraction, new: Mapping[str, Tensor], moment: Tensor, centred: bool
) -> Tensor:
    """Second moments of some results of a layer, around their mean where that is known and asked for."""
    weight = matrix[rows]
    if c.bias is not None:
        weight = torch.cat([weight, new[c.bias][rows].unsqueeze(1)], 1)
        if centred:
            moment = moment - torch.outer(moment[-1], moment[-1])
    return weight @ moment @ weight.t()


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2, damped."""
    values, vectors = torch.linalg.eigh((moment + moment.t()) / 2)
    values = values.clamp_min(0) + _DAMPING * values.clamp_min(0).mean().clamp_min(1e-30)
    return (vectors * values.sqrt()) @ vectors.t(), (vectors / values.sqrt()) @ vectors.t()


def _placed(change: Tensor, c: Contraction, rows: Tensor, analysis: Analysis, groups: Sequence[Group]) -> Tensor:
    """The components in the order of the units that they are in: the largest in the first."""
    dim = analysis.tensors[c.weight][_row_dim(c)]
    for group in groups:
        for units in positions(dim, group.axis):
            own = units[rows.numpy()]
            if (own >= 0).all():
                order = np.argsort(own, kind="stable")
                result = torch.empty_like(change)
                result[torch.from_numpy(order)] = change
                return result
    return change


def _outputs(analysis: Analysis, batch: Batch) -> list[Any]:
    with torch.no_grad():
        return Reference(analysis, Kept({}), dense_weights(analysis.captured), None).run(batch.inputs)


def _difference(first: list[Any], second: list[Any]) -> float:
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            scale = float(a.detach().abs().max()) or 1.0
            worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
    return worst
