"""Patterns of zeros: masks, the methods that choose them, orders that keep more, and what becomes of a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import steps
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import InputError, RecipeError, SavedModelError, TargetError
from fxprune.groups import find_groups
from fxprune.kept import Kept
from fxprune.passes.patterns import METHODS, Weight, pattern
from fxprune.passes.patterns.pattern import NOfM
from fxprune.passes.patterns.permute import kept_sum, permutation
from fxprune.passes.patterns.support import refit
from fxprune.plan import Plan
from fxprune.prove import prove
from fxprune.rewrite import rewrite
from fxprune.saved import load_pruned

PATTERNS = ("2:4", "1:4", "4:8", "unstructured", "4x1", "1x8", "8x8")


def layer(
    rows: int = 24, columns: int = 32, samples: int = 512, free: int = 1, seed: int = 0, name: str = "2:4"
) -> Weight:
    """A weight with correlated inputs of unequal size, and a constant 1 behind them."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    mixed = torch.eye(columns, dtype=torch.float64) + torch.randn(columns, columns, **options) / columns**0.5
    x = torch.randn(samples, columns, **options) @ mixed * torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)
    x = torch.cat([x + 0.3, torch.ones(samples, free, dtype=torch.float64)], 1)
    return Weight(torch.randn(rows, columns + free, **options), x.T @ x / samples, pattern(name), free)


