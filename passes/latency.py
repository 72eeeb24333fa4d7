"""Latency tables: how long each part of the model takes at a grid of widths, measured on the backend that will run it.

The graph is cut before every contraction, so that a part is a contraction and what follows it up to the next. At a few
widths of one of its groups at a time the whole model is rewritten, each part is built and timed beside a fixed
reference workload, and its time is kept on disk under what it depends on: the part itself with all shapes, the backend
and its version, threads, processor. Between the widths times are interpolated on the monotone curve that is nearest to
them, and the factors of several groups are multiplied. What the sum of all parts differs from the measured whole model
by is kept as a factor.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import operator
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, fx, nn

from fxprune.analyse import Analysis
from fxprune.axes import Axis, atoms
from fxprune.backends.base import Backend
from fxprune.backends.timing import compare
from fxprune.blocks import live
from fxprune.costs import Costs, Term
from fxprune.groups import Group
from fxprune.kept import Kept
from fxprune.rewrite import Rewritten, rewrite

#: Shares of the units at which parts are measured.
GRID = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
#: Rounds of a measurement of one part. The time is a low quantile of them: other work on the machine only ever adds.
REPEATS = 31
_QUANTILE = 0.2
#: Rows and width of the linear layer that times are multiples of: milliseconds of work, as a shorter call is mostly the
#: waking of threads.
_REFERENCE = (512, 1024)
#: Parts are built together as long as their weights and inputs take at most so many bytes.
_TOGETHER = 512 * 2**20


@dataclass
class Part:
    """A run of the graph's nodes.

    Attributes:
        nodes: in the captured graph.
        macs: of its contractions, as dimensions.
        axes: those of groups that its contractions carry.
        dense: seconds with all units.
        curves: by axis, (units, seconds) with all units of the other axes, measured below the dense number.
        contractions: those among the nodes.
    """

    nodes: list[fx.Node]
    macs: list[Any]
    axes: frozenset[Axis]
    dense: float = 0.0
    curves: dict[Axis, list[tuple[int, float]]] = field(default_factory=dict)
    contractions: tuple[fx.Node, ...] = ()

    @cached_property
    def _factors(self) -> dict[Axis, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """For each axis units and the factor on the dense time, made monotone by least squares of relative errors."""
        result = {}
        for axis, curve in self.curves.items():
            points = dict([*curve, (axis.size, self.dense)])
            x = np.array(sorted(points), dtype=float)
            y = np.array([points[int(n)] for n in x])
            y = isotonic_regression(y, weights=1 / np.maximum(y, 1e-12) ** 2).x
            # Below the grid: towards half of the smallest's time at no units.
            result[axis] = (np.array([0.0, *x]), np.array([y[0] / 2, *y]) / max(float(y[-1]), 1e-30))
        return result

    def seconds(self, counts: Mapping[Axis, Any]) -> Any:
        """Return the time at these widths: the dense time, times a factor for each axis.

        An axis has a curve of its own because times are not functions of the work alone: attention takes a softmax for
        each head, whatever its dimensions are.

        Args:
            counts: units by axis, numbers or arrays that broadcast; an axis that is not in it keeps all.
        """
        total: Any = self.dense
        for axis, (x, y) in self._factors.items():
            if axis in counts:
                total = total * np.interp(counts[axis], x, y)
        return total if np.ndim(total) else float(total)


class LatencyCosts(Costs):
    """Costs that know latency too: kind "latency", in seconds.

    Attributes:
        whole: seconds of the dense model, measured.
        sum: seconds of all its parts.
    """

    def __init__(
        self,
        analysis: Analysis,
        parts: Sequence[Part],
        whole: float,
        removed: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        super().__init__(analysis, removed)
        self.parts = list(parts)
        self.whole = whole
        self.sum = sum(p.seconds({}) for p in parts)
        self.alive = self.parts
        self._by_axis: dict[Axis, list[Part]] = {}
        for part in parts:
            for axis in part.axes:
                self._by_axis.setdefault(axis, []).append(part)

    @property
    def residual(self) -> float:
        """The measured time of the whole model over the sum of its parts."""
        return self.whole / self.sum if self.sum else 1.0

    def without(self, removed: Mapping[fx.Node, fx.Node]) -> LatencyCosts:
        """Return the costs without some blocks: without the parts whose contractions are gone."""
        if not removed:
            return self
        result = LatencyCosts(self._analysis, self.parts, self.whole, removed)
        alive = live(self._analysis, removed)
        result.alive = [p for p in self.parts if not p.contractions or any(n in alive for n in p.contractions)]
        return result

    def latency(self, counts: Mapping[Axis, int]) -> float:
        """Return the predicted seconds of the whole model."""
        return float(self.residual * sum(p.seconds(counts) for p in self.alive))

    def by_part(self, counts: Mapping[Axis, int]) -> dict[str, float]:
        """Return the predicted seconds of each part, by the layer or the node of its first contraction."""
        found: dict[str, float] = {}
        for part in self.alive:
            node = part.contractions[0] if part.contractions else part.nodes[0]
            weights = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
            name = weights[0].removesuffix(".weight") if weights else node.name
            found[name] = found.get(name, 0.0) + self.residual * part.seconds(counts)
        return found

    def of(self, kind: str, counts: Mapping[Axis, int]) -> Any:
        """Return the cost called "macs", "params", "memory" or "latency"."""
        return self.latency(counts) if kind == "latency" else super().of(kind, counts)

    def change(self, kind: str, new: Mapping[Axis, int], counts: Mapping[Axis, int]) -> Any:
        """Return by how much the cost grows when the axes of `new` keep so many units."""
        if kind != "latency":
            return super().change(kind, new, counts)
        alive = {id(p) for p in self.alive}
        touched = {id(p): p for axis in new for p in self._by_axis.get(axis, []) if id(p) in alive}.values()
        after = {**counts, **new}
        grown = sum(p.seconds(after) - p.seconds(counts) for p in touched)
        return self.residual * grown

    def terms(self, kind: str) -> list[Term] | None:
        """Return the summands of a cost; of latency one for each part."""
        if kind != "latency":
            return super().terms(kind)

        def cost(part: Part, counts: Mapping[Axis, Any]) -> Any:
            return self.residual * part.seconds(counts)

        return [Term(p.axes, functools.partial(cost, p)) for p in self.alive]


def split(analysis: Analysis, groups: Sequence[Group]) -> list[Part]:
    """Cut the graph before every contraction; what comes before the first belongs to it."""
    free = {g.axis for g in groups}
    macs: dict[fx.Node, list[Any]] = {}
    for node, dims in analysis.macs:
        macs.setdefault(node, []).append(dims)
    parts: list[Part] = []
    nodes: list[fx.Node] = []
    for node in analysis.captured.graph.nodes:
        if node.op != "call_function":
            continue
        if node in macs and any(n in macs for n in nodes):
            parts.append(_part(nodes, macs, free))
            nodes = []
        nodes.append(node)
    return [*parts, _part(nodes, macs, free)] if nodes else parts


def _part(nodes: list[fx.Node], macs: Mapping[fx.Node, list[Any]], free: set[Axis]) -> Part:
    own = [dims for n in nodes for dims in macs.get(n, [])]
    axes = frozenset(a for dims in own for d in dims for a in atoms(d)) & free
    return Part(list(nodes), own, axes, contractions=tuple(n for n in nodes if n in macs))


# ---------------------------------------------------------------------- measuring
def tables(
    analysis: Analysis,
    model: nn.Module,
    groups: Sequence[Group],
    backend: Backend,
    step: Callable[[Group], int],
    *,
    threads: int,
    whole: Callable[[Clock], float],
    progress: Callable[[int, int], None] | None = None,
    grid: Sequence[float] = GRID,
) -> LatencyCosts:
    """Measure every part at every width of the grid, and return costs that know latency.

    Args:
        step: what a group's width is a multiple of.
        whole: seconds of the dense model by a clock that knows the reference.
        progress: called with how many measurements are done and how many there are.
    """
    parts = split(analysis, groups)
    clock = Clock(backend, threads)
    colours = _colours(parts)
    shares = sorted((share for share in grid if share < 1), reverse=True)
    rounds = [(frozenset[Axis](), 1.0), *((colour, share) for colour in colours for share in shares)]
    for done, (colour, share) in enumerate(rounds):
        if progress:
            progress(done, len(rounds))
        counts = {g.axis: _width(g, share, step(g)) for g in groups if g.axis in colour}
        if colour and all(counts[a] == a.size for a in counts):
            continue
        rewritten = rewrite(analysis, Kept({axis: np.arange(n) for axis, n in counts.items()}), model)
        chosen = [m for m in _modules(analysis, rewritten, parts) if not colour or m[0].axes & colour]
        times = clock.seconds([(module, inputs) for _, module, inputs in chosen])
        for (part, _, _), seconds in zip(chosen, times, strict=True):
            if not colour:
                part.dense = seconds
            for axis in part.axes & colour:
                part.curves.setdefault(axis, []).append((counts[axis], seconds))
    clock.save()
    return LatencyCosts(analysis, parts, whole(clock))


def _colours(parts: Sequence[Part]) -> list[frozenset[Axis]]:
    """All axes in sets of which no part has two, so that one rewrite measures a whole set."""
    graph = networkx.Graph()
    for part in parts:
        graph.add_nodes_from(part.axes)
        graph.add_edges_from(itertools.combinations(part.axes, 2))
    found = networkx.greedy_color(graph)
    return [frozenset(a for a, c in found.items() if c == colour) for colour in sorted(set(found.values()))]


def _width(group: Group, share: float, step: int) -> int:
    """The multiple of a step nearest to a share of the units, at least one step."""
    if share >= 1:
        return group.size
    return min(max(round(share * group.size / step) * step, step, group.least), group.size)


def _modules(
    analysis: Analysis, rewritten: Rewritten, parts: Sequence[Part]
) -> Iterator[tuple[Part, nn.Module, list[Tensor]]]:
    """Each part of the rewritten graph as a module of its own, and inputs for it."""
    graph = rewritten.module.graph
    place = {n: i for i, n in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    starts = []
    for part in parts:
        emitted = [place[rewritten.nodes[n]] for n in part.nodes if n in rewritten.nodes]
        starts.append(min(emitted) if emitted else None)
    values = _Values(rewritten.module)
    with torch.no_grad():
        values.run(*_example(analysis, rewritten), enable_io_processing=False)
    known = [s for s in starts if s is not None]
    bounds = [*known[1:], len(nodes) - 1]
    ends = dict(zip(known, bounds, strict=True))
    first = True
    for part, start in zip(parts, starts, strict=True):
        if start is None:
            continue
        run = nodes[0 if first else start : ends[start]]
        first = False
        built = _module(rewritten.module, [n for n in run if n.op in ("call_function", "call_module")], values.values)
        if built is not None:
            yield part, *built


def _example(analysis: Analysis, rewritten: Rewritten) -> list[Any]:
    """Flat inputs in the order of the emitted graph's placeholders; numbers for those that have no values."""
    from fxprune.proof_inputs import random_inputs

    given = analysis.captured.inputs
    meta = any(isinstance(x, Tensor) and x.is_meta for x in given)
    return random_inputs(analysis.captured, 0) if meta else given


