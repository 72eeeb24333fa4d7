"""Timing things side by side, in turns within one run, so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: An interval may miss the true median once in so many experiments: 95 % confidence.
ONE_MISS_IN = 20
#: Fewer rounds than this allow no 95 % interval of a median: 2 * 0.5**5 is above 1/20, 2 * 0.5**6 below.
LEAST_REPEATS = 6


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with a confidence interval that holds with at least 95 % confidence."""

    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Latency:
    """What one runner took. Times are seconds for one call, one sample a round, in the order of the rounds."""

    samples: tuple[float, ...]
    calls_per_sample: int

    @property
    def median(self) -> float:
        """The median sample, in seconds."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile, in seconds; the interquartile range is their difference."""
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    def to_json(self) -> dict[str, Any]:
        """Return median, quartiles, interquartile range and samples (seconds) as plain JSON values."""
        lower, upper = self.quartiles
        return {
            "median_s": self.median,
            "quartiles_s": [lower, upper],
            "iqr_s": upper - lower,
            "samples_s": list(self.samples),
            "calls_per_sample": self.calls_per_sample,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runners timed side by side."""

    reference: str
    latencies: Mapping[str, Latency]
    warmup: int

    def ratio(self, name: str) -> Interval:
        """Return how many times faster than the reference `name` is: the median over the rounds, with its interval.

        Each round gives one ratio, the reference's time over the other's in that very round.
        """
        reference, other = self.latencies[self.reference].samples, self.latencies[name].samples
        return median_interval([before / after for before, after in zip(reference, other, strict=True)])

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values, the ratio of each runner included."""
        return {
            "reference": self.reference,
            "repeats": len(self.latencies[self.reference].samples),
            "warmup": self.warmup,
            "confidence": 1 - 1 / ONE_MISS_IN,
            "interval": "order statistics of the per-round ratios",
            "runners": {
                name: {**latency.to_json(), "ratio": self.ratio(name).to_json()}
                for name, latency in self.latencies.items()
            },
        }


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median and its order-statistic confidence interval.

    The interval runs from the k-th smallest to the k-th largest value, k as large as 95 % confidence allows when the
    number of values below the median is binomial(n, 1/2). No distribution is assumed, nothing is drawn at random; the
    values are taken as independent. Raises ValueError below LEAST_REPEATS values.

    >>> median_interval([3, 1, 2, 6, 5, 4, 8, 7, 9])
    Interval(median=5, low=2, high=8)
    """
    count = len(values)
    if count < LEAST_REPEATS:
        raise ValueError(f"{count} values allow no 95 % interval of a median; take {LEAST_REPEATS} or more")
    ordered = sorted(values)
    tail = skipped = 0
    # `skipped` values may be left out at each end while the chance that the median lies among them stays below 2.5 %.
    while (tail := tail + math.comb(count, skipped)) * 2 * ONE_MISS_IN <= 2**count:
        skipped += 1
    return Interval(statistics.median(ordered), ordered[skipped - 1], ordered[count - skipped])


def compare(
    runners: Mapping[str, Callable[[], object]],
    *,
    reference: str,
    repeats: int = 30,
    warmup: int = 5,
    min_time: float = 0.005,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time the runners against each other, round by round, in an order that moves on by one every round.

    In each of `repeats` rounds every runner gives one sample: the mean of as many calls as last about `min_time`
    seconds, a number settled in the `warmup` rounds before. No garbage is collected meanwhile. `clock` returns seconds.
    A runner returns when its work is done, on a GPU too (`Runner.bind`), or `clock` waits for the GPU before it tells
    (`fxprune.backends.sparse.EventClock`).

    Raises ValueError where `reference` is not among the runners, `repeats` or `warmup` are too few, or a sample took no
    time.

    >>> ticks = iter(range(1000))
    >>> timed = compare({"a": lambda: 0, "b": lambda: next(ticks)}, reference="a", clock=lambda: float(next(ticks)))
    >>> timed.ratio("b")
    Interval(median=0.5, low=0.5, high=0.5)
    """
    if reference not in runners:
        raise ValueError(f"the reference '{reference}' is not among the runners: {', '.join(runners)}")
    if repeats < LEAST_REPEATS:
        raise ValueError(f"repeats={repeats} allows no 95 % interval; take {LEAST_REPEATS} or more")
    if warmup < 1:
        raise ValueError(f"warmup={warmup}: at least one round is needed to see how long a call takes")
    names = list(runners)
    quickest = dict.fromkeys(names, math.inf)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for turn in range(warmup):
            for name in _rotated(names, turn):
                quickest[name] = min(quickest[name], _sample(runners[name], 1, clock))
        calls = {name: _calls(quickest[name], min_time) for name in names}
        for turn in range(repeats):
            for name in _rotated(names, turn):
                samples[name].append(_sample(runners[name], calls[name], clock))
    still = [name for name in names if min(samples[name]) <= 0]
    if still:
        raise ValueError(
            f"the clock stood still while {', '.join(still)} ran; pass a larger min_time than {min_time} s"
        )
    latencies = {name: Latency(tuple(samples[name]), calls[name]) for name in names}
    return Comparison(reference, latencies, warmup)


def _rotated(names: list[str], turn: int) -> list[str]:
    """Return the names with `turn` of them moved from the front to the end."""
    start = turn % len(names)
    return names[start:] + names[:start]


def _calls(seconds: float, min_time: float) -> int:
    """Return how many calls of `seconds` each last `min_time`; a call below the clock's resolution counts as 1 ns."""
    return max(1, math.ceil(min_time / max(seconds, 1e-9)))


def _sample(runner: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Return the seconds for one call, as the mean of `calls`."""
    start = clock()
    for _ in range(calls):
        runner()
    return (clock() - start) / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not again before the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