def fits(mask: Tensor, name: str) -> bool:
    """Whether a mask is of the pattern."""
    shape = pattern(name)
    if isinstance(shape, NOfM):
        return bool((mask.reshape(len(mask), -1, shape.m).sum(2) == shape.n).all())
    rows, columns = (int(n) for n in name.split("x")) if "x" in name else (1, 1)
    blocks = mask.reshape(len(mask) // rows, rows, -1, columns).float().mean((1, 3))
    return bool(((blocks == 0) | (blocks == 1)).all()) and abs(float(mask.float().mean()) - shape.density) < 0.05


# ---------------------------------------------------------------------- patterns
@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_n_of_m_keeps_the_largest_of_every_group(n: int, more: int, rows: int, groups: int, seed: int) -> None:
    m = n + 1 + more
    scores = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    mask = pattern(f"{n}:{m}").mask(scores)
    for row, chosen in zip(scores.reshape(-1, m), mask.reshape(-1, m), strict=True):
        assert int(chosen.sum()) == n
        assert row[chosen].min() >= row[~chosen].max()


@pytest.mark.parametrize("name", PATTERNS)
def test_a_mask_is_of_its_pattern(name: str) -> None:
    assert fits(pattern(name).mask(torch.rand(24, 32)), name)


@pytest.mark.parametrize(
    ("name", "density", "said"),
    [
        ("4:2", None, "keeps 4 of every 2: the smaller number comes first, '2:4'"),
        ("2:2", None, "keeps 2 of every 2"),
        ("0:4", None, "there is no sparsity '0:4'"),
        ("two to four", None, "known: 2:4 or any n:m, 32x32 or any rows x columns, unstructured"),
        ("2:4", 0.25, "density says nothing more"),
        ("8x8", 1.5, "density is the share that stays, between 0 and 1, not 1.5"),
    ],
)
def test_what_is_no_pattern(name: str, density: float | None, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        pattern(name, density)


# ---------------------------------------------------------------------- methods
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("method", METHODS.names())
def test_a_method_gives_weights_of_the_pattern(method: str, name: str) -> None:
    weight = layer(name=name)
    matrix, mask = METHODS[method].choose(weight)
    assert matrix.shape == weight.matrix.shape
    assert mask.shape == (24, 32)
    assert fits(mask, name)
    assert not bool((matrix[:, :32] * ~mask).any())
    assert bool(torch.isfinite(matrix).all())
    again, same = METHODS[method].choose(weight)
    assert torch.equal(matrix, again)
    assert torch.equal(mask, same)
    if not METHODS[method].data:
        blind, alike = METHODS[method].choose(Weight(weight.matrix, None, weight.pattern, weight.free))
        assert torch.equal(blind, matrix)
        assert torch.equal(alike, mask)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("method", METHODS.names())
def test_refitting_is_the_least_squares_solution_on_the_mask(method: str, name: str) -> None:
    weight = layer(name=name)
    matrix, mask = METHODS[method].choose(weight)
    best = refit(weight, mask)
    assert not bool((best[:, :32] * ~mask).any())
    root = torch.linalg.cholesky(weight.known()).T  # |R (w - g)|^2 is the error
    for row in range(0, 24, 5):
        kept = torch.nonzero(torch.cat([mask[row], torch.ones(1, dtype=torch.bool)]))[:, 0]
        expected = torch.linalg.lstsq(root[:, kept], root @ weight.matrix[row]).solution
        assert torch.allclose(best[row, kept], expected, rtol=1e-8, atol=1e-10)
    damped = Weight(weight.matrix, weight.known(), weight.pattern, weight.free)
    assert damped.error(best) <= damped.error(matrix) + 1e-12


def test_methods_with_data_beat_those_without() -> None:
    errors = {}
    for method in METHODS:
        weight = layer(64, 64, 2048)
        errors[method] = weight.error(METHODS[method].choose(weight)[0])
    assert errors["alps"] < errors["admm"] < errors["sparsegpt"] < errors["wanda"]
    assert errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.parametrize("name", ["2:4", "unstructured"])
def test_sparsegpt_is_the_best_that_columns_in_order_can_do(name: str) -> None:
    """Oracle: given all columns before, an entry is zero or what is best together with all columns behind it."""
    weight = layer(4, 12, name=name)
    matrix, mask = METHODS["sparsegpt"].choose(weight)
    moment, goal = weight.known(), weight.matrix
    for row in range(4):
        for j in range(12):
            behind = torch.arange(j, 13)
            fixed = torch.arange(j)
            lost = (goal[row, fixed] - matrix[row, fixed]) @ moment[fixed][:, behind]
            best = goal[row, behind] + torch.linalg.solve(moment[behind][:, behind], lost)
            assert torch.allclose(matrix[row, j], best[0] * mask[row, j], rtol=1e-7, atol=1e-9)


def test_inputs_that_are_never_used_do_no_harm() -> None:
    weight = layer()
    moment = weight.moment
    assert moment is not None
    moment[:, 3] = moment[3] = 0
    for method in METHODS:
        matrix, mask = METHODS[method].choose(weight)
        assert bool(torch.isfinite(matrix).all())
        assert bool(torch.isfinite(refit(weight, mask)).all())


# ---------------------------------------------------------------------- orders
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_an_order_never_keeps_less(counts: tuple[int, int], rows: int, groups: int, seed: int) -> None:
    n, m = counts
    scores = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    found = permutation(scores, n, m, seed, escapes=2)
    assert sorted(found.order) == list(range(groups * m))
    assert found.plain == pytest.approx(kept_sum(scores, n, m))
    assert found.found == pytest.approx(kept_sum(scores[:, torch.from_numpy(found.order)], n, m))
    assert found.plain <= found.found <= found.bound + 1e-6


def test_two_groups_get_the_best_split_of_all() -> None:
    scores = torch.rand(16, 8, generator=torch.Generator().manual_seed(0))
    best = max(kept_sum(scores[:, list(order)], 2, 4) for order in itertools.permutations(range(8)))
    assert permutation(scores, 2, 4).found == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_an_order_closes_a_third_of_the_gap(seed: int) -> None:
    scores = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)).abs()
    assert permutation(scores, 2, 4, escapes=0).efficacy >= 0.35


class Attention(nn.Module):
    """A block with all that an order has to go through: heads, residual streams, norms, concatenation."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(50, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        x = self.norm(x + y)
        z = x + self.down(F.silu(self.gate(x)) * self.up(x))
        result: Tensor = self.head(torch.cat([x, z], -1))
        return result


class Convolutions(nn.Module):
    """A residual block, a grouped convolution, and one whose inputs do not divide by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.a, self.b = nn.Conv2d(32, 24, 3, padding=1), nn.Conv2d(24, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        result: Tensor = self.head(self.depthwise(x).mean((2, 3)))
        return result


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, 50, (rows, 7))


def images(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 6, 6)


MODELS = {"attention": (Attention, tokens), "convolutions": (Convolutions, images)}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, example = MODELS[request.param]
    return make().eval().requires_grad_(False), example


