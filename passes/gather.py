"""The passes over calibration data that fill `Statistics`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.errors import NonFiniteError
from fxprune.groups import describe
from fxprune.passes.calibration import Batch, Calibration
from fxprune.passes.consumers import Contraction
from fxprune.passes.observe import Observer, objective, observe
from fxprune.prove import dense_weights

if TYPE_CHECKING:
    from fxprune.passes.statistics import Statistics

#: An activation and one of its dimensions.
Place = tuple[fx.Node, int]


@dataclass(slots=True)
class Channels:
    """Sums over all entries of an activation but one dimension, float64 by its index.

    Attributes:
        count: how many entries each sum has.
        total, square, absolute: sums of x, x^2 and |x|.
        positive: how many entries are above zero.
    """

    count: int
    total: npt.NDArray[np.float64]
    square: npt.NDArray[np.float64]
    absolute: npt.NDArray[np.float64]
    positive: npt.NDArray[np.float64]

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """E[x]."""
        return self.total / self.count

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """E[x^2] - E[x]^2."""
        return np.maximum(self.square / self.count - self.mean**2, 0.0)


@dataclass(slots=True)
class Gathered:
    """What one call of `collect` found; see the methods of `Statistics` that return it."""

    moments: dict[Contraction, Tensor] = field(default_factory=dict)
    slopes: dict[Contraction, Tensor] = field(default_factory=dict)
    channels: dict[Place, Channels] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    squared: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[Place, npt.NDArray[np.float64]] = field(default_factory=dict)


def collect(
    statistics: Statistics,
    data: Calibration,
    read: Sequence[Contraction],
    pairs: Sequence[Place],
    needs: Collection[str],
) -> Gathered:
    """Make one pass for activations, one for gradients, as far as they are needed."""
    found = Gathered()
    rank = {c: len(statistics.analysis.dims[c.operand]) for c in read}
    places = list(dict.fromkeys([(c.operand, c.channel % rank[c]) for c in read] + list(pairs)))
    if "activations" in needs:
        found.channels = _channels(statistics, data, places)
    if set(needs) & {"moments", "gradients", "mask_gradients"}:
        _sweep(statistics, data, read, places, needs, found)
    if "sample_gradients" in needs:
        found.squared = _squared(statistics, data)
    return found


# ---------------------------------------------------------------------- one pass forwards and backwards
def _sweep(
    statistics: Statistics,
    data: Calibration,
    read: Sequence[Contraction],
    places: Sequence[Place],
    needs: Collection[str],
    found: Gathered,
) -> None:
    """Second moments, how much the objective depends on each result, and gradients, as far as they are needed."""
    names = _parameters(statistics) if "gradients" in needs else []
    gradients = {n: torch.zeros(statistics.weight(n).shape, dtype=torch.float64) for n in names}
    masks: dict[Place, list[npt.NDArray[np.float64]]] = {p: [] for p in places if "mask_gradients" in needs}
    moments = {c: _Moments() for c in read if "moments" in needs}
    wanted = [n for c in moments for n in (c.operand, c.node)] + [node for node, _ in masks]
    relevant = statistics.contractions if moments and any(map(has_masks, data.batches)) else []
    for number, batch in enumerate(portions(statistics, data)):
        weights = _trainable(statistics, set(names))
        values = backward(statistics, data, batch, number, [*wanted, *(c.node for c in relevant)], weights)
        rows = {c: _reached(c, values[c.node]) for c in relevant}
        for c, flags in rows.items():
            statistics.relevant.setdefault(c.node, {})[number] = flags
        for c, sums in moments.items():
            sums.add(c, values[c.operand].detach(), slope_of(values[c.node]), statistics.kernel(c), rows.get(c))
        for name in names:
            gradient = weights(name).grad
            if gradient is not None:
                _finite(gradient, name)
                gradients[name] += gradient.double()
        for (node, dim), found_rows in masks.items():
            found_rows.append(_mask_gradients(values[node], dim, batch, node.name))
    samples = float(summed(torch.tensor(float(data.samples), dtype=torch.float64)))
    found.gradients = {n: summed(total) / samples for n, total in gradients.items()}
    found.masks = {place: gathered(np.concatenate(rows)) for place, rows in masks.items() if rows}
    for c, sums in moments.items():
        found.moments[c], found.slopes[c] = sums.result(samples)
        if not all(bool(torch.isfinite(t).all()) for t in (found.moments[c], found.slopes[c])):
            raise NonFiniteError(f"calibration: second moments at {describe(c.node)} hold NaN or infinite values")


@dataclass(slots=True)
class _Moments:
    """Sums over the rows of one contraction."""

    product: Tensor | None = None
    slope: Tensor | None = None
    count: float = 0.0

    def add(self, c: Contraction, x: Tensor, slope: Tensor, kernel: Sequence[int], flags: Tensor | None) -> None:
        rows = c.rows(x, kernel)
        if flags is not None and len(flags) == rows.shape[1]:
            rows = rows[:, flags]
        if c.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        # Products of one batch in the model's precision (single at least), their sums in float64.
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        product = (rows.transpose(1, 2) @ rows).double()
        squared = c.results(slope).double().square().sum(1)
        self.product = product if self.product is None else self.product.add_(product)
        self.slope = squared if self.slope is None else self.slope.add_(squared)
        self.count += rows.shape[1]

    def result(self, samples: float) -> tuple[Tensor, Tensor]:
        """E[x x^T] over the rows, and the squared slopes of a sample."""
        assert self.product is not None and self.slope is not None
        count = float(summed(torch.tensor(self.count, dtype=torch.float64)))
        return summed(self.product) / max(count, 1.0), summed(self.slope) / samples


def backward(
    statistics: Statistics,
    data: Calibration,
    batch: Batch,
    number: int,
    nodes: Sequence[fx.Node],
    weights: Callable[[str], Tensor] | None = None,
) -> dict[fx.Node, Tensor]:
    """Return the values of some nodes, with the objective's gradients in `grad` where there are any.

    Weights have no gradients unless they come with some: the first of the nodes on each path is where they end.
    """
    values: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node) -> Callable[[Tensor], None]:
        def look(value: Tensor) -> None:
            values[node] = value
            if value.requires_grad:
                value.retain_grad()
            elif value.is_floating_point():
                value.requires_grad_()

        return look

    dense = weights or dense_weights(statistics.analysis.captured)
    with torch.enable_grad():
        outputs = Observer(statistics.analysis, {n: keep(n) for n in nodes}, dense).run(batch.inputs)
        total = objective(statistics.analysis, data, batch, outputs, statistics.seed + number)
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    return values


def slope_of(value: Tensor) -> Tensor:
    """The objective's gradient with respect to a value, zero where there is none."""
    return torch.zeros_like(value) if value.grad is None else value.grad


