"""Criteria, allocators and costs: each against a naive computation, and what every one of them promises."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import passes
from fxprune.analyse import Analysis, analyse
from fxprune.backends import BACKENDS
from fxprune.capture import capture
from fxprune.costs import Costs
from fxprune.errors import TargetError
from fxprune.groups import Group, find_groups, positions
from fxprune.kept import Kept
from fxprune.passes import ALLOCATORS, CRITERIA
from fxprune.passes.allocate.ladder import widths
from fxprune.passes.allocate.uniform import alike
from fxprune.passes.calibration import calibration
from fxprune.passes.choose import choose, score, step
from fxprune.passes.registries import Budget
from fxprune.passes.statistics import Scores, Statistics
from fxprune.pruned import Pruned
from fxprune.recipe import read_recipe
from fxprune.rewrite import rewrite

passes.load()
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


# ---------------------------------------------------------------------- models
class ConvNet(nn.Module):
    """conv-bn-conv with a residual connection, a depthwise and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.conv2 = nn.Conv2d(24, 16, 1)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(self.depthwise(F.relu(self.norm1(self.conv1(x))))))
        return self.head(self.grouped(x).mean((2, 3)))


class Transformer(nn.Module):
    """Fused queries, keys and values, a gated feed-forward part, layer norms and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.norm = nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 96), nn.Linear(32, 24)
        self.gate, self.up, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class Concat(nn.Module):
    """Two branches into one consumer, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(3, 12, 1), nn.Conv1d(3, 20, 3, padding=1)
        self.out = nn.Conv1d(12 + 20 + 12, 16, 1)
        self.last = nn.Conv1d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.tanh(self.left(x)), self.right(x)
        return self.last(F.relu(self.out(torch.cat([left, right, left], 1))))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (_mlp(), torch.randn(2, 8)),
    "conv": lambda: (ConvNet(), torch.randn(2, 3, 8, 8)),
    "transformer": lambda: (Transformer(), torch.randint(0, 50, (2, 6))),
    "concat": lambda: (Concat(), torch.randn(2, 3, 9)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.eval(), x


def analysed(name: str) -> tuple[Analysis, list[Group], Costs]:
    model, x = build(name)
    analysis = analyse(capture(model, (x,), {}))
    return analysis, find_groups(analysis), Costs(analysis)


def group_of(groups: list[Group], name: str, dim: int) -> Group:
    (found,) = [g for g in groups if (name, dim) in g.members]
    return found


# ---------------------------------------------------------------------- criteria
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "activation": [{}, {"p": 1}],
    "apoz": [{}],
    "bn_scale": [{}, {"normalize": "none"}],
    "fastformers": [{}, {"normalize": "none"}],
    "fisher": [{}, {"rearrange": False}],
    "flap": [{}, {"normalize": "none"}],
    "fpgm": [{}],
    "lamp": [{}],
    "magnitude": [{}, {"p": 1}, {"p": 3}, *[{"normalize": n} for n in ("mean", "max", "size", "none")]],
    "obd": [{}],
    "obs": [{}, {"rounds": 1000}],
    "random": [{}],
    "regression": [{}],
    "snip": [{}],
    "taylor": [{}, {"reduce": "sum"}, {"form": "activation", "normalize": "norm"}, {"form": "bn"}],
    "wanda": [{}],
}
CASES = [(name, options) for name in sorted(OPTIONS) for options in OPTIONS[name]]
#: Half of the norms' scales are as they were made, the same for all units.
EQUAL = {"bn_scale"}


def squared(output: Tensor, labels: Tensor) -> Tensor:
    """A loss with a slope everywhere."""
    return (output.flatten(1).sum(1) - labels).square().mean()


def scored(
    criterion: str, options: dict[str, Any], analysis: Analysis, groups: list[Group], model: str
) -> dict[str, Scores]:
    """Scores by group, on two batches of data."""
    torch.manual_seed(3)
    batches = [(MODELS[model]()[1], torch.randn(2)) for _ in range(2)]
    data = calibration(batches, analysis.captured, squared)
    setting = {"name": criterion, **options}
    return score(CRITERIA[criterion].bound(setting), groups, Statistics(analysis, 1, data))