def test_any_order_of_any_group_leaves_the_function_as_it_is(case: tuple[nn.Module, Any]) -> None:
    model, example = case
    model = model.double()
    inputs = example()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    analysis = analyse(capture(model, (inputs,), {}))
    rng = np.random.default_rng(0)
    kept = Kept({g.axis: rng.permutation(g.size) for g in find_groups(analysis)})
    assert len(kept)
    assert not kept.smaller
    rewritten = rewrite(analysis, kept, model)
    assert prove(analysis, kept, rewritten, model).error < 1e-9
    expected, found = model(inputs), rewritten.module(inputs)
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-12


def test_an_order_that_keeps_more_is_found_for_a_whole_model(case: tuple[nn.Module, Any]) -> None:
    """Outputs equal to 1e-9 in float64, and more of the weights kept in every layer together."""
    model, example = case
    model = model.double()
    inputs = example()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    plain, ordered = (
        fxprune.compile(model, inputs, sparsity={"pattern": "2:4", "permute": permute}) for permute in (False, True)
    )
    assert not plain.plan.kept
    assert ordered.plan.kept
    assert any("in the order in which 2:4 keeps the most" in note for note in ordered.report.notes)
    unmasked = fxprune.compile(model, inputs, plan=Plan.from_json(_without_masks(ordered.plan)))
    expected = model(inputs)
    assert float((unmasked.module(inputs) - expected).abs().max() / expected.abs().max()) < 1e-9
    sums = [sum(float(p.module.get_parameter(n).abs().sum()) for n in p.plan.masks) for p in (plain, ordered)]
    assert sums[1] > sums[0]


def _without_masks(plan: Plan) -> str:
    recipe = {k: v for k, v in plan.recipe.items() if k != "sparsity"}
    return Plan(plan.kept, plan.groups, recipe=recipe, dynamic=plan.dynamic, costs=plan.costs).to_json()


# ---------------------------------------------------------------------- whole models
def batches(example: Any, count: int = 6) -> list[Tensor]:
    torch.manual_seed(1)
    return [example(16) for _ in range(count)]


@pytest.mark.parametrize("with_data", [False, True])
def test_two_of_four(case: tuple[nn.Module, Any], with_data: bool) -> None:
    model, example = case
    before = {n: p.clone() for n, p in model.named_parameters()}
    pruned = fxprune.compile(
        model, example(), sparsity="2:4", **({"calibration": batches(example)} if with_data else {})
    )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    (step,) = pruned.report.steps
    assert step.taken
    assert (step.error is not None) == with_data
    for row in pruned.report.sparse:
        weight = pruned.module.get_parameter(row.name)
        assert torch.equal(weight != 0, pruned.plan.masks[row.name])
        groups = weight.flatten(2).movedim(1, 2) if weight.dim() > 2 else weight.unsqueeze(1)
        assert bool(((groups.unflatten(2, (-1, 4)) != 0).sum(3) == 2).all()), row.name
    if isinstance(model, Convolutions):
        assert pruned.report.unfit == {
            "stem.weight": "3 inputs do not divide by 4",
            "depthwise.weight": "a grouped convolution",
        }
        text = str(pruned.report)
        assert "not eligible, a grouped convolution: depthwise.weight" in text
        assert "2:4 in 3 layers, 50.0% of" in text


def test_data_lose_less(case: tuple[nn.Module, Any]) -> None:
    """Oracle: the dense model's own outputs on inputs that were not calibrated on."""
    model, example = case
    data, fresh = batches(example), example(64)
    lost = {}
    for method in ("asp", "wanda", "sparsegpt", "alps"):
        pruned = fxprune.compile(model, example(), sparsity={"method": method}, calibration=data)
        lost[method] = float((pruned.module(fresh) - model(fresh)).square().mean())
    assert max(lost["sparsegpt"], lost["alps"], lost["wanda"]) < lost["asp"]


def test_with_structured_pruning_widths_stay_legal(case: tuple[nn.Module, Any]) -> None:
    model, example = case
    pruned = fxprune.compile(
        model, example(), target={"params": 0.6}, round_to=1, sparsity="2:4", calibration=batches(example)
    )
    assert pruned.report.round_to == 4
    assert pruned.report.params.ratio <= 0.6
    assert pruned.report.proof.error < 1e-9
    assert {r.name for r in pruned.report.sparse} >= {"head.weight"}
    (step,) = pruned.report.steps
    assert step.error is not None
    assert step.error[1] > step.error[0]


