"""Allocation "chain": the exact solution against brute force, on numbers and on models, and what stands in for it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from bench import allocation_time
from fxprune import passes
from fxprune.analyse import Analysis, analyse
from fxprune.capture import capture
from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import Group, find_groups
from fxprune.passes.allocate import chain as module
from fxprune.passes.allocate.chain import chain, order, refine, solve
from fxprune.passes.allocate.knapsack import knapsack, losses
from fxprune.passes.allocate.ladder import widths
from fxprune.passes.allocate.problem import Problem, Scope, relax, repair
from fxprune.passes.latency import LatencyCosts, split
from fxprune.passes.registries import Budget

passes.load()
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")

#: Which items share a table: a chain, a residual stream with blocks of two, two stages of such, a ladder, all with all.
SHAPES: dict[str, list[Scope]] = {
    "single": [(0,)],
    "apart": [(0,), (1,), (2,)],
    "chain": [(0,), (0, 1), (1, 2), (2, 3), (3, 4), (4,)],
    "stage": [(0, 1), (1, 2), (0, 2), (0, 3), (3, 4), (0, 4)],
    "stages": [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (0,)],
    "ladder": [(0, 1), (2, 3), (0, 2), (1, 3), (2, 4), (3, 5), (4, 5)],
    "three": [(0, 1, 2), (2, 3), (1, 3, 4)],
    "clique": list(itertools.combinations(range(5), 2)),
}


def problem(shape: str, seed: int, share: float, options: int = 4, whole: bool = False) -> Problem:
    """Random losses that fall and costs that grow with the width, and a budget between the cheapest and the dearest."""
    generator = np.random.default_rng(seed)
    count = 1 + max(i for scope in SHAPES[shape] for i in scope)
    sizes = [int(generator.integers(2, options + 1)) for _ in range(count)]
    lost = [np.sort(generator.random(n))[::-1].copy() for n in sizes]
    tables = {}
    for scope in SHAPES[shape]:
        table: Any = generator.integers(1, 6)
        for i in scope:
            table = np.multiply.outer(table, np.cumsum(generator.integers(1, 4, sizes[i])))
        tables[scope] = table.astype(float) * (1.0 if whole else generator.uniform(0.3, 3.0))
    low, high = (sum(table.flat[end] for table in tables.values()) for end in (0, -1))
    budget = float(low + share * (high - low))
    return Problem(lost, tables, np.floor(budget) if whole else budget)


def brute(p: Problem, budget: float | None = None) -> float:
    """The least loss within a budget, by trying all choices."""
    limit = p.budget if budget is None else budget
    choices = itertools.product(*(range(len(loss)) for loss in p.losses))
    return min((p.loss(c) for c in choices if p.cost(c) <= limit), default=np.inf)


seeds, shares = st.integers(0, 2**32 - 1), st.floats(0.0, 1.0)


@given(st.sampled_from(sorted(SHAPES)), seeds, shares)
def test_whole_costs_are_solved_exactly(shape: str, seed: int, share: float) -> None:
    p = problem(shape, seed, share, whole=True)
    found = solve(p)
    assert found is not None
    choice, bound = found
    assert p.cost(choice) <= p.budget
    assert p.loss(choice) == pytest.approx(brute(p)) == bound


@given(st.sampled_from(sorted(SHAPES)), seeds, shares, st.sampled_from([20, 100, 2000]))
def test_other_costs_are_solved_within_rounding(shape: str, seed: int, share: float, buckets: int) -> None:
    """Never above the budget; no worse than the best within a budget that is smaller by one part for each item."""
    p = problem(shape, seed, share)
    found = solve(p, buckets)
    assert found is not None
    choice, bound = found
    assert p.cost(choice) <= p.budget
    best = brute(p)
    assert bound <= best * (1 + 1e-12) and best <= p.loss(choice) * (1 + 1e-12)
    floor = sum(float(table.min()) for table in p.tables.values())
    part = (p.budget - floor) / buckets
    assert p.loss(choice) <= brute(p, p.budget - len(p.losses) * part) * (1 + 1e-9)


def test_what_cannot_be_has_no_solution() -> None:
    p = problem("stage", 0, 0.0)
    assert solve(Problem(p.losses, p.tables, p.budget * 0.99)) is None


def test_a_frontier_is_small_where_it_can_be() -> None:
    """One item of a chain, two of residual stages and of ladders, whatever the items' numbers."""
    generator = np.random.default_rng(0)
    stages: list[Scope] = []
    stream, count = 0, 1
    for _ in range(4):
        first = stream
        stream, count = count, count + 1
        stages.append((first, stream))
        for block in range(3):
            a, b, count = count, count + 1, count + 2
            stages += [(stream if block else first, a), (a, b), (b, stream)]
    long = 20
    for scopes, most in (
        ([(i, i + 1) for i in range(long)], 1),
        (stages, 2),
        ([(i, i + 2) for i in range(long)] + [(i, i + 1) for i in range(0, long, 2)], 2),
        ([(0, i) for i in range(1, long)], 1),
    ):
        numbers = generator.permutation(1 + max(max(s) for s in scopes))
        named = [tuple(sorted(int(numbers[i]) for i in s)) for s in scopes]
        steps = order([8] * len(numbers), named)
        assert steps is not None and order([8] * len(numbers), named, 100.0) is None
        assert sorted(s.item for s in steps) == list(range(len(numbers)))
        assert max(len(s.before) for s in steps) <= most
        assert sorted(scope for s in steps for scope in s.scopes) == sorted(named)