class _Values(fx.Interpreter):
    """Keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _module(
    root: fx.GraphModule, run: Sequence[fx.Node], values: Mapping[fx.Node, Any]
) -> tuple[nn.Module, list[Tensor]] | None:
    """Nodes as a module: tensors from outside are inputs, numbers from outside are written in."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    inputs: list[Tensor] = []
    inside = set(run)

    def outside(node: fx.Node) -> Any:
        if node in copies:
            return copies[node]
        if node.op == "get_attr":
            copies[node] = graph.get_attr(str(node.target))
            return copies[node]
        value = values[node]
        if not isinstance(value, Tensor):
            return value
        raise AssertionError(f"{node} is neither inside nor an input")

    external = [a for n in run for a in n.all_input_nodes if a not in inside]
    for node in dict.fromkeys(external):
        if node.op != "get_attr" and isinstance(values[node], Tensor):
            copies[node] = graph.placeholder(f"x{len(inputs)}")
            inputs.append(values[node])
    for node in run:
        if not isinstance(values[node], Tensor | list | tuple):
            copies[node] = values[node]
            continue
        copies[node] = graph.node_copy(node, outside)
    used = [n for n in run if isinstance(values[n], Tensor) and any(u not in inside for u in n.users)]
    if not used or not inputs:
        return None
    graph.output(tuple(copies[n] for n in used))
    return fx.GraphModule(root, graph), inputs


