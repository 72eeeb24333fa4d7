"""The statistics of side-by-side timing, on clocks that are made up: nothing here measures real time."""

from __future__ import annotations

import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.backends.timing import LEAST_REPEATS, Comparison, Latency, compare, median_interval

positive = st.floats(1e-6, 1e3)


class FakeTime:
    """A clock that moves only when a runner runs, by what that runner costs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, cost: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += cost()

        return run


def timed(costs: dict[str, float], **options: object) -> tuple[Comparison, list[str]]:
    clock = FakeTime()
    runners = {name: clock.runner(name, lambda cost=cost: cost) for name, cost in costs.items()}
    return compare(runners, reference=next(iter(costs)), clock=clock, **options), clock.calls


@given(st.lists(positive, min_size=LEAST_REPEATS, max_size=60))
def test_interval_holds_the_median_and_is_made_of_samples(values: list[float]) -> None:
    interval = median_interval(values)
    assert interval.low <= interval.median <= interval.high
    assert interval.median == statistics.median(values)
    assert {interval.low, interval.high} <= set(values)


@given(st.integers(LEAST_REPEATS, 2000))
def test_interval_covers_at_least_95_percent_and_one_rank_less_would_not(count: int) -> None:
    interval = median_interval(range(count))
    skipped = int(interval.low)
    assert interval.high == count - 1 - skipped  # symmetric

    def missed(left_out: int) -> float:
        return 2 * sum(math.comb(count, i) for i in range(left_out)) / 2**count

    # Leaving out k values at each end misses the median when fewer than k of the n values lie on one side of it.
    assert missed(skipped + 1) <= 0.05 < missed(skipped + 2)


@given(st.lists(positive, min_size=LEAST_REPEATS, max_size=40), st.randoms())
def test_interval_does_not_depend_on_the_order(values: list[float], shuffled: object) -> None:
    other = list(values)
    shuffled.shuffle(other)  # type: ignore[attr-defined]
    assert median_interval(other) == median_interval(values)


def test_interval_matches_the_published_table() -> None:
    # Ranks (from 1) of the 95 % sign-test interval: n = 6: 1 and 6; 9: 2 and 8; 20: 6 and 15; 30: 10 and 21.
    for count, low, high in [(6, 1, 6), (9, 2, 8), (20, 6, 15), (30, 10, 21)]:
        interval = median_interval(range(1, count + 1))
        assert (interval.low, interval.high) == (low, high)


@given(positive, positive)
def test_constant_costs_give_their_ratio_without_spread(dense: float, pruned: float) -> None:
    comparison, _ = timed({"dense": dense, "pruned": pruned}, repeats=8, warmup=1, min_time=0.0)
    ratio = comparison.ratio("pruned")
    # The fake clock adds many numbers up: equal but for rounding.
    assert ratio.median == pytest.approx(dense / pruned, rel=1e-3)
    assert comparison.ratio("dense").low == comparison.ratio("dense").high == 1.0
    assert comparison.latencies["pruned"].median == pytest.approx(pruned, rel=1e-3)


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    clock = FakeTime()
    speed = itertools.count(1)
    # Two runners a round; both are slowed alike within a round, tenfold over the run.
    runners = {
        name: clock.runner(name, lambda cost=cost: cost * (1 + (next(speed) // 2) / 5))
        for name, cost in {"dense": 2.0, "pruned": 1.0}.items()
    }
    ratio = compare(runners, reference="dense", repeats=40, warmup=2, clock=clock).ratio("pruned")
    assert ratio.median == pytest.approx(2.0, rel=0.1)
    assert ratio.high - ratio.low < 0.2


def test_runners_take_turns_and_the_first_one_changes() -> None:
    _, calls = timed({"a": 1.0, "b": 1.0, "c": 1.0}, repeats=6, warmup=3, min_time=0.0)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab"] * 3


def test_quick_runners_are_called_often_enough_and_slow_ones_once() -> None:
    comparison, calls = timed({"slow": 1.0, "quick": 0.001}, repeats=6, warmup=1, min_time=0.01)
    assert comparison.latencies["slow"].calls_per_sample == 1
    assert comparison.latencies["quick"].calls_per_sample in (10, 11)
    assert calls.count("slow") == 7
    assert comparison.latencies["quick"].median == pytest.approx(0.001)


def test_to_json_survives_json() -> None:
    comparison, _ = timed({"dense": 0.5, "pruned": 0.25}, repeats=6, min_time=0.0)
    told = json.loads(json.dumps(comparison.to_json()))
    assert told == comparison.to_json()
    assert told["runners"]["pruned"]["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert told["runners"]["dense"]["median_s"] == 0.5
    assert told["confidence"] == 0.95


def test_quartiles() -> None:
    told = Latency((1.0, 2.0, 3.0, 4.0, 5.0), 1).to_json()
    assert (told["median_s"], told["quartiles_s"], told["iqr_s"]) == (3.0, [2.0, 4.0], 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "none"}, "the reference 'none' is not among the runners: a"),
        ({"repeats": 5}, "repeats=5 allows no 95 % interval; take 6 or more"),
        ({"warmup": 0}, "warmup=0: at least one round"),
        ({"min_time": 0.0, "clock": lambda: 0.0}, "the clock stood still while a ran"),
    ],
)
def test_what_cannot_be_timed_is_said(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare({"a": lambda: None}, **{"reference": "a", "repeats": 6, "warmup": 1, **options})  # type: ignore[arg-type]


def test_too_few_values() -> None:
    with pytest.raises(ValueError, match="5 values allow no 95 % interval of a median; take 6 or more"):
        median_interval([1.0] * 5)


def test_garbage_collection_is_back_on_after_a_runner_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        compare({"a": lambda: 1 / 0}, reference="a")
    assert gc.isenabled()