def test_every_criterion_is_tested() -> None:
    # Doctests that ran in this process before may have registered criteria, which belong to no module.
    ours = {n for n in CRITERIA if CRITERIA[n].score in vars(sys.modules[CRITERIA[n].score.__module__]).values()}
    assert ours == set(OPTIONS)
    assert {n for n in ALLOCATORS if ALLOCATORS[n].__module__.startswith("fxprune.")} == {
        *(*ALLOCATIONS, "width"),  # here
        *(
            "knapsack",
            "spdy",
            "evolution",
            "sensitivity",
            "equal_loss",
            "netadapt",
            "isomorphic",
            "amc",
        ),  # in test_allocate.py
        "chain",  # in test_chain.py
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("criterion", "options"), CASES, ids=str)
def test_scores(criterion: str, options: dict[str, Any], model: str) -> None:
    """One finite float64 for each unit, the same every time, and no two groups' alike by accident."""
    analysis, groups, _ = analysed(model)
    assert groups
    found, again = (scored(criterion, options, analysis, groups, model) for _ in range(2))
    for group in groups:
        scores = found[group.name]
        assert scores.shape == (group.size,) and scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert (scores >= 0).all() and (len(np.unique(scores)) > 1 or criterion in EQUAL)
        assert np.array_equal(scores, again[group.name])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("criterion", "options"), [c for c in CASES if c[0] != "random"], ids=str)
def test_scores_move_with_the_units(criterion: str, options: dict[str, Any], model: str) -> None:
    """Permuting the units of a group, in every tensor that it cuts, permutes the scores alike."""
    analysis, groups, _ = analysed(model)
    for layer in analysis.captured.tensors.values():
        if layer.dim() == 1 and layer.is_floating_point():
            with torch.no_grad():
                layer.copy_(torch.rand(layer.shape) + 0.5)
    group = max(groups, key=lambda g: g.size)
    before = scored(criterion, options, analysis, [group], model)[group.name]
    order = np.random.default_rng(0).permutation(group.size)
    _permute(analysis, group, order)
    after = scored(criterion, options, analysis, [group], model)[group.name]
    np.testing.assert_allclose(after, before[order], rtol=1e-3, atol=1e-4 * np.abs(before).max())
    assert not np.allclose(after, before)


def _permute(analysis: Analysis, group: Group, order: np.ndarray) -> None:
    """Put unit order[i] where unit i was, in every tensor of the group."""
    for name, dim in group.members:
        tensor = analysis.captured.tensors[name]
        source = np.arange(tensor.shape[dim])
        for units in positions(analysis.tensors[name][dim], group.axis):
            for unit in range(group.size):
                source[np.flatnonzero(units == unit)] = np.flatnonzero(units == order[unit])
        with torch.no_grad():
            tensor.copy_(tensor.index_select(dim, torch.from_numpy(source)))


@pytest.mark.parametrize("p", [1, 2, 0.5])
def test_magnitude_of_coupled_convolutions(p: float) -> None:
    """Rows of one convolution, columns of the next and the depthwise filter between count; batch norm does not."""
    analysis, groups, _ = analysed("conv")
    group = group_of(groups, "conv1.weight", 0)
    assert {n for n, _ in group.members} > {"conv1.weight", "norm1.weight", "depthwise.weight", "conv2.weight"}
    t = {n: w.detach().double() for n, w in analysis.captured.tensors.items()}
    expected = [
        sum(
            float((part.abs() ** p).sum())
            for part in (t["conv1.weight"][c], t["depthwise.weight"][c], t["conv2.weight"][:, c])
        )
        ** (1 / p)
        for c in range(24)
    ]
    np.testing.assert_allclose(_magnitude(group, analysis, p=p, normalize="none"), expected, rtol=1e-5)