def test_a_plan_brings_its_masks(case: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, example = case
    inputs, data = example(), batches(example)
    pruned = fxprune.compile(model, inputs, sparsity="2:4", calibration=data)
    plan = Plan.from_json(pruned.plan.to_json())
    assert plan.masks.keys() == pruned.plan.masks.keys()
    assert all(torch.equal(m, pruned.plan.masks[n]) for n, m in plan.masks.items())
    again = fxprune.compile(model, inputs, plan=plan, calibration=data)
    assert torch.equal(again.module(inputs), pruned.module(inputs))
    folder = pruned.save(tmp_path / "sparse")
    for loaded in (load_pruned(folder), load_pruned(folder, model)):
        assert torch.equal(loaded.module(inputs), pruned.module(inputs))
        assert loaded.plan.masks.keys() == plan.masks.keys()
        assert loaded.report.steps == pruned.report.steps
        assert loaded.report.sparse == pruned.report.sparse
    other = Plan.from_json(pruned.plan.to_json())
    other.masks["head.weight"] = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(SavedModelError, match=r"a mask of the shape \(3, 3\) for 'head.weight', which is \(10, "):
        fxprune.compile(model, inputs, plan=other, calibration=data)
    text = pruned.plan.to_json().replace('"bits": "', '"bits": "c$', 1)
    with pytest.raises(SavedModelError, match="this is not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, 0.9, weight_decay=0.1)])
def test_zeros_stay_zeros_in_training(case: tuple[nn.Module, Any], optimizer: Any, tmp_path: Path) -> None:
    model, example = case
    inputs = example(8)
    pruned = fxprune.compile(model, example(), sparsity="2:4")
    before = {n: pruned.module.get_parameter(n).detach().clone() for n in pruned.plan.masks}
    module = pruned.lock().requires_grad_()
    chosen = optimizer(module.parameters(), 1e-2)
    for _ in range(3):
        chosen.zero_grad()
        module(inputs).square().mean().backward()
        chosen.step()
    expected = module(inputs).detach()
    folder = pruned.save(tmp_path / "locked")  # while it is locked
    assert torch.equal(load_pruned(folder).module(inputs), expected)
    pruned.unlock()
    for name, mask in pruned.plan.masks.items():
        weight = pruned.module.get_parameter(name)
        assert not bool((weight * ~mask).any()), name
        assert not torch.equal(weight, before[name])
    assert torch.equal(pruned.module(inputs), expected)


def test_a_model_without_masks_has_nothing_to_lock() -> None:
    pruned = fxprune.compile(
        nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)), torch.randn(2, 8), target={"params": 0.6}
    )
    with pytest.raises(InputError, match="the plan has no masks to lock"):
        pruned.lock()


def test_kept_layers_stay_whole() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    pruned = fxprune.compile(model, tokens(), sparsity="2:4", keep=["head", "type:LayerNorm"])
    assert pruned.report.unfit["head.weight"] == "the recipe keeps 'head'"
    assert bool(pruned.module.get_parameter("head.weight").all())
    assert "qkv.weight" in pruned.plan.masks


def test_behind_the_removal_of_dead_units() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        model[0].weight[:16] = 0
    pruned = fxprune.compile(model, torch.randn(2, 8), target={"dead": True}, sparsity="2:4")
    assert pruned.module.get_parameter("2.weight").shape == (4, 16)
    assert float((pruned.module.get_parameter("2.weight") != 0).float().mean()) == 0.5


def test_tied_weights_stay_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.inner(self.table(x)), self.table.weight)

    pruned = fxprune.compile(Tied().eval(), torch.randint(0, 20, (2, 5)), sparsity="2:4")
    assert pruned.report.unfit == {"table.weight": "its weight is used more than once"}
    assert list(pruned.plan.masks) == ["inner.weight"]


def test_with_keep_class() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    pruned = fxprune.compile(model, torch.randn(2, 16), target={"params": 0.5}, sparsity="2:4", keep_class=True)
    assert type(pruned.module) is nn.Sequential
    assert float((pruned.module[2].weight != 0).float().mean()) == 0.5
    x = torch.randn(4, 16)
    assert torch.allclose(pruned.module(x), pruned.graph_module()(x), atol=1e-6)