@given(st.sampled_from(sorted(SHAPES)), seeds, shares)
def test_relaxing_stays_within_the_budget_and_gains(shape: str, seed: int, share: float) -> None:
    """No single change improves the result; the best is near."""
    p = problem(shape, seed, share)
    start = [0] * len(p.losses)
    choice = relax(p, start)
    assert p.fits(choice)
    assert brute(p) <= p.loss(choice) * (1 + 1e-12)
    assert p.loss(choice) <= p.loss(repair(p, start)) + 0.5
    for i, loss in enumerate(p.losses):
        for option in range(len(loss)):
            other = [*choice[:i], option, *choice[i + 1 :]]
            assert not p.fits(other) or p.loss(other) >= p.loss(choice) * (1 - 1e-9)


def test_relaxing_is_near_the_best() -> None:
    """On average over many problems, the part of what can be gained that is left."""
    left = []
    for seed in range(60):
        p = problem(sorted(SHAPES)[seed % len(SHAPES)], seed, 0.2 + 0.6 * (seed % 7) / 7, options=5)
        start = [0] * len(p.losses)
        best = brute(p)
        left.append((p.loss(relax(p, start)) - best) / max(p.loss(start) - best, 1e-12))
    assert np.mean(left) < 0.02


@given(st.sampled_from(["chain", "stage", "stages"]), seeds, st.floats(0.1, 0.9))
def test_many_options_are_refined(shape: str, seed: int, share: float) -> None:
    """Where the work for all options is not granted, the result is near the exact one and the budget holds."""
    p = problem(shape, seed, share, options=16)
    start = [0] * len(p.losses)
    found = solve(p)
    assert found is not None
    whole = refine(p, start)
    assert p.loss(whole) == pytest.approx(p.loss(found[0]))
    few = refine(p, start, work=5 * module._LEAST_OPTIONS**3 * 2000.0)
    assert p.fits(few)
    assert p.loss(few) - p.loss(whole) <= 0.35 * (p.loss(start) - p.loss(whole)) + 1e-9


