"""Reconstruction: exact where it can be, never worse than before, for every kind of layer; models stay as they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import InputError, NonFiniteError, RecipeError
from fxprune.passes.consumers import contractions
from fxprune.passes.obs import DAMPING, Problem, refit, removal
from fxprune.passes.swap import swapped

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


def mixed(rows: int, width: int, rank: int, seed: int = 0) -> Tensor:
    """Inputs (rows, width) that vary in a few directions, so that units can stand in for each other."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return low + 0.05 * torch.randn(rows, width, generator=generator)


def error(model: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """Squared error relative to the variance of the output."""
    with torch.no_grad():
        y, z = model(x), pruned(x)
    return float((y - z).square().sum() / (y - y.mean(0)).square().sum())


class Normed(nn.Module):
    """Convolutions of every kind around batch norms and a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4)
        self.down = nn.Conv2d(32, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.up(F.relu(self.down(F.relu(self.grouped(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP before norms, on a residual stream."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.first, self.second = nn.Linear(6, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 48), nn.Linear(48, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(x)  # type: ignore[no-any-return]


class Language(nn.Module):
    """A decoder whose head is the embedding, and Conv1D-like layers (addmm)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.into, self.bias = nn.Parameter(torch.randn(16, 40) / 4), nn.Parameter(torch.zeros(40))
        self.out = nn.Linear(40, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = torch.addmm(self.bias, self.norm(x).flatten(0, 1), self.into).view(*ids.shape, -1)
        return F.linear(x + self.out(F.gelu(h)), self.table.weight)


def images(batch: int, seed: int) -> Tensor:
    return F.interpolate(torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), size=8)


def tokens(batch: int, seed: int) -> Tensor:
    return mixed(batch * 7, 6, 3, seed).view(batch, 7, 6)


def words(batch: int, seed: int) -> Tensor:
    return torch.randint(0, 30, (batch, 9), generator=torch.Generator().manual_seed(seed))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5)), lambda n, s: mixed(n, 12, 4, s)),
    "convolutions": (Normed, images),
    "transformer": (Block, tokens),
    "language": (Language, words),
}


@pytest.mark.parametrize("name", CASES)
def test_refitting_beats_leaving_it(name: str) -> None:
    """On inputs that calibration has not seen; the dense model is bit for bit what it was."""
    make, inputs = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = [inputs(32, seed) for seed in range(1, 9)]
    errors = {}
    for method in ("none", "bias", "least_squares"):
        settings: dict[str, Any] = {"target": {"macs": 0.5}, "round_to": 1, "floor": 0.2, "reconstruction": method}
        pruned = fxprune.compile(model, inputs(4, 0), calibration=data, **settings)
        errors[method] = error(model, pruned.module, inputs(64, 99))
        assert bool(pruned.report.refitted) == (method != "none")
        assert all(r.after <= r.before for r in pruned.report.refitted)
    assert errors["least_squares"] < 0.6 * errors["none"], errors
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_units_that_are_copies_are_removed_without_loss() -> None:
    """Every hidden unit is there twice: half of them can go, and the sum of both outgoing weights stays."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        net[0].weight[16:], net[0].bias[16:] = net[0].weight[:16], net[0].bias[:16]
    x = torch.randn(512, 8)
    settings = {"name": "least_squares", "damping": 1e-8}
    pruned = fxprune.compile(
        net, x[:4], target={"macs": 0.5}, round_to=1, calibration=[x], reconstruction=settings, allocation="uniform"
    )
    assert pruned.module.get_parameter("0.weight").shape == (16, 8)
    assert error(net, pruned.module, torch.randn(64, 8)) < 1e-6


def test_few_data_are_not_believed() -> None:
    """Fewer rows than a layer has inputs: with the damping that rows held out ask for, new data fare better."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(48, 16)
    new = torch.randn(512, 16)
    left = {}
    for damping in (None, 1e-3):
        settings = {"name": "least_squares"} | ({} if damping is None else {"damping": damping})
        pruned = fxprune.compile(
            net, (x[:2],), {"target": {"macs": 0.6}, "round_to": 1}, reconstruction=settings, calibration=[(x,)]
        )
        left[damping] = float((net(new) - pruned.module(new)).detach().square().mean())
    assert left[None] < 0.8 * left[1e-3], left