def test_magnitude_of_a_residual_stream() -> None:
    """All that writes to the stream and all that reads it counts; a grouped reader by its own part of the channels."""
    analysis, groups, _ = analysed("conv")
    matrices = ["stem.weight", "conv1.weight", "conv2.weight", "grouped.weight", "head.weight"]
    stream = [g for g in groups if ("stem.weight", 0) in g.members]
    assert sorted(g.size for g in stream) == [4, 4]  # 4 groups of 4 channels
    for group in stream:
        expected = np.zeros(group.size)
        for name, dim in itertools.product(matrices, (0, 1)):
            weight = analysis.captured.tensors[name].detach().double()
            for found in positions(analysis.tensors[name][dim], group.axis):
                for index, unit in enumerate(found):
                    expected[unit] += float((weight.select(dim, index) ** 2).sum()) if unit >= 0 else 0
        np.testing.assert_allclose(_magnitude(group, analysis, normalize="none"), np.sqrt(expected), rtol=1e-5)


def test_magnitude_of_fused_heads() -> None:
    """A head is its rows of queries, keys and values in the fused projection, and its columns of the output."""
    analysis, groups, _ = analysed("transformer")
    (group,) = [g for g in groups if g.kind == "heads"]
    assert (group.size, group.inner) == (4, 8)
    weights = {n: w.detach().double() for n, w in analysis.captured.tensors.items()}
    qkv, out = weights["qkv.weight"].view(3, 4, 8, 24), weights["out.weight"].view(24, 4, 8)
    expected = [float((qkv[:, h] ** 2).sum() + (out[:, h] ** 2).sum()) ** 0.5 for h in range(4)]
    np.testing.assert_allclose(_magnitude(group, analysis, normalize="none"), expected, rtol=1e-5)


def test_magnitude_of_a_concatenation() -> None:
    """A branch that enters the consumer twice counts with both its columns."""
    analysis, groups, _ = analysed("concat")
    weights = {n: w.detach().double() for n, w in analysis.captured.tensors.items()}
    left, right, out = (weights[f"{n}.weight"] for n in ("left", "right", "out"))
    group = group_of(groups, "left.weight", 0)
    expected = [float(sum((w**2).sum() for w in (left[c], out[:, c], out[:, 32 + c]))) ** 0.5 for c in range(12)]
    np.testing.assert_allclose(_magnitude(group, analysis, normalize="none"), expected, rtol=1e-5)
    group = group_of(groups, "right.weight", 0)
    expected = [float((right[c] ** 2).sum() + (out[:, 12 + c] ** 2).sum()) ** 0.5 for c in range(20)]
    np.testing.assert_allclose(_magnitude(group, analysis, normalize="none"), expected, rtol=1e-5)


def test_vectors_count_where_there_is_nothing_else() -> None:
    """A group that cuts nothing but a scale and a shift is ranked by these."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return (x.mean(-1, keepdim=True) * self.scale).sum(-1)

    model = Scaled()
    analysis = analyse(capture(model, (torch.randn(2, 6),), {}))
    (group,) = find_groups(analysis)
    np.testing.assert_allclose(
        _magnitude(group, analysis, normalize="none"), model.scale.detach().double().numpy(), rtol=1e-6
    )


def _magnitude(group: Group, analysis: Analysis, **options: Any) -> Scores:
    return CRITERIA["magnitude"].score(group, Statistics(analysis), **options)


def test_normalisation() -> None:
    """Scores are divided by their mean, their maximum, the size of a unit, or nothing; an empty group by nothing."""
    analysis, groups, _ = analysed("mlp")
    group = group_of(groups, "0.weight", 0)
    raw = _magnitude(group, analysis, normalize="none")
    np.testing.assert_allclose(_magnitude(group, analysis), raw / raw.mean())
    np.testing.assert_allclose(_magnitude(group, analysis, normalize="max"), raw / raw.max())
    weights = 8 + 1 + 48  # of one unit: a row, a bias, a column
    np.testing.assert_allclose(_magnitude(group, analysis, normalize="size"), raw / weights**0.5)
    np.testing.assert_allclose(
        _magnitude(group, analysis, normalize="size", p=1), _magnitude(group, analysis, normalize="none", p=1) / weights
    )
    with torch.no_grad():
        for tensor in analysis.captured.tensors.values():
            tensor.zero_()
    assert np.array_equal(_magnitude(group, analysis), np.zeros(64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_precisions(dtype: torch.dtype) -> None:
    """Half-precision weights are summed in single precision: 65504 is not the end."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        model[0].weight[3] = 300.0
    analysis = analyse(capture(model, (torch.randn(2, 8, dtype=dtype),), {}))
    scores = _magnitude(find_groups(analysis)[0], analysis, normalize="none")
    assert scores.argmax() == 3
    assert scores[3] == pytest.approx(300 * 8**0.5, rel=1e-2)