def _reached(c: Contraction, value: Tensor) -> Tensor:
    """True for the rows whose result reaches an output, False for padding."""
    return c.results(slope_of(value)).abs().amax((0, 2)) > 0


def _mask_gradients(value: Tensor, dim: int, batch: Batch, name: str) -> npt.NDArray[np.float64]:
    """The gradient of a factor on each index of a dimension, by sample where the first dimension is the batch."""
    product = (value.detach() * slope_of(value)).double()
    _finite(product, name)
    batched = value.dim() > 1 and dim != 0 and value.shape[0] == batch.size
    product = product if batched else product.unsqueeze(0)
    product = product.movedim(dim + (not batched), 1)
    rows: npt.NDArray[np.float64] = product.reshape(*product.shape[:2], -1).sum(2).numpy()
    return rows


def has_masks(batch: Batch) -> bool:
    """Whether a matrix of integers or flags is among the inputs, as token ids and attention masks are."""
    return any(isinstance(x, Tensor) and x.dim() > 1 and not x.is_floating_point() for x in batch.inputs)


def relevance(statistics: Statistics, data: Calibration) -> dict[fx.Node, list[Tensor]]:
    """True for the rows of each contraction whose result reaches an output, False for padding, by portion of the data.

    Nothing where no input can be a mask.
    """
    if not any(map(has_masks, data.batches)):
        return {}
    known = statistics.relevant
    for number, batch in enumerate(portions(statistics, data)):
        missing = [c for c in statistics.contractions if number not in known.get(c.node, {})]
        if missing:
            values = backward(statistics, data, batch, number, [c.node for c in missing])
            for c in missing:
                known.setdefault(c.node, {})[number] = _reached(c, values[c.node])
    return {node: [flags[i] for i in sorted(flags)] for node, flags in known.items()}