# ---------------------------------------------------------------------- models
class Stage(nn.Module):
    """A stem, a residual stage of two blocks, and a downsampling layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a2(torch.relu(self.a1(x))))
        x = torch.relu(x + self.b2(torch.relu(self.b1(x))))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))  # type: ignore[no-any-return]


def row() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise([3, 6, 8, 5, 4]):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 3))


class Dense(nn.Module):
    """Every layer reads all that came before it."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(depth))
        self.head = nn.Conv2d(3 + 4 * depth, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(x)  # type: ignore[no-any-return]


MODELS = {"row": row, "stage": Stage, "dense": Dense}


def analysed(name: str) -> tuple[Analysis, list[Group]]:
    torch.manual_seed(0)
    analysis = analyse(capture(MODELS[name]().eval(), (torch.randn(2, 3, 6, 6),), {}))
    return analysis, find_groups(analysis)


def clocked(analysis: Analysis, groups: list[Group]) -> LatencyCosts:
    """Costs of a made-up clock: a fixed time and one that grows with each width in steps."""
    costs = Costs(analysis)
    parts = split(analysis, groups)
    for i, part in enumerate(parts):
        work = 1e-8 * float(costs._total(part.macs, {}))
        part.dense = 1e-4 + work
        for axis in part.axes:
            few = sorted({max(round(share * axis.size), 1) for share in (0.1, 0.4)})
            part.curves[axis] = [(n, 1e-4 + work * (n / axis.size) ** (0.5 + 0.1 * i)) for n in few]
    return LatencyCosts(analysis, parts, 1e-2)


@pytest.mark.parametrize("kind", ["macs", "params", "latency"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_no_widths_lose_less(model: str, kind: str, share: float) -> None:
    """Of all widths of a small model none within the budget lose less, and the knapsack's never do."""
    analysis, groups = analysed(model)
    costs = clocked(analysis, groups)
    if kind == "latency":
        share = 1 - 0.5 * (1 - share)  # the fixed times stay
    step = {g.name: 2 if g.size > 5 else 1 for g in groups}
    budget = Budget(kind, share, step, dict.fromkeys(step, 1))
    for seed in range(4):
        generator = np.random.default_rng(seed)
        scores = {g.name: generator.exponential(generator.uniform(0.2, 2), g.size) for g in groups}
        options = {g.name: widths([g], budget) for g in groups}
        lost = {
            g.name: dict(zip(options[g.name], losses(g, scores[g.name], options[g.name]), strict=True)) for g in groups
        }
        allowed = share * costs.of(kind, {})

        def total(counts: dict[str, int], lost: Any = lost) -> float:
            return float(sum(lost[name][n] for name, n in counts.items()))

        def cost(counts: dict[str, int]) -> float:
            return float(costs.of(kind, {g.axis: counts[g.name] for g in groups}))

        found = chain(groups, scores, costs, budget)
        assert cost(found) <= allowed
        assert total(found) <= total(knapsack(groups, scores, costs, budget)) + 1e-12
        if len(groups) <= 5:
            every = (dict(zip(options, c, strict=True)) for c in itertools.product(*options.values()))
            best = min(total(c) for c in every if cost(c) <= allowed)
            assert total(found) == pytest.approx(best, rel=1e-3 if kind == "latency" else 1e-9)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["macs", "params", "latency"])
def test_terms_add_up_to_the_cost(model: str, kind: str) -> None:
    """For numbers and, all combinations of two widths at once, for arrays."""
    analysis, groups = analysed(model)
    costs = clocked(analysis, groups)
    generator = np.random.default_rng(0)
    terms = costs.terms(kind)
    assert terms is not None
    for _ in range(20):
        counts = {g.axis: int(generator.integers(1, g.size + 1)) for g in groups}
        assert sum(t.cost(counts) for t in terms) == pytest.approx(costs.of(kind, counts))
    for term in terms:
        axes = sorted(term.axes, key=repr)[:2]
        if len(axes) < 2:
            continue
        columns = [np.arange(1, a.size + 1, dtype=float) for a in axes]
        table = term.cost({axes[0]: columns[0][:, None], axes[1]: columns[1][None]})
        for i, j in np.ndindex(table.shape):
            assert table[i, j] == pytest.approx(term.cost({axes[0]: i + 1, axes[1]: j + 1}))


def test_memory_is_no_sum_and_left_to_the_knapsack() -> None:
    analysis, groups = analysed("stage")
    costs = Costs(analysis)
    assert costs.terms("memory") is None
    budget = Budget("memory", 0.7, dict.fromkeys([g.name for g in groups], 1), {g.name: 1 for g in groups})
    scores = {g.name: np.arange(g.size) + 1.0 for g in groups}
    assert chain(groups, scores, costs, budget) == knapsack(groups, scores, costs, budget)


def test_too_many_groups_at_once_are_relaxed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense concatenations: no exact solution is tried, and the result is no worse than the knapsack's."""
    analysis, groups = analysed("dense")
    costs = Costs(analysis)
    budget = Budget("macs", 0.5, dict.fromkeys([g.name for g in groups], 1), {g.name: 1 for g in groups})
    generator = np.random.default_rng(0)
    scores = {g.name: generator.random(g.size) for g in groups}
    exact = chain(groups, scores, costs, budget)
    monkeypatch.setattr(module, "solve", None)
    relaxed = chain(groups, scores, costs, budget, work=1.0)

    def total(counts: dict[str, int]) -> float:
        return sum(float(losses(g, scores[g.name], [counts[g.name]])[0]) for g in groups)

    assert costs.macs({g.axis: relaxed[g.name] for g in groups}) <= 0.5 * costs.macs({})
    assert total(exact) <= total(relaxed) <= total(knapsack(groups, scores, costs, budget))


def test_a_target_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(TargetError, match="with every group at its floor"):
        fxprune.dry_run(row(), torch.randn(2, 3, 6, 6), target={"macs": 0.01}, floor=0.5, allocation="chain")


def test_nothing_to_choose() -> None:
    analysis, groups = analysed("row")
    plan = fxprune.dry_run(row(), torch.randn(2, 3, 6, 6), target={"macs": 1.0}, allocation="chain")
    assert all(g.kept == g.size for g in plan.groups)
    assert chain([], {}, Costs(analysis), Budget("macs", 1.0, {}, {})) == {} and groups


def test_the_measurement_of_time_works() -> None:
    """On small problems; the figures themselves belong to no test."""
    rows = list(allocation_time.measure(1, small=True))
    assert [r["problem"] for r in rows] == ["knapsack", "row of layers", "residual stages"]
    assert all(r["seconds"] > 0 and r["used"] <= 1 for r in rows)
    assert allocation_time.table(rows).row_count == 3
