"""The passes over calibration data that fill `Statistics`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.errors import NonFiniteError
from fxprune.groups import Group, describe, positions
from fxprune.passes.calibration import Batch, Calibration
from fxprune.passes.consumers import Contraction, Read
from fxprune.passes.layout import Layout, layouts
from fxprune.passes.observe import Observer, Use, objective, observe
from fxprune.prove import dense_weights

if TYPE_CHECKING:
    from fxprune.capture import Captured
    from fxprune.passes.statistics import Statistics

#: An activation and one of its dimensions.
Place = tuple[fx.Node, int]
Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Channels:
    """Sums over all entries of an activation but one dimension, float64 by its index.

    Attributes:
        count: how many entries each sum has.
        total, square, absolute: sums of x, x^2 and |x|.
        positive: how many entries are above zero.
    """

    count: float
    total: Floats
    square: Floats
    absolute: Floats
    positive: Floats

    @property
    def mean(self) -> Floats:
        """E[x]."""
        return self.total / self.count

    @property
    def power(self) -> Floats:
        """E[x^2]."""
        return self.square / self.count

    @property
    def variance(self) -> Floats:
        """E[x^2] - E[x]^2."""
        return np.maximum(self.power - self.mean**2, 0.0)


@dataclass(slots=True)
class Gathered:
    """What one call of `collect` found; see the methods of `Statistics` that return it.

    Attributes:
        moments, slopes: by contraction.
        channels: by activation and dimension.
        gradients, squared: by parameter.
        masks: by the name of a group.
        known: numbers that follow from these, by name.
    """

    moments: dict[Contraction, Tensor] = field(default_factory=dict)
    slopes: dict[Contraction, Tensor] = field(default_factory=dict)
    channels: dict[Place, Channels] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    squared: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Floats] = field(default_factory=dict)
    known: dict[str, float] = field(default_factory=dict)


def collect(
    statistics: Statistics,
    data: Calibration,
    read: Sequence[Contraction],
    groups: Sequence[Group],
    needs: Collection[str],
) -> Gathered:
    """Make the passes over the data that the needs take.

    Args:
        read: the contractions whose second moments are needed.
        groups: whose activations and mask gradients are needed.
    """
    found = Gathered()
    if "activations" in needs:
        found.channels = _channels(statistics, data, [r for g in groups for r in statistics.reads(g)])
    if set(needs) & {"moments", "gradients", "mask_gradients"}:
        _sweep(statistics, data, read if "moments" in needs else [], groups, needs, found)
    if "sample_gradients" in needs:
        found.squared = _squared(statistics, data)
    return found


# ---------------------------------------------------------------------- one pass forwards and backwards
def _sweep(
    statistics: Statistics,
    data: Calibration,
    read: Sequence[Contraction],
    groups: Sequence[Group],
    needs: Collection[str],
    found: Gathered,
) -> None:
    """Second moments, how much the objective depends on each result, and gradients, as far as they are needed."""
    names = _parameters(statistics) if "gradients" in needs else []
    gradients = {n: torch.zeros(statistics.weight(n).shape, dtype=torch.float64) for n in names}
    moments = {c: _Moments() for c in read}
    masks, single = _masks(statistics, groups if "mask_gradients" in needs else [])
    relevant = statistics.contractions if moments and any(map(has_masks, data.batches)) else []
    nodes = list(dict.fromkeys(c.node for c in [*read, *relevant]))
    if names or nodes or masks.groups:
        for number, batch in enumerate(reported(statistics, portions(statistics, data))):
            weights = _trainable(statistics, set(names))
            operands = [c.operand for c in read]
            values = backward(statistics, data, batch, number, nodes, masks.uses, operands, weights)
            rows = {c: _reached(c, values[c.node]) for c in relevant}
            for c, flags in rows.items():
                statistics.relevant.setdefault(c.node, {})[number] = flags
            for c, sums in moments.items():
                sums.add(c, values[c.operand].detach(), slope_of(values[c.node]), statistics.kernel(c), rows.get(c))
            for name in names:
                gradients[name] += _gradient(weights, name)
            masks.add(values, batch)
    one = reported(statistics, portions(statistics, data, 1))
    for number, batch in enumerate(one if single.groups else ()):
        single.add(backward(statistics, data, batch, number, [], single.uses), batch)
    samples = shared(data.samples)
    found.gradients = {n: summed(total) / samples for n, total in gradients.items()}
    found.masks = masks.result() | single.result()
    for c, sums in moments.items():
        found.moments[c], found.slopes[c] = sums.result(samples)
        if not all(bool(torch.isfinite(t).all()) for t in (found.moments[c], found.slopes[c])):
            raise NonFiniteError(f"calibration: what {describe(c.node)} reads holds NaN or infinite values")


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
        product = (rows.transpose(1, 2) @ rows).double().cpu()
        squared = c.results(slope).double().square().sum(1).cpu()
        self.product = product if self.product is None else self.product.add_(product)
        self.slope = squared if self.slope is None else self.slope.add_(squared)
        self.count += rows.shape[1]

    def result(self, samples: float) -> tuple[Tensor, Tensor]:
        """E[x x^T] over the rows, and the squared slopes of a sample."""
        assert self.product is not None and self.slope is not None
        return summed(self.product) / max(shared(self.count), 1.0), summed(self.slope) / samples


@dataclass(slots=True)
class _Masks:
    """Gradients of a factor on each unit of some groups, where it is read, by sample.

    Attributes:
        groups: each with its reads.
        layouts: where the samples are in what is read. Without them a batch is one row: the sum of its samples over the
            root of their number, so that squares are those of one sample.
        rows: by group, (samples, units) of each batch.
    """

    statistics: Statistics
    groups: dict[Group, list[Read]]
    layouts: Mapping[fx.Node, Layout]
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def uses(self) -> list[Use]:
        """What has to be looked at."""
        return list(dict.fromkeys((r.node, r.operand) for reads in self.groups.values() for r in reads))

    def add(self, values: Mapping[fx.Node | Use, Tensor], batch: Batch) -> None:
        """Add a batch."""
        dims, known = self.statistics.analysis.dims, dict[tuple[Use, int], Tensor]()
        for group, reads in self.groups.items():
            total = torch.zeros(batch.size if self.layouts else 1, group.size, dtype=torch.float64)
            for r in reads:
                use = (r.node, r.operand)
                if (use, r.dim) not in known:
                    known[use, r.dim] = self._channels(values[use], r, batch.size)
                for units in positions(dims[r.operand][r.dim], group.axis):
                    inside = torch.from_numpy(np.flatnonzero(units >= 0))
                    total.index_add_(1, torch.from_numpy(units)[inside], known[use, r.dim][:, inside])
            self.rows.setdefault(group.name, []).append(total / (batch.size / len(total)) ** 0.5)

    def _channels(self, value: Tensor, r: Read, samples: int) -> Tensor:
        """The gradient of a factor on each index of the dimension, (samples, channels)."""
        product = (value.detach() * slope_of(value)).double().cpu()
        layout = self.layouts.get(r.operand)
        if layout is None:
            return product.movedim(r.dim, 0).flatten(1).sum(1).unsqueeze(0)
        rest = [i for i in range(product.dim()) if i not in (layout.dim, r.dim)]
        product = product.sum(rest) if rest else product
        product = product if layout.dim < r.dim else product.t()
        result = product.new_zeros(samples, product.shape[1])
        return result.index_add_(0, layout.samples(len(product), samples), product)

    def result(self) -> dict[str, Floats]:
        """By group, (samples, units) of all batches of all processes."""
        return {name: gathered(torch.cat(rows).numpy()) for name, rows in self.rows.items()}


def _masks(statistics: Statistics, groups: Sequence[Group]) -> tuple[_Masks, _Masks]:
    """Those that whole batches show, and those that take one sample at a time."""
    reads = {g: statistics.reads(g) for g in groups}
    found = layouts(statistics.analysis, (r.operand for rs in reads.values() for r in rs), statistics.seed)
    plain = {g: rs for g, rs in reads.items() if all(r.operand in found for r in rs)}
    return _Masks(statistics, plain, found), _Masks(statistics, {g: r for g, r in reads.items() if g not in plain}, {})


def backward(
    statistics: Statistics,
    data: Calibration,
    batch: Batch,
    number: int,
    nodes: Sequence[fx.Node],
    uses: Sequence[Use] = (),
    operands: Sequence[fx.Node] = (),
    weights: Callable[[str], Tensor] | None = None,
) -> dict[fx.Node | Use, Tensor]:
    """Return the values of some nodes and operands, with the objective's gradients in `grad` where there are any.

    Weights have no gradients unless they come with some: the first of the nodes on each path is where they end.

    Args:
        nodes: whose values are wanted with gradients, over all that reads them.
        uses: operands with the gradient that comes back through one node alone.
        operands: nodes whose values are wanted without.

    Raises:
        NonFiniteError: a value or a gradient is NaN or infinite.
    """
    values: dict[fx.Node | Use, Tensor] = {}

    def keep(at: fx.Node | Use) -> Callable[[Tensor], None]:
        def look(value: Tensor) -> None:
            values[at] = value
            if value.requires_grad:
                value.retain_grad()
            elif value.is_floating_point():
                value.requires_grad_()

        return look

    def note(node: fx.Node) -> Callable[[Tensor], None]:
        return lambda value: values.update({node: value})

    dense = weights or dense_weights(statistics.analysis.captured)
    looks = {n: note(n) for n in operands} | {n: keep(n) for n in nodes}
    with torch.enable_grad():
        outputs = Observer(statistics.analysis, looks, dense, {u: keep(u) for u in uses}).run(batch.inputs)
        total = objective(statistics.analysis, data, batch, outputs, statistics.seed + number)
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    for at, value in values.items():
        if value.is_leaf or value.retains_grad:
            _finite(value.grad, describe(at[1] if isinstance(at, tuple) else at))
    return values


def slope_of(value: Tensor) -> Tensor:
    """The objective's gradient with respect to a value, zero where there is none."""
    return torch.zeros_like(value) if value.grad is None else value.grad