def test_random_scores_follow_the_seed() -> None:
    """Another seed is another ranking; groups of one model differ; the same seed gives the same model."""
    analysis, groups, _ = analysed("mlp")
    scores = {
        (g.name, seed): CRITERIA["random"].score(g, Statistics(analysis, seed)) for g in groups for seed in (0, 1)
    }
    assert len({tuple(s[:8]) for s in scores.values()}) == 4
    model, x = build("mlp")
    plans = [
        fxprune.compile(model, x, target={"macs": 0.5}, criterion="random", proof="quick", seed=s).plan.kept
        for s in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_the_best_units_are_kept() -> None:
    """Of each group the highest scores stay, in their order."""
    model, x = build("mlp")
    with torch.no_grad():
        model[0].weight[[5, 17, 40]] *= 100
        model[2].weight[:, [1, 2]] *= 0.01
        model[0].weight[[1, 2]] *= 0.01
    few = fxprune.compile(model, x, target={"macs": 0.02}, round_to=1, floor=0, proof="quick").plan.kept["0.weight"][0]
    assert {5, 17, 40} <= set(few) and len(few) < 8 and few == sorted(few)
    many = fxprune.compile(model, x, target={"macs": 0.8}, round_to=1, proof="quick").plan.kept["0.weight"][0]
    assert not {1, 2} & set(many) and many == sorted(many)


# ---------------------------------------------------------------------- allocation
ALLOCATIONS = ("uniform", "global")
#: Shares that every model can reach at width multiples of 1.
SHARES = (0.35, 0.5, 0.7, 0.9)


def counts_of(kept: Kept, groups: list[Group]) -> dict[str, int]:
    return {g.name: len(kept[g.axis]) if g.axis in kept else g.size for g in groups}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_target_is_met_within_one_unit(model: str, allocation: str, kind: str, multiple: int) -> None:
    """The budget is kept, and the next step of no group fits in what is left of it."""
    analysis, groups, costs = analysed(model)
    dense = costs.of(kind, {})
    for share in SHARES:
        recipe = read_recipe(target={kind: share}, allocation=allocation, floor=0)
        counts = {g.axis: n for g, n in zip(groups, _counts(analysis, groups, recipe, costs, multiple), strict=True)}
        cost = costs.of(kind, counts)
        assert cost <= share * dense
        for members in alike(groups) if allocation == "uniform" else [[g] for g in groups]:
            steps = {g.name: step(g, multiple) for g in members}
            options = widths(members, Budget(kind, share, steps, dict.fromkeys(steps, 1)))
            (count,) = {counts[g.axis] for g in members}
            assert count in options
            for wider in [w for w in options if w > count][:1]:
                more = costs.of(kind, {**counts, **{g.axis: wider for g in members}})
                assert more > share * dense, f"{members[0].name} could keep {wider} units for {more - cost} more"


def _counts(analysis: Analysis, groups: list[Group], recipe: Any, costs: Costs, multiple: int) -> list[int]:
    kept = choose(analysis, groups, recipe, costs, multiple)
    return list(counts_of(kept, groups).values())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_more_budget_costs_more(model: str, allocation: str) -> None:
    """With a larger target the model that comes out is never cheaper."""
    analysis, groups, costs = analysed(model)
    paid = []
    for share in np.linspace(0.3, 1.0, 15):
        recipe = read_recipe(target={"macs": float(share)}, allocation=allocation, floor=0)
        kept = choose(analysis, groups, recipe, costs, 1)
        paid.append(costs.macs({axis: len(kept[axis]) for axis in kept}))
    assert paid == sorted(paid)
    assert paid[-1] == costs.macs({})
    assert len(set(paid)) > 8


@pytest.mark.parametrize("model", MODELS)
def test_uniform_keeps_the_same_share(model: str) -> None:
    """Shares of groups differ by no more than one step of each."""
    analysis, groups, costs = analysed(model)
    counts = counts_of(choose(analysis, groups, read_recipe(target={"macs": 0.5}), costs, 1), groups)
    low = max((counts[g.name] - 2) / g.size for g in groups if counts[g.name] < g.size)
    high = min((counts[g.name] + 2) / g.size for g in groups)
    assert low <= high


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("model", MODELS)
def test_width_keeps_exactly_one_share(model: str, share: float) -> None:
    """Heads stay whole, and so does what the share is no whole number of units of; the next share is too dear."""
    analysis, groups, costs = analysed(model)
    recipe = read_recipe(target={"macs": share}, allocation="width", floor=0)
    counts = counts_of(choose(analysis, groups, recipe, costs, 1), groups)
    kept = {g.axis: counts[g.name] for g in groups}
    assert costs.macs(kept) <= share * costs.macs({})
    shares = {counts[g.name] / g.size for g in groups if counts[g.name] < g.size}
    assert len(shares) == 1 and all(counts[g.name] == g.size for g in groups if g.kind == "heads")
    cut = [g for g in groups if counts[g.name] < g.size]
    steps = int(np.gcd.reduce([g.size for g in cut]))
    wider = {g.axis: counts[g.name] + g.size // steps for g in cut}
    assert costs.macs({**kept, **wider}) > share * costs.macs({})


def test_global_cuts_what_scores_low() -> None:
    """Units of one layer a tenth as large as those of the other go first, and uniform does not care."""
    model, x = build("mlp")
    with torch.no_grad():
        model[0].weight *= 0.1
        model[2].weight *= 0.1
        model[4].weight *= 10
    recipe = {"target": {"params": 0.6}, "criterion": {"name": "magnitude", "normalize": "none"}, "proof": "quick"}
    shares = {}
    for allocation in ALLOCATIONS:
        pruned = fxprune.compile(model, x, recipe, allocation=allocation, round_to=1)
        shares[allocation] = {g.name: g.kept / g.size for g in pruned.plan.groups}
    assert shares["global"]["0.weight.0"] < 0.7 and shares["global"]["2.weight.0"] == 1
    assert shares["uniform"]["0.weight.0"] == pytest.approx(shares["uniform"]["2.weight.0"], abs=0.05)


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_the_floor_holds(floor: float, allocation: str, model: str) -> None:
    """No group keeps a smaller share than the floor, nor less than one unit, at the smallest target there is."""
    analysis, groups, costs = analysed(model)
    options = {"allocation": allocation, "floor": floor}
    least = {
        g.axis: widths([g], Budget("macs", 0.1, {g.name: 1}, {g.name: max(1, int(np.ceil(floor * g.size)))}))[0]
        for g in groups
    }
    share = costs.macs(least) / costs.macs({}) * (1 + 1e-9)
    counts = counts_of(choose(analysis, groups, read_recipe(target={"macs": share}, **options), costs, 1), groups)
    assert all(counts[g.name] >= max(1, floor * g.size) for g in groups)
    assert counts == {g.name: least[g.axis] for g in groups}
    with pytest.raises(TargetError):
        choose(analysis, groups, read_recipe(target={"macs": share * 0.99}, **options), costs, 1)


@pytest.mark.parametrize("multiple", [2, 4, 8, 16])
@pytest.mark.parametrize("model", MODELS)
def test_widths_are_multiples(multiple: int, model: str) -> None:
    """Every width is whole, or a multiple of `round_to`, or of a part of it where the group is too small for more."""
    pruned = _pruned(model, target={"macs": 0.7}, round_to=multiple)
    _, groups, _ = analysed(model)
    left = {g.name: g.kept for g in pruned.plan.groups}
    assert any(left[g.name] < g.size for g in groups)
    for group in groups:
        units = step(group, multiple)
        assert left[group.name] == group.size or left[group.name] % units == 0
        if group.size * group.inner >= 2 * multiple and multiple % group.inner == 0:
            assert left[group.name] == group.size or left[group.name] * group.inner % multiple == 0
    assert pruned.report.round_to == multiple


def test_the_multiple_comes_from_the_backend() -> None:
    """Without `round_to` widths are what the recipe's backend runs fast."""
    for backend in ("torch", "onnxruntime"):
        report = _pruned("mlp", target={"macs": 0.5}, backend=backend).report
        assert report.round_to == BACKENDS[backend].preferred_multiple


def _pruned(name: str, **recipe: Any) -> Pruned:
    model, x = build(name)
    return fxprune.compile(model, x, proof="quick", **recipe)


@pytest.mark.parametrize("kind", ["channels", "heads", "head_dims", "hidden"])
def test_only_groups_of_the_kinds_asked_for(kind: str) -> None:
    """`groups` leaves all others whole."""
    for name in ("conv", "transformer"):
        _, groups, _ = analysed(name)
        if any(g.kind == kind for g in groups):
            pruned = _pruned(name, target={"params": 0.95}, groups=[kind], round_to=1)
            assert {g.kind for g in pruned.plan.groups if g.kept < g.size} == {kind}
    assert {g.kind for name in MODELS for g in analysed(name)[1]} == {"channels", "heads", "head_dims", "hidden"}


@pytest.mark.parametrize("keep", ["0", "0.weight", "?.bias", "*", "2.*"])
def test_what_is_kept_stays_whole(keep: str) -> None:
    """A glob of modules or parameters: no group that cuts one of them is cut."""
    model, x = build("mlp")
    target = {"macs": 1.0} if keep in ("*", "?.bias", "2.*") else {"macs": 0.7}
    plan = fxprune.compile(model, x, target=target, keep=[keep], round_to=1, proof="quick").plan
    if keep in ("0", "0.weight"):
        assert set(plan.kept) == {"2.weight", "2.bias", "4.weight"}
        assert set(plan.kept["2.weight"]) == {0}
    else:
        assert plan.kept == {}


def test_params_target() -> None:
    """A share of the parameters, counted on the module that comes out."""
    for name in MODELS:
        model, x = build(name)
        pruned = fxprune.compile(model, x, target={"params": 0.6}, round_to=1, proof="quick")
        assert count(pruned.module) <= 0.6 * count(model)
        assert count(pruned.module) > 0.5 * count(model)


def test_the_whole_model_fits() -> None:
    """A target of 1 removes nothing, and says so."""
    for allocation in ALLOCATIONS:
        pruned = _pruned("conv", target={"macs": 1.0}, allocation=allocation)
        assert pruned.plan.kept == {}
        assert pruned.report.notes == ["nothing was removed: the target is met by the model as it is"]


def test_steps() -> None:
    """The number of units by which a group shrinks: less where the group is small, and a head counts by its width."""
    axis = analysed("mlp")[1][0].axis
    for size, inner, multiple, expected in [
        (64, 1, 16, 16), (32, 1, 16, 16), (31, 1, 16, 8), (8, 1, 16, 4), (3, 1, 16, 1), (1, 1, 16, 1), (2, 1, 16, 1),
        (12, 64, 16, 1), (12, 8, 16, 2), (12, 24, 16, 2), (12, 5, 8, 4), (64, 1, 1, 1), (10, 1, 3, 3),
    ]:  # fmt: skip
        group = Group("g", type(axis)(size, "g"), "hidden", (), inner)
        assert step(group, multiple) == expected, (size, inner, multiple)


# ---------------------------------------------------------------------- costs
def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, *inputs: Tensor) -> float:
    """Half of torch's FLOPs; counted on the meta device, where attention is not left out."""
    shapes = {n: torch.empty_like(t, device="meta") for n, t in module.state_dict(keep_vars=True).items()}
    transient = {n: torch.empty_like(t, device="meta") for n, t in module.named_buffers()}
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, {**transient, **shapes}, tuple(x.to("meta") for x in inputs))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [1.0, 0.7, 0.4])
def test_costs_are_those_of_the_modules(model: str, share: float) -> None:
    """MACs are torch's own count, parameters those of the module, dense and pruned."""
    net, x = build(model)
    pruned = fxprune.compile(net, x, target={"macs": share}, round_to=1, proof="quick")
    report = pruned.report
    assert report.macs.dense == macs(net, x)
    assert report.macs.pruned == macs(pruned.module, x)
    assert report.params.dense == count(net)
    assert report.params.pruned == count(pruned.module)
    assert report.macs.ratio <= share


