"""Allocation: the knapsack against brute force, every allocator against the target, targets on the clock."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune import passes
from fxprune.analyse import analyse
from fxprune.axes import Axis
from fxprune.backends import BACKENDS
from fxprune.capture import capture
from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import find_groups
from fxprune.passes import ALLOCATORS
from fxprune.passes.allocate.amc import Walk
from fxprune.passes.allocate.knapsack import cheapest
from fxprune.passes.allocate.ladder import widths
from fxprune.passes.latency import Part, split, tables
from fxprune.passes.registries import Budget

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
passes.load()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0.1, 1.0))
def test_the_knapsack_is_exact(seed: int, items: int, share: float) -> None:
    """Equal to trying all choices, where costs are whole numbers of parts of the budget; never above the budget."""
    generator = np.random.default_rng(seed)
    losses = [generator.random(4) for _ in range(items)]
    costs = [generator.integers(0, 9, 4).astype(float) for _ in range(items)]
    floor = sum(c.min() for c in costs)
    budget = float(floor + np.floor(share * (sum(c.max() for c in costs) - floor)))
    room = int(budget - floor)
    found = cheapest(losses, costs, budget, buckets=max(room, 1))
    best = min(
        sum(loss[i] for loss, i in zip(losses, choice, strict=True))
        for choice in itertools.product(range(4), repeat=items)
        if sum(cost[i] for cost, i in zip(costs, choice, strict=True)) <= budget
    )
    assert found is not None
    assert sum(cost[i] for cost, i in zip(costs, found, strict=True)) <= budget
    assert sum(loss[i] for loss, i in zip(losses, found, strict=True)) == pytest.approx(best)


def test_a_knapsack_that_nothing_fits_into() -> None:
    assert cheapest([np.array([0.0, 1.0])], [np.array([5.0, 4.0])], 3.0) is None


class Net(nn.Module):
    """Two residual branches of different use: the second hardly does anything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.a, self.b = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))
        with torch.no_grad():
            self.b[2].weight *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.a(x)
        return self.head(x + self.b(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(64, 8, generator=torch.Generator().manual_seed(s)) for s in range(2, 5)]


#: Options of allocators that try many models.
QUICK: dict[str, dict[str, Any]] = {"spdy": {"trials": 6}, "amc": {"episodes": 12, "warmup": 6}}


def loss(model: nn.Module, pruned: nn.Module) -> float:
    with torch.no_grad():
        y, z = model(X), pruned(X)
    return float((y - z).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("kind", ["macs", "params", "memory"])
@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"width"}))
def test_every_allocator_meets_the_target(net: nn.Module, name: str, kind: str) -> None:
    """Within the budget, and not far below it, whatever the cost."""
    share = 0.7 if kind == "memory" else 0.5
    setting = {"name": name, **QUICK.get(name, {})}
    plan = fxprune.dry_run(net, X, target={kind: share}, round_to=1, calibration=DATA, allocation=setting)
    analysis = analyse(capture(net, (X,), {}))
    counts = {axis: len(ix) for axis, ix in plan.selection(analysis).items()}
    costs = Costs(analysis)
    used = costs.of(kind, counts) / costs.of(kind, {})
    assert share - 0.08 < used <= share + 1e-9
    assert (
        plan.kept
        == fxprune.dry_run(net, X, target={kind: share}, round_to=1, calibration=DATA, allocation=setting).kept
    ), "the same seed gives the same plan"


@pytest.mark.parametrize(
    "name", ["amc", "chain", "equal_loss", "evolution", "global", "knapsack", "netadapt", "sensitivity", "spdy"]
)
def test_searches_beat_uniform(net: nn.Module, name: str) -> None:
    """They find out that one branch hardly matters."""
    settings_: dict[str, Any] = {"target": {"macs": 0.6}, "round_to": 1, "calibration": DATA, "floor": 0.1}
    alike = loss(net, fxprune.compile(net, X, allocation="uniform", **settings_).module)
    setting = {"name": name, "episodes": 40, "warmup": 20} if name == "amc" else name
    assert loss(net, fxprune.compile(net, X, allocation=setting, **settings_).module) < alike


