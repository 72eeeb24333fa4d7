"""2:4 sparse weights on CUDA: of every four weights along a layer's inputs two are zero, and the GPU skips them.

Whether that pays depends on the layer's shape and on how many rows it is given: small products are slower than dense
ones. Every layer is timed both ways, and stays dense unless the sparse kernel is the faster one beyond doubt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.backends.place import HALF
from fxprune.backends.timing import Comparison, compare

#: What is tried. CUTLASS runs wherever there are sparse tensor cores; cuSPARSELt only where torch was built with it.
KERNELS = ("cusparselt", "cutlass")
#: Rounds in which dense and sparse are timed in turns, and those before.
ROUNDS, WARMUP = 11, 3
#: How often a layer runs in one call that is timed, so that starting the call is a small part of it.
REPEATS = 10
#: Milliseconds of one sample: far above the resolution of CUDA events, which is half a microsecond.
SAMPLE_MS = 0.5


def holds_pattern(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether of every `m` consecutive weights along the inputs, dimension 1, at most `n` are not zero.

    `weight` is (outputs, inputs, ...). False where the inputs do not divide into groups of `m`.

    >>> holds_pattern(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0]]))
    True
    >>> holds_pattern(torch.tensor([[1.0, 0.0, 4.0, 2.0]])), holds_pattern(torch.zeros(2, 6))
    (False, False)
    """
    if weight.dim() < 2 or weight.shape[1] % m:
        return False
    groups = weight.detach().reshape(len(weight), weight.shape[1] // m, m, -1)
    return bool((groups.count_nonzero(2) <= n).all())


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What became of a layer whose weight holds the 2:4 pattern.

    Attributes:
        layer: its name.
        shape: (outputs, inputs).
        rows: how many rows it is given at once.
        dense_ms, sparse_ms: medians of the dense layer and of the fastest sparse one, timed in turns; None where no
            sparse kernel runs.
        speedup: the median of the ratios, with its 95 % interval.
        kernel: the sparse kernel that the layer now has; None where it stays dense.
        reason: why it stays dense.
    """

    layer: str
    shape: tuple[int, int]
    rows: int
    dense_ms: float | None = None
    sparse_ms: float | None = None
    speedup: tuple[float, float, float] | None = None
    kernel: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {"shape": list(self.shape), "speedup": list(self.speedup) if self.speedup else None}


#: (calls by name) -> the times of each, in turns.
Timer = Callable[[Mapping[str, Callable[[], object]]], Comparison]


def choose(
    module: nn.Module, rows: Mapping[str, int], graphs: bool, timer: Timer | None = None, compressor: Any = None
) -> list[LayerChoice]:
    """Give each linear layer of `module` that is faster with a sparse weight one; `module` is changed.

    Args:
        module: on a CUDA device, in half precision.
        rows: layer -> rows that it is given at once, from `count_rows`.
        graphs: whether the model will run from a CUDA graph or compiled. The layers are then timed from graphs, without
            the time that Python takes to start them, which is longer for sparse ones.
        timer, compressor: (for tests) instead of `time_calls` and a `Compressor`.
    """
    timer = timer or (lambda calls: time_calls(calls, graphs))
    compressor = compressor or Compressor()
    known: dict[object, LayerChoice] = {}
    choices = []
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or name not in rows or layer.weight.dtype not in HALF:
            continue
        if not holds_pattern(layer.weight):
            continue
        # Layers of one shape take the same time, whatever their weights.
        key = (layer.weight.shape, rows[name], layer.weight.dtype, layer.bias is None)
        if key not in known:
            known[key] = _choice(name, layer, rows[name], timer, compressor)
        found = known[key]
        if found.kernel is not None:
            layer.weight = _frozen(compressor(layer.weight.detach(), found.kernel, rows[name]))
        values = {field: getattr(found, field) for field in LayerChoice.__dataclass_fields__} | {"layer": name}
        choices.append(LayerChoice(**values))
    return choices


def count_rows(module: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Return the rows that each linear layer is given while `run` runs `module`; the most, where it is called often.

    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> count_rows(net, lambda: net(torch.zeros(3, 5, 4)))
    {'0': 15}
    """
    rows: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(_layer: nn.Module, args: tuple[Any, ...], _out: object) -> None:
            rows[name] = max(rows.get(name, 0), args[0].numel() // max(args[0].shape[-1], 1))

        return count

    handles = [p.register_forward_hook(hook(n)) for n, p in module.named_modules() if type(p) is nn.Linear]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return rows


class Compressor:
    """Brings 2:4 weights into the form that a kernel takes; searches once for what is fastest for a shape."""

    def __init__(self) -> None:
        self._algorithms: dict[object, int] = {}

    def __call__(self, weight: Tensor, kernel: str, rows: int) -> Tensor:
        """Return a 2:4 weight (outputs, inputs) compressed for a kernel of `KERNELS`, tuned for inputs of so many rows.

        Raises whatever torch raises where the kernel does not know the shape, the type or the GPU.
        """
        classes = {
            "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
            "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the interface is a prototype
            sparse: Any = classes[kernel].from_dense(weight.contiguous())
        if kernel == "cusparselt":
            key = (weight.shape, weight.dtype, rows)
            if key not in self._algorithms:
                self._algorithms[key] = self._fastest(sparse, weight, rows)
            sparse.alg_id_cusparselt = self._algorithms[key]
        result: Tensor = sparse
        return result

    def _fastest(self, sparse: Any, weight: Tensor, rows: int) -> int:
        """Return the number of cuSPARSELt's fastest algorithm: the one that it takes by itself may be far from it."""
        # Rows come in eights, as its layout asks for and torch pads them.
        inputs = torch.zeros(-(-rows // 8) * 8, weight.shape[1], dtype=weight.dtype, device=weight.device)
        try:
            return int(torch._cslt_sparse_mm_search(sparse.packed, inputs.t()))
        except RuntimeError:  # a search that it cannot make: the product itself may still work
            return int(sparse.alg_id_cusparselt)


def time_calls(calls: Mapping[str, Callable[[], object]], graphs: bool) -> Comparison:
    """Time CUDA work in turns, by CUDA events on the current stream; "dense" is the reference.

    With `graphs` each call is captured in a CUDA graph first. Raises RuntimeError where one cannot be.
    """
    ready = {name: graphed(call) for name, call in calls.items()} if graphs else calls
    clock = EventClock()
    return compare(ready, reference="dense", repeats=ROUNDS, warmup=WARMUP, min_time=SAMPLE_MS / 1e3, clock=clock)


class EventClock:
    """A clock that tells when the GPU has done what it was given so far: seconds since its first reading.

    A reading records a CUDA event on the current stream and waits for it. CUDA tells time in float32 milliseconds: a
    clock is exact to a microsecond for some ten seconds, so each measurement should have its own.
    """

    def __init__(self) -> None:
        self._start: Any = None

    def __call__(self) -> float:
        """Return the seconds, once the GPU has come here."""
        now: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        now.record()
        now.synchronize()
        if self._start is None:
            self._start = now
        return float(self._start.elapsed_time(now)) / 1e3


def graphed(call: Callable[[], object], warmups: int = 3) -> Callable[[], None]:
    """Return a call that replays, as one CUDA graph, what `call` does now; it waits for nothing.

    Raises RuntimeError where `call` does what a graph cannot hold, such as reading a number back from the GPU.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(warmups):  # lazy set-up and searches for algorithms must not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        held = call()

    def replay(_held: object = held) -> None:  # the outputs live as long as the graph that writes them
        graph.replay()

    return replay


def _choice(name: str, layer: nn.Linear, rows: int, timer: Timer, compressor: Any) -> LayerChoice:
    """Time a layer dense and with each sparse kernel that runs it."""
    shape = (layer.out_features, layer.in_features)
    inputs = torch.randn(rows, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    calls: dict[str, Callable[[], object]] = {"dense": _call(layer.weight, layer.bias, inputs)}
    refused = []
    for kernel in KERNELS:
        try:
            call = _call(compressor(layer.weight.detach(), kernel, rows), layer.bias, inputs)
            call()
        except Exception as error:  # kernels that lack a shape, a type or the GPU say so in many ways
            refused.append(f"{kernel}: {_first_line(error)}")
            continue
        calls[kernel] = call
    if len(calls) == 1:
        return LayerChoice(name, shape, rows, reason="; ".join(refused))
    try:
        times = timer(calls)
    except RuntimeError as error:
        return LayerChoice(name, shape, rows, reason=f"cannot be timed: {_first_line(error)}")
    best = min((k for k in calls if k != "dense"), key=lambda kernel: times.latencies[kernel].median)
    ratio = times.ratio(best)
    wins = ratio.low > 1
    return LayerChoice(
        name,
        shape,
        rows,
        dense_ms=times.latencies["dense"].median * 1e3 / REPEATS,
        sparse_ms=times.latencies[best].median * 1e3 / REPEATS,
        speedup=(ratio.median, ratio.low, ratio.high),
        kernel=best if wins else None,
        reason=None if wins else f"{best} is not faster",
    )


def _call(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return [nn.functional.linear(inputs, weight, bias) for _ in range(REPEATS)]

    return call


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