@pytest.mark.parametrize("model", MODELS)
def test_costs_of_single_groups(model: str) -> None:
    """One unit less of each group in turn: what the formulas say is what the emitted module costs."""
    net, x = build(model)
    analysis, groups, costs = analysed(model)
    for group in groups:
        if group.size < 2:
            continue
        fewer = {group.axis: group.size - 1}
        module = rewrite(analysis, Kept({group.axis: np.arange(1, group.size)}), net).module
        assert costs.macs(fewer) == macs(module, x)
        assert costs.params(fewer) == count(module)
        for kind in ("macs", "params"):
            change = costs.of(kind, {}) - costs.of(kind, fewer)
            assert costs.per_unit(kind, group.axis) == change
            assert costs.change(kind, {group.axis: group.size}, fewer) == change
    assert sum(costs.by_node({}).values()) == costs.macs({})


def test_changes_add_up() -> None:
    """The change of one group's width, given any others, is the difference of the totals."""
    _, groups, costs = analysed("transformer")
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = {g.axis: int(rng.integers(1, g.size + 1)) for g in groups}
        group = groups[int(rng.integers(len(groups)))]
        count_ = int(rng.integers(1, group.size + 1))
        for kind in ("macs", "params"):
            expected = costs.of(kind, {**counts, group.axis: count_}) - costs.of(kind, counts)
            assert costs.change(kind, {group.axis: count_}, counts) == expected