def amc_problem(net: nn.Module, share: float, error: Any) -> tuple[Any, ...]:
    analysis = analyse(capture(net, (X,), {}))
    groups = find_groups(analysis)
    names = [g.name for g in groups]
    budget = Budget("macs", share, dict.fromkeys(names, 4), dict.fromkeys(names, 1), error=error)
    return groups, {g.name: np.arange(g.size) + 1.0 for g in groups}, Costs(analysis), budget


def test_the_agent_learns_what_is_rewarded(net: nn.Module) -> None:
    """Its later models are better than its first ones, which are drawn at random; no other random state is touched."""
    tried: list[float] = []

    def error(counts: Mapping[str, int]) -> float:
        first, *rest = counts.values()
        tried.append((1 - first / 32) ** 2 + 0.1 * sum((1 - n / 64) ** 2 for n in rest))
        return tried[-1]

    before = torch.get_rng_state()
    groups, scores, costs, budget = amc_problem(net, 0.5, error)
    options = {"episodes": 150, "warmup": 30, "decay": 0.95}
    found = ALLOCATORS["amc"](groups, scores, costs, budget, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert costs.macs({g.axis: found[g.name] for g in groups}) <= 0.5 * costs.macs({})
    assert min(tried) == pytest.approx(error(found))
    assert np.mean(tried[-10:]) < np.mean(tried[:10])
    assert ALLOCATORS["amc"](groups, scores, costs, budget, **options) == found


def test_no_action_puts_the_budget_out_of_reach(net: nn.Module) -> None:
    """The widest that a group may be leaves room for the floors of all others, one step more does not."""
    groups, _, costs, budget = amc_problem(net, 0.3, None)
    options = {g.name: widths([g], budget) for g in groups}
    allowed = 0.3 * costs.macs({})
    walk = Walk(groups, costs, "macs", options, float(costs.macs({})), allowed)
    kept = walk.begin()
    for number, group in enumerate(groups):
        place = walk.widest(number, kept)
        wider = options[group.name][place + 1 : place + 2]
        assert all(costs.macs({**kept, group.axis: n}) > allowed for n in wider)
        kept[group.axis] = options[group.name][place]
        assert costs.macs(kept) <= allowed


def test_more_budget_loses_less(net: nn.Module) -> None:
    shares = (0.3, 0.5, 0.7, 0.9)
    found = [
        loss(net, fxprune.compile(net, X, target={"macs": s}, round_to=1, calibration=DATA).module) for s in shares
    ]
    assert found == sorted(found, reverse=True)


# ---------------------------------------------------------------------- memory and the clock
def test_memory_is_weights_and_the_largest_activations() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    costs = Costs(analyse(capture(model, (torch.randn(2, 8),), {})))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert costs.memory({}) == weights + 4 * 2 * (64 + 64)  # the hidden values before and after the ReLU


def test_parts_cover_the_graph(net: nn.Module) -> None:
    analysis = analyse(capture(net, (X,), {}))
    parts = split(analysis, find_groups(analysis))
    nodes = [n for p in parts for n in p.nodes]
    assert nodes == [n for n in analysis.captured.graph.nodes if n.op == "call_function"]
    assert all(len(p.macs) == 1 for p in parts) and len(parts) == 6


def test_a_part_is_monotone() -> None:
    axis, other = Axis(8), Axis(4)
    part = Part([], [], frozenset({axis, other}), 9.0, {axis: [(1, 3.0), (2, 5.0), (4, 4.0)], other: [(2, 6.0)]})
    between = (5 / 25 + 4 / 16) / (1 / 25 + 1 / 16)  # the mean of the two that are out of order, in relative terms
    expected = [3, between, between, (between + 9) / 2, 9]
    assert [part.seconds({axis: n}) for n in (1, 2, 4, 6, 8)] == pytest.approx(expected)
    assert part.seconds({axis: np.array([1, 8])}) == pytest.approx([3.0, 9.0])
    assert part.seconds({axis: 1, other: 2}) == pytest.approx(3 * 6 / 9)
    assert part.seconds({}) == 9
    assert 0 < part.seconds({axis: 0.1}) < 3


def test_tables_are_kept_on_disk(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is built, and the times are the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    analysis = analyse(capture(net, (X,), {}))
    groups = find_groups(analysis)

    def measured() -> Any:
        return tables(
            analysis, net, groups, BACKENDS["torch"], lambda g: 8, threads=1, whole=lambda clock: 1.0, grid=(1.0, 0.5)
        )

    first = measured()
    (file,) = (tmp_path / "fxprune" / "latency").iterdir()
    known = json.loads(file.read_text())
    assert len(known) >= 8 and all(seconds > 0 for seconds in known.values())
    monkeypatch.setattr(type(BACKENDS["torch"]), "_build", None)
    second = measured()
    assert [(p.dense, p.curves) for p in first.parts] == [(p.dense, p.curves) for p in second.parts]
    axis = groups[0].axis
    assert first.latency({}) == pytest.approx(1.0)
    half = {axis: axis.size // 2}
    assert first.change("latency", half, {}) == pytest.approx(first.latency(half) - first.latency({}))


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)).eval()


@pytest.mark.parametrize("target", [{"speedup": 1.5}, {"speedup": 2.0}, {"speedup": 3.0}, {"latency_ms": 0.2}])
def test_a_speed_up_is_met_and_reported(target: dict[str, float], counted: Callable[[nn.Module], Any]) -> None:
    """What was requested, predicted and measured is in the report, with three builds at most."""
    pruned = fxprune.compile(wide(), torch.randn(64, 256), target=target, backend="torch", threads=1, round_to=4)
    clocked = pruned.report.clocked
    assert clocked is not None and 1 <= len(clocked.attempts) <= 3
    assert clocked.requested == pytest.approx(target.get("speedup", 2.0), rel=0.01)
    whole, small = (counted(m).seconds for m in (wide(), pruned.module))
    assert clocked.attempts[clocked.taken].measured == pytest.approx(whole / small)
    assert whole / small == pytest.approx(clocked.requested, rel=0.03)
    assert f"speed-up requested {clocked.requested:.2f}, predicted" in str(pruned.report)
    assert json.dumps(pruned.report.to_json())


@pytest.mark.usefixtures("counted")
def test_a_speed_up_that_cannot_be() -> None:
    """The fastest that was found is named."""
    with pytest.raises(TargetError, match=r"cannot be reached: with every group at its floor the model is \d"):
        fxprune.compile(wide(), torch.randn(64, 256), target={"speedup": 500}, backend="torch", threads=1)


def test_a_speed_up_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the real clock, which a busy machine may disturb: the figures are there, whatever they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    pruned = fxprune.compile(model, torch.randn(64, 64), target={"speedup": 1.2}, backend="torch", threads=1)
    clocked = pruned.report.clocked
    assert clocked is not None and all(a.measured > 0 and a.predicted >= 1 for a in clocked.attempts)


def test_a_metric_bounds_what_is_removed(net: nn.Module) -> None:
    """The drop stays within the bound; a looser bound removes more."""
    kept = []
    for drop in (0.02, 0.3):
        pruned = fxprune.compile(
            net, X, target={"max_drop": drop}, round_to=1, calibration=DATA, metric=lambda m: -loss(net, m)
        )
        assert loss(net, pruned.module) <= drop
        kept.append(pruned.report.macs.ratio)
    assert kept[1] < kept[0] < 1
    with pytest.raises(TargetError, match="the metric drops by"):
        fxprune.compile(net, X, target={"max_drop": 0.0}, round_to=1, metric=lambda m: -1e3 * loss(net, m))