# ---------------------------------------------------------------------- blocks
@pytest.mark.parametrize("with_data", [False, True])
def test_empty_blocks_are_removed(with_data: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention(64).eval()
    with torch.no_grad():  # two heads and half of the MLP do little
        model.qkv.weight.view(3, 4, 16, 64)[:, :2] *= 1e-3
        model.out.weight[:, :32] *= 1e-3
        model.up.weight[:32] *= 1e-3
        model.gate.weight[:32] *= 1e-3
        model.down.weight[:, :32] *= 1e-3
    data = {"calibration": batches(tokens)} if with_data else {}
    recipe = {"sparsity": {"pattern": "16x16", "density": 0.45}, "keep": ["head"]}
    inputs = tokens()
    pruned = fxprune.compile(model, inputs, recipe, **data)
    assert pruned.module.get_parameter("down.weight").shape[1] <= 32
    assert pruned.module.get_parameter("out.weight").shape[1] < 64
    assert pruned.report.params.ratio < 0.85
    assert any("units were empty and are removed" in note for note in pruned.report.notes)
    for name, mask in pruned.plan.masks.items():
        assert torch.equal(pruned.module.get_parameter(name) != 0, mask)
    folder = pruned.save(tmp_path / "blocks")
    for loaded in (load_pruned(folder), load_pruned(folder, model)):
        assert torch.equal(loaded.module(inputs), pruned.module(inputs))


# ---------------------------------------------------------------------- what a step costs and gains
def test_a_step_that_does_not_pay_is_left_out(case: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = case
    inputs = example()
    recipe = {"sparsity": {"when": "faster", "permute": False}, "backend": "torch"}
    monkeypatch.setattr(steps.Work, "speedup", lambda self, before, after: (1.01, 0.99, 1.03))
    slow = fxprune.compile(model, inputs, recipe)
    (step,) = slow.report.steps
    assert (step.taken, slow.plan.masks, slow.report.sparse) == (False, {}, [])
    assert "left out; it does not pay on this backend; 1.01 x as fast (95 % in 0.99-1.03)" in step.line()
    assert torch.equal(slow.module(inputs), model(inputs))
    monkeypatch.setattr(steps.Work, "speedup", lambda self, before, after: (1.3, 1.2, 1.4))
    fast = fxprune.compile(model, inputs, recipe)
    assert fast.report.steps[0].taken
    assert fast.plan.masks


def test_a_drop_above_what_is_allowed_stops(case: tuple[nn.Module, Any]) -> None:
    model, example = case
    data = batches(example)
    with pytest.raises(TargetError, match=r"sparsity 2:4, alps costs .* of the outputs' variance; 1e-06 is allowed"):
        fxprune.compile(model, example(), sparsity={"max_drop": 1e-6}, calibration=data)
    fresh = example(32)
    target = model(fresh)

    def metric(module: nn.Module) -> float:
        return -float((module(fresh) - target).square().mean())

    with pytest.raises(TargetError, match=r"costs .* of the metric; 1e-12 is allowed. Reached: .*metric -.* -> -"):
        fxprune.compile(model, example(), sparsity={"max_drop": 1e-12}, calibration=data, metric=metric)
    fine = fxprune.compile(model, example(), sparsity={"max_drop": 1e6}, calibration=data, metric=metric)
    assert fine.report.steps[0].metric == (pytest.approx(0, abs=1e-9), metric(fine.module))


def test_a_model_in_which_nothing_can_be_sparse_says_so() -> None:
    pruned = fxprune.compile(nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 6), sparsity="2:4")
    (step,) = pruned.report.steps
    assert (step.taken, step.why) == (False, "no layer can have the pattern")
    assert "not eligible, 6 inputs do not divide by 4: 0.weight" in str(pruned.report)


@pytest.mark.parametrize(
    ("sparsity", "said"),
    [
        ({"patern": "2:4"}, "sparsity has no option 'patern'; did you mean 'pattern'"),
        ({"method": "sparsgpt"}, "no sparsity method is called 'sparsgpt'; did you mean 'sparsegpt'"),
        ({"method": "wanda"}, "sparsity method 'wanda' takes calibration data"),
        ({"when": "never"}, "when is 'always' or 'faster', not 'never'"),
        ({"max_drop": -1}, "max_drop is a number from 0 on, not -1"),
        ({"max_drop": 0.1}, "max_drop takes calibration data"),
        ({"refit": True}, "refit takes calibration data"),
        ("3:2", "the smaller number comes first"),
    ],
)
def test_what_a_recipe_gets_wrong(sparsity: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        fxprune.compile(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), sparsity=sparsity)