def _reached(c: Contraction, value: Tensor) -> Tensor:
    """True for the rows whose result reaches an output, False for padding."""
    return c.results(slope_of(value)).abs().amax((0, 2)) > 0


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


def portions(statistics: Statistics, data: Calibration, most: int | None = None) -> Iterator[Batch]:
    """The batches, cut into as few samples as a backward pass has memory for, or into at most so many."""
    each = max(1, int(statistics.max_memory / max(statistics.activation_bytes, 1)))
    for batch in data.batches:
        yield from pieces(statistics.analysis.captured, batch, min(most or each, each))


def reported(statistics: Statistics, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; says before each how many samples are done."""
    done = 0
    total = statistics.data.samples if statistics.data is not None else 0
    for batch in batches:
        statistics.say(f"calibrate: {done} of {total} samples")
        yield batch
        done += batch.size


def pieces(captured: Captured, batch: Batch, count: int) -> list[Batch]:
    """Return a batch in pieces of so many samples, where the batch is dynamic; else the batch."""
    places = {p for s in captured.symbols if s.name == "batch" for p in s.places}
    names = [str(n.target) for n in captured.graph.nodes if n.op == "placeholder"]
    if not places or batch.size <= count:
        return [batch]

    def piece(start: int) -> Batch:
        part = slice(start, start + count)

        def cut(value: Any) -> Any:
            return value[part] if _batched(value, batch.size) else value

        inputs = [x[part] if (n, 0) in places else x for n, x in zip(names, batch.inputs, strict=True)]
        return Batch(inputs, pytree.tree_map(cut, batch.labels, is_leaf=lambda v: _batched(v, batch.size)))

    return [piece(start) for start in range(0, batch.size, count)]


def _batched(labels: Any, samples: int) -> bool:
    """Whether these are labels of each sample: a tensor, an array, or a list of numbers or names."""
    if isinstance(labels, list):
        return len(labels) == samples and all(isinstance(x, int | float | str) for x in labels)
    return isinstance(labels, Tensor | np.ndarray) and labels.ndim > 0 and len(labels) == samples


def _channels(statistics: Statistics, data: Calibration, reads: Sequence[Read]) -> dict[Place, Channels]:
    """Sums over what is read; rows of padding, of which no output knows, do not count where only linear layers read."""
    readers: dict[fx.Node, dict[int, list[Contraction | None]]] = {}
    for r in reads:
        for node, dim in [(r.operand, r.dim)] + ([r.other] if r.other is not None else []):
            readers.setdefault(node, {}).setdefault(dim, []).append(r.by)
    known = relevance(statistics, data)
    sums: dict[Place, Tensor] = {}
    counts: dict[Place, float] = {}

    def look(node: fx.Node, number: int) -> Callable[[Tensor], None]:
        def add(value: Tensor) -> None:
            for dim, by in readers[node].items():
                flat = value.detach().movedim(dim, 0).flatten(1).double()
                flags = [known[c.node][number] for c in by if c is not None and c.rank == 0 and c.node in known]
                if len(flags) == len(by):
                    flat = flat[:, torch.stack(flags).any(0)]
                new = torch.stack([flat.sum(1), flat.square().sum(1), flat.abs().sum(1), (flat > 0).double().sum(1)])
                sums[node, dim] = sums[node, dim] + new if (node, dim) in sums else new
                counts[node, dim] = counts.get((node, dim), 0) + flat.shape[1]

        return add

    for number, batch in enumerate(reported(statistics, portions(statistics, data))):
        observe(statistics.analysis, [batch], {node: look(node, number) for node in readers})
    return {
        place: Channels(max(shared(counts[place]), 1.0), *summed(total).cpu().numpy()) for place, total in sums.items()
    }


# ---------------------------------------------------------------------- gradients of parameters
def _parameters(statistics: Statistics) -> list[str]:
    tensors = statistics.analysis.captured.tensors
    return [
        n
        for n in statistics.analysis.tensors
        if isinstance(tensors[n], nn.Parameter) and tensors[n].is_floating_point()
    ]


def _trainable(statistics: Statistics, names: Collection[str]) -> Callable[[str], Tensor]:
    """Dense weights, some of them leaves that gradients reach; the model's own are left alone."""
    dense = dense_weights(statistics.analysis.captured)
    made: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        if name not in names:
            return dense(name)
        if name not in made:
            made[name] = dense(name).detach().requires_grad_()
        return made[name]

    return value


def _gradient(weights: Callable[[str], Tensor], name: str) -> Tensor:
    """The gradient that has reached a weight, float64."""
    weight = weights(name)
    _finite(weight.grad, f"'{name}'")
    return slope_of(weight).double().cpu()


def _squared(statistics: Statistics, data: Calibration) -> dict[str, Tensor]:
    """The mean over samples of squared gradients: the model runs on one sample at a time, if its batch is dynamic."""
    names = _parameters(statistics)
    sums = {n: torch.zeros(statistics.weight(n).shape, dtype=torch.float64) for n in names}
    for number, batch in enumerate(reported(statistics, portions(statistics, data, 1))):
        weights = _trainable(statistics, set(names))
        backward(statistics, data, batch, number, [], weights=weights)
        for name in names:
            sums[name] += _gradient(weights, name).square()
    samples = shared(data.samples)
    return {n: summed(total) / samples for n, total in sums.items()}


def _finite(gradient: Tensor | None, where: str) -> None:
    if gradient is not None and not bool(torch.isfinite(gradient.sum(dtype=torch.float64))):
        raise NonFiniteError(f"calibration: the gradient at {where} holds NaN or infinite values")


# ---------------------------------------------------------------------- several processes
def distributed() -> bool:
    """Whether other processes feed data as well."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed(value: Tensor) -> Tensor:
    """The sum over all processes of a distributed run; the value itself where there is one process."""
    if distributed():
        nccl = torch.distributed.get_backend() == "nccl"
        total = value.to("cuda") if nccl else value.clone()
        torch.distributed.all_reduce(total)
        return total.to(value.device)
    return value


def shared(count: float) -> float:
    """The sum of a number over all processes."""
    return float(summed(torch.tensor(float(count), dtype=torch.float64)))


def gathered(rows: Floats) -> Floats:
    """The rows of all processes, one below the other."""
    if distributed():
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, rows)
        return np.concatenate(parts)
    return rows