def portions(statistics: Statistics, data: Calibration) -> Iterator[Batch]:
    """The batches, cut into as few samples as a backward pass has memory for."""
    each = statistics.activation_bytes
    for batch in data.batches:
        yield from _rows(statistics, batch, max(1, int(statistics.max_memory / max(each, 1))))


def _trainable(statistics: Statistics, names: Collection[str]) -> Any:
    """Dense weights, some of them leaves that gradients reach."""
    dense = dense_weights(statistics.analysis.captured)
    made: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        if name not in names:
            return dense(name)
        if name not in made:
            made[name] = dense(name).detach().requires_grad_()
        return made[name]

    return value


def _channels(statistics: Statistics, data: Calibration, places: Sequence[Place]) -> dict[Place, Channels]:
    sums: dict[Place, Tensor] = {}
    counts: dict[Place, float] = {}

    def look(node: fx.Node, dims: list[int]) -> Any:
        def add(value: Tensor) -> None:
            for dim in dims:
                flat = value.detach().movedim(dim, 0).flatten(1).double()
                new = torch.stack([flat.sum(1), flat.square().sum(1), flat.abs().sum(1), (flat > 0).double().sum(1)])
                sums[node, dim] = sums[node, dim] + new if (node, dim) in sums else new
                counts[node, dim] = counts.get((node, dim), 0) + flat.shape[1]

        return add

    by_node: dict[fx.Node, list[int]] = {}
    for node, dim in places:
        by_node.setdefault(node, []).append(dim)
    observe(statistics.analysis, data.batches, {node: look(node, dims) for node, dims in by_node.items()})
    result = {}
    for place, total in sums.items():
        rows = summed(total).numpy()
        result[place] = Channels(int(summed(torch.tensor(counts[place], dtype=torch.float64))), *rows)
    return result


# ---------------------------------------------------------------------- gradients
def _parameters(statistics: Statistics) -> list[str]:
    tensors = statistics.analysis.captured.tensors
    return [
        n
        for n in statistics.analysis.tensors
        if isinstance(tensors[n], nn.Parameter) and tensors[n].is_floating_point()
    ]


def _squared(statistics: Statistics, data: Calibration) -> dict[str, Tensor]:
    """The mean over samples of squared gradients: the model runs on one sample at a time."""
    names = _parameters(statistics)
    sums = {n: torch.zeros(statistics.weight(n).shape, dtype=torch.float64) for n in names}
    number = 0
    for batch in data.batches:
        for row in _rows(statistics, batch, 1):
            weights = _trainable(statistics, set(names))
            with torch.enable_grad():
                outputs = Observer(statistics.analysis, {}, weights).run(row.inputs)
                loss = objective(statistics.analysis, data, row, outputs, statistics.seed + number)
            loss.backward()  # type: ignore[no-untyped-call]
            number += 1
            for name in names:
                gradient = weights(name).grad
                if gradient is not None:
                    _finite(gradient, name)
                    sums[name] += gradient.double().square()
    count = float(summed(torch.tensor(float(number), dtype=torch.float64)))
    return {n: summed(total) / count for n, total in sums.items()}


def _rows(statistics: Statistics, batch: Batch, count: int) -> list[Batch]:
    """A batch in pieces of so many samples, where the batch is dynamic; else the batch."""
    captured = statistics.analysis.captured
    places = {p for s in captured.symbols if s.name == "batch" for p in s.places}
    names = [str(n.target) for n in captured.graph.nodes if n.op == "placeholder"]
    if not places or batch.size <= count:
        return [batch]

    def piece(start: int) -> Batch:
        part = slice(start, start + count)

        def cut(value: Any) -> Any:
            return value[part] if isinstance(value, Tensor) and value.dim() and len(value) == batch.size else value

        inputs = [x[part] if (n, 0) in places else x for n, x in zip(names, batch.inputs, strict=True)]
        return Batch(inputs, pytree.tree_map(cut, batch.labels))

    return [piece(start) for start in range(0, batch.size, count)]


def _finite(value: Tensor, name: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"calibration: the gradient at '{name}' holds NaN or infinite values")


# ---------------------------------------------------------------------- several processes
def summed(value: Tensor) -> Tensor:
    """The sum over all processes of a distributed run; the value itself where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value


def gathered(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The rows of all processes, one below the other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, rows)
        return np.concatenate(parts)
    return rows