def test_macs_are_those_of_the_example_batch() -> None:
    """Twice the batch, twice the MACs; parameters do not change."""
    net, _ = build("conv")
    reports = [
        fxprune.compile(net, torch.randn(b, 3, 8, 8), target={"macs": 0.5}, proof="quick").report for b in (1, 2, 6)
    ]
    assert [r.macs.dense / reports[0].macs.dense for r in reports] == [1, 2, 6]
    assert [r.params for r in reports] == [reports[0].params] * 3


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(ids)))

    pruned = fxprune.compile(Tied(), torch.randint(0, 30, (2, 4)), target={"params": 0.5}, round_to=1, proof="quick")
    assert (pruned.report.params.dense, pruned.report.params.pruned) == (480, 240)
    assert count(pruned.module) == 240


# ---------------------------------------------------------------------- statistics
def test_sums_over_dimensions() -> None:
    """Sums of powers by dimension, kernels included; each parameter is read once."""
    analysis, _, _ = analysed("conv")
    statistics = Statistics(analysis)
    weight = analysis.captured.tensors["conv1.weight"].detach().double()
    for dim, p in itertools.product((0, 1), (1, 2, 3)):
        expected = (weight.abs() ** p).transpose(0, dim).flatten(1).sum(1).numpy()
        np.testing.assert_allclose(statistics.weight_sums("conv1.weight", dim, p), expected, rtol=1e-5)
    first = statistics.weight_sums("conv1.weight", 0, 2)
    with torch.no_grad():
        analysis.captured.tensors["conv1.weight"].zero_()
    assert statistics.weight_sums("conv1.weight", 0, 2) is first