def test_least_squares_is_the_solution_in_float64() -> None:
    """`refit` with hardly any damping equals numpy's least squares on the rows themselves."""
    x, t = mixed(200, 10, 10).double(), mixed(200, 4, 4, 1).double()
    got = refit(torch.zeros(4, 10).double(), x.T @ x / 200, t.T @ x / 200, damping=1e-14)
    expected, *_ = np.linalg.lstsq(x.numpy(), t.numpy(), rcond=None)
    np.testing.assert_allclose(got.numpy(), expected.T, rtol=1e-7)


def test_half_of_a_layer() -> None:
    """A layer of correlated inputs at half of its units: OBS leaves half of the error that Wanda's choice leaves."""
    generator = torch.Generator().manual_seed(0)
    d, n, out = 128, 4096, 64
    base = torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) * 0.5
    x = (base / base.std(0) * torch.rand(d, generator=generator).add(0.2)).double()
    w = torch.randn(out, d, generator=generator).double()
    moment = x.T @ x / n
    dense = float((w @ moment * w).sum())

    def left(gone: Any, weight: Tensor) -> float:
        difference = weight - w
        return float((difference @ moment * difference).sum()) / dense

    wanda = (w.abs().sum(0) * moment.diagonal().sqrt()).argsort()[: d // 2]
    masked = w.clone()
    masked[:, wanda] = 0
    order, errors = removal([Problem(w, moment, np.arange(d))], d, d // 2)
    assert errors[-1] / dense < 0.5 * left(wanda, masked)
    keep = np.setdiff1d(np.arange(d), order)
    fitted = torch.zeros_like(w)
    h = moment[keep][:, keep]
    fitted[:, keep] = torch.linalg.solve(h, (w @ moment)[:, keep].T).T
    assert left(order, fitted) == pytest.approx(errors[-1] / dense, rel=2e-2)  # damping is all that differs


@pytest.mark.parametrize("name", ["convolutions", "transformer", "language", "mlp"])
def test_contractions_are_matrix_products(name: str) -> None:
    """Rows times matrix plus bias is what the layer gives, for every kind of layer."""
    make, inputs = CASES[name]
    torch.manual_seed(1)
    model = make().eval()
    captured = capture(model, (inputs(2, 0),), {})
    analysis = analyse(captured)
    values: dict[Any, Tensor] = {}
    from fxprune.passes.calibration import Batch
    from fxprune.passes.observe import observe

    found = contractions(analysis)
    nodes = {n for c in found for n in (c.node, c.operand)}
    looks = {n: (lambda v, n=n: values.__setitem__(n, v)) for n in nodes}
    observe(analysis, [Batch([inputs(2, 0)])], looks)
    assert len(found) == {"convolutions": 5, "transformer": 6, "language": 3, "mlp": 2}[name]
    for c in found:
        weight = captured.tensors[c.weight].detach()
        matrix = c.matrix(weight)
        rows = c.rows(values[c.operand], tuple(weight.shape[2:]) if c.rank else ())
        result = rows @ matrix.transpose(1, 2)
        if c.bias is not None:
            result = result + captured.tensors[c.bias].detach().reshape(len(matrix), 1, -1)
        torch.testing.assert_close(result, c.results(values[c.node]), rtol=1e-4, atol=1e-5)
        assert torch.equal(c.tensor(matrix, weight.shape), weight)


def test_padding_does_not_count() -> None:
    """What padded rows hold changes nothing: a mask keeps them from every output."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(50, 12), nn.Linear(12, 40), nn.Linear(40, 6)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.down(F.gelu(self.up(self.table(ids))))
            return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    torch.manual_seed(0)
    model = Pooled().eval()
    mask = (torch.arange(10) < torch.randint(2, 10, (64, 1))).long()
    ids = torch.randint(0, 25, (64, 10))
    other = torch.where(mask > 0, ids, torch.randint(25, 50, ids.shape))
    results = [
        fxprune.compile(model, (i[:4], mask[:4]), target={"macs": 0.5}, round_to=1, calibration=[(i, mask)]).module
        for i in (ids, other)
    ]
    state, same = (r.state_dict() for r in results)
    assert all(torch.allclose(state[k], same[k], atol=1e-6) for k in state)


# ---------------------------------------------------------------------- what can go wrong
NET = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("calibration", "more", "kind", "text"),
    [
        ([], {}, InputError, "calibration yields no batch"),
        (torch.randn(4, 6), {}, InputError, "calibration is an iterable of batches"),
        ([torch.randn(4, 7)], {}, InputError, r"'\w+' has the shape \(4, 7\), the example \(4, 6\)"),
        ([torch.full((4, 6), float("nan"))], {}, InputError, "holds NaN or infinite values"),
        (
            [X],
            {"loss": lambda y, labels: y.sum()},
            InputError,
            "the loss takes labels, but calibration batches have none",
        ),
        ([(X, X[:, 0])], {"loss": lambda y, labels: labels.sum()}, InputError, "does not depend on the model's output"),
        ([(X, X[:, 0])], {"loss": lambda y, labels: y}, InputError, r"the loss gives a tensor \(4, 3\), not a scalar"),
        ([X * 1e30 * 1e30], {}, InputError, "holds NaN or infinite values"),
        ([X * 1e38], {}, NonFiniteError, "holds? NaN or infinite values"),
        ([X], {"reconstruction": "lstsq"}, RecipeError, "there is no reconstruction 'lstsq'"),
        ([X], {"reconstruction": {"name": "bias", "speed": 1}}, RecipeError, "has no option 'speed'"),
        (None, {"reconstruction": "least_squares"}, RecipeError, "takes calibration data"),
        (None, {"criterion": "obs"}, InputError, "takes calibration data"),
        (None, {"allocation": "spdy"}, InputError, "allocation 'spdy' tries models on calibration data"),
        (None, {"allocation": "amc"}, InputError, "allocation 'amc' tries models on calibration data"),
        ([X], {"target": {"max_drop": 0.1}}, RecipeError, "target max_drop takes `metric`"),
    ],
)
def test_what_is_wrong_is_said(calibration: Any, more: dict[str, Any], kind: type[Exception], text: str) -> None:
    before = {k: v.clone() for k, v in NET.state_dict().items()}
    with pytest.raises(kind, match=text):
        fxprune.compile(NET, X, calibration=calibration, **{"target": {"macs": 0.5}, "round_to": 1, **more})
    assert all(torch.equal(before[k], v) for k, v in NET.state_dict().items())


def test_a_number_of_random_inputs_warns() -> None:
    with pytest.warns(UserWarning, match="calibration on random numbers"):
        pruned = fxprune.compile(NET, X, target={"macs": 0.5}, round_to=1, calibration=40)
    assert pruned.report.samples == 40 and pruned.report.refitted


@pytest.mark.parametrize(
    "batch",
    [X, (X,), [X], (X, torch.zeros(4)), ((X,), torch.zeros(4)), {"input": X}, {"input": X, "labels": torch.zeros(4)}],
    ids=["tensor", "tuple", "list", "labels", "nested", "dict", "dict and labels"],
)
def test_batches_come_in_many_forms(batch: Any) -> None:
    pruned = fxprune.compile(NET, X, target={"macs": 0.5}, round_to=1, calibration=[batch])
    assert pruned.report.samples == 4


# ---------------------------------------------------------------------- swap search
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 7), st.integers(1, 3), st.booleans())
def test_swapping_never_loses_more(seed: int, units: int, width: int, two: bool) -> None:
    """From any units, and never below the best of all sets."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    problems = []
    for _ in range(1 + two):
        size = units * width + 1
        x = torch.randn(40, size, generator=generator) @ torch.randn(size, size, generator=generator)
        members = np.concatenate([np.repeat(rng.permutation(units), width), [-1]])
        problems.append(Problem(torch.randn(3, size, generator=generator).double(), (x.t() @ x / 40).double(), members))
    count = int(rng.integers(1, units))
    start = rng.choice(units, count, replace=False)
    found = swapped(problems, start, units)
    assert len(found) == count == len(set(found.tolist()))
    assert lost(problems, found) <= lost(problems, start) * (1 + 1e-6) + 1e-9
    best = min(lost(problems, np.array(some)) for some in itertools.combinations(range(units), count))
    assert lost(problems, found) >= best * (1 - 1e-6) - 1e-9


def lost(problems: list[Problem], kept: Any) -> float:
    """What the layers lose with these units alone, refitted, by dense algebra."""
    total = 0.0
    for p in problems:
        h = p.moment + DAMPING * torch.diagonal(p.moment).mean() * torch.eye(len(p.moment), dtype=torch.float64)
        own = [i for i, unit in enumerate(p.units) if unit < 0 or unit in set(np.asarray(kept).tolist())]
        fitted = torch.zeros_like(p.weight)
        fitted[:, own] = (p.weight @ h)[:, own] @ torch.linalg.inv(h[own][:, own])
        total += float((((p.weight - fitted) @ h) * (p.weight - fitted)).sum())
    return total


def test_swaps_in_a_recipe() -> None:
    """What is kept is as much, and the output is no further off where it was a matter of choice."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    x = mixed(256, 12, 4)
    plain, better = (
        fxprune.compile(net, x[:4], {"target": {"params": 0.4}, "criterion": c, "round_to": 1}, calibration=[x])
        for c in ({"name": "obs", "rounds": 2}, {"name": "obs", "rounds": 2, "swaps": 20})
    )
    assert plain.report.params.pruned == better.report.params.pruned
    assert plain.plan.kept != better.plan.kept
    assert error(net, better.module, x) < error(net, plain.module, x)


# ---------------------------------------------------------------------- tuning
def test_tuning_learns_the_dense_outputs() -> None:
    """On data it has not seen the outputs are nearer; matrices, flags and modes stay as they were."""
    torch.manual_seed(0)
    model = Block().eval()
    model.down.weight.requires_grad_(False)
    batches = [tokens(32, s) for s in range(6)]
    recipe = {"target": {"macs": 0.6}, "round_to": 1, "criterion": "magnitude", "basis": "none"}
    plain, tuned = (
        fxprune.compile(
            model, batches[0][:2], recipe, reconstruction={"name": "least_squares", "tune": n}, calibration=data
        )
        for n, data in ((0, batches[1:]), (8, batches))  # the first is held out
    )
    x = tokens(64, 99)
    assert error(model, tuned.module, x) < 0.97 * error(model, plain.module, x)
    row = tuned.report.tuned
    assert row is not None and row.after < row.before
    assert plain.report.tuned is None
    assert any(line.startswith("tuned biases") for line in tuned.report.lines())
    for (name, a), b in zip(plain.module.named_parameters(), tuned.module.parameters(), strict=True):
        assert torch.equal(a, b) == (a.dim() > 1), name
        assert a.requires_grad == b.requires_grad == (name != "down.weight")
        assert b.grad is None
    assert not tuned.module.training


def test_tuning_keeps_the_start_where_nothing_is_better() -> None:
    """A rate that wrecks the model changes nothing."""
    torch.manual_seed(0)
    model = Block().eval()
    batches = [tokens(32, s) for s in range(3)]
    pruned = [
        fxprune.compile(
            model,
            batches[0][:2],
            {"target": {"macs": 0.6}, "criterion": "magnitude", "basis": "none"},
            reconstruction={"name": "least_squares", "tune": n, "rate": 1e3},
            calibration=data,
        ).module
        for n, data in ((0, batches[1:]), (1, batches))
    ]
    assert all(torch.equal(a, b) for a, b in zip(pruned[0].parameters(), pruned[1].parameters(), strict=True))


def test_tuning_takes_data_to_hold_out() -> None:
    model = Block().eval()
    recipe = {"target": {"macs": 0.6}, "reconstruction": {"name": "least_squares", "tune": 1}}
    with pytest.raises(InputError, match="pass more than 32 samples"):
        fxprune.compile(model, tokens(2, 0), recipe, calibration=[tokens(16, 1)])
    pruned = fxprune.compile(model, tokens(2, 0), target={"macs": 0.6}, calibration=[tokens(16, 1)])
    assert pruned.report.tuned is None