# ---------------------------------------------------------------------- the clock and its cache
def cache_folder() -> Path:
    """Return where measured times are kept: $XDG_CACHE_HOME/fxprune/latency, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fxprune" / "latency"


class Clock:
    """Times modules beside a fixed reference workload; times are multiples of the reference's, kept on disk."""

    def __init__(self, backend: Backend, threads: int) -> None:
        self.backend, self.threads = backend, threads
        self.file = cache_folder() / f"{backend.name}-{_digest(_machine(threads))}.json"
        self.known: dict[str, float] = {}
        if self.file.exists():
            try:
                self.known = json.loads(self.file.read_text())
            except ValueError:
                self.known = {}
        self._reference: Callable[[], object] | None = None

    def seconds(self, parts: Sequence[tuple[nn.Module, Sequence[Any]]]) -> list[float]:
        """Return the time of each module on its inputs, in times of the reference; equal ones are timed once."""
        keys = [_digest([self.backend.key, *_describe(module, inputs)]) for module, inputs in parts]
        unknown = {key: part for key, part in zip(keys, parts, strict=True) if key not in self.known}
        for some in _portions(unknown):
            runners = self.backend.build_parts([unknown[key] for key in some], threads=self.threads)
            calls = {key: runner.bind(*unknown[key][1]) for key, runner in zip(some, runners, strict=True)}
            self.known.update(self.ratios(calls))
        return [self.known[key] for key in keys]

    def ratios(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Return how many times the reference's time each call takes.

        Every round runs all of them once, so that a slow spell of the machine meets a few samples of each and not all
        of one, and each finds the caches as the others, like the rest of its model, leave them.
        """
        if self._reference is None:
            rows, width = _REFERENCE
            layer, inputs = nn.Linear(width, width), (torch.ones(rows, width),)
            runner = self.backend.build(layer, inputs, threads=self.threads, dynamic=False)
            self._reference = runner.bind(*inputs)
        timed = compare(
            {"reference": self._reference, **calls},
            reference="reference",
            repeats=REPEATS,
            warmup=2,
            min_time=0.001,
        )
        low = {name: float(np.quantile(latency.samples, _QUANTILE)) for name, latency in timed.latencies.items()}
        return {name: low[name] / low["reference"] for name in calls}

    def save(self) -> None:
        """Write the times to disk."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(self.known))
        temporary.replace(self.file)


def _portions(parts: Mapping[str, tuple[nn.Module, Sequence[Any]]]) -> Iterator[list[str]]:
    """The keys in runs that are built together: as many as their weights and inputs leave memory for."""
    some: list[str] = []
    size = 0
    for key, (module, inputs) in parts.items():
        tensors = [*module.parameters(), *module.buffers(), *(x for x in inputs if isinstance(x, Tensor))]
        own = sum(t.nbytes for t in tensors)
        if some and size + own > _TOGETHER:
            yield some
            some, size = [], 0
        some.append(key)
        size += own
    if some:
        yield some


def _machine(threads: int) -> list[Any]:
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return [device, threads, _REFERENCE, torch.__version__, version("onnxruntime"), version("tensorrt")]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _describe(module: nn.Module, inputs: Sequence[Any]) -> list[str]:
    """All that the time of a part depends on: its operators, layers, shapes, types and literals."""
    lines = [f"{tuple(x.shape)} {x.dtype} {x.stride()}" if isinstance(x, Tensor) else repr(x) for x in inputs]
    if not isinstance(module, fx.GraphModule):
        return [*lines, repr(module)]
    numbers = {n: i for i, n in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        what = str(node.target)
        if node.op == "call_module":
            what = repr(module.get_submodule(what))
        elif node.op == "get_attr":
            tensor = operator.attrgetter(what)(module)
            what = f"{tuple(tensor.shape)} {tensor.dtype}"
        elif node.op == "placeholder":
            what = ""
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{numbers[n]}")
        lines.append(f"{node.op} {what} {arguments}")
    return lines


def _digest(lines: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()[:24]
