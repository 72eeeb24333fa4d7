"""The basis of attention: the same function, ordered by what is lost, and left alone where it is not free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import InputError
from fxprune.groups import find_groups
from fxprune.kept import Kept
from fxprune.passes import tune
from fxprune.passes.basis import principal
from fxprune.passes.calibration import calibration
from fxprune.passes.statistics import Statistics
from fxprune.passes.trial import some_samples
from fxprune.prove import Reference, dense_weights

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
WIDTH, HEADS, DIMS = 16, 2, 8


class Attention(nn.Module):
    """Self-attention in several ways of writing it."""

    def __init__(self, how: str, low: int = 3) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)
        self.norm = nn.LayerNorm(DIMS)
        for layer in (
            self.q,
            self.k,
            self.v,
        ):  # a head varies in a few directions, no dimensions
            with torch.no_grad():
                for rows in layer.weight.view(HEADS, DIMS, WIDTH):
                    u, s, v = torch.linalg.svd(rows, full_matrices=False)
                    rows.copy_(u * torch.cat([s[:low], 0.01 * s[low:]]) @ v)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.how == "fused":
            q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(b, n, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.how == "normed":
            q, k = self.norm(q), self.norm(k)
        if self.how == "written out":
            y = torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)) / 3.0, -1), v)
        elif self.how == "scaled":
            y = F.scaled_dot_product_attention(q * 0.5, k, v, scale=1.0)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        if self.how == "gated":
            y = y * torch.sigmoid(v)
        return self.head(self.out(y.transpose(1, 2).reshape(b, n, -1)))  # type: ignore[no-any-return]


X = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(16, 6, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (2, 3)]


def made(how: str) -> Attention:
    torch.manual_seed(0)
    return Attention(how).eval()


def turned(model: nn.Module) -> tuple[Any, Any]:
    """Return what was changed, and the captured model after it."""
    captured = capture(model, (X,), {})
    analysis = analyse(captured)
    return principal(analysis, find_groups(analysis), calibration(DATA, captured), 2**31), analysis


@pytest.mark.parametrize(
    ("how", "scores", "values"),
    [
        ("plain", HEADS, HEADS),
        ("scaled", HEADS, HEADS),
        ("written out", HEADS, HEADS),
        ("fused", HEADS, HEADS),
        ("normed", 0, HEADS),  # a norm over the dimensions knows their basis
        ("gated", HEADS, 0),
    ],
)
def test_the_function_stays_and_the_model_is_left_alone(how: str, scores: int, values: int) -> None:
    model = made(how)
    before = {n: p.clone() for n, p in model.named_parameters()}
    changed, analysis = turned(model)
    assert (changed.scores, changed.values) == (scores, values)
    with torch.no_grad():
        (found,) = Reference(analysis, Kept({}), dense_weights(analysis.captured), None).run([X])
        torch.testing.assert_close(found, model(X), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    moved = [n for n, t in analysis.captured.tensors.items() if n in before and not torch.equal(t, before[n])]
    assert ("q.weight" in moved or "qkv.weight" in moved) == bool(scores or how == "fused")
    assert ("out.weight" in moved) == bool(values)


def test_dimensions_are_ordered_by_what_they_do() -> None:
    """Scores without the last dimensions are nearly the same; in the old basis they are not."""
    model = made("plain")
    _, analysis = turned(model)
    tensors = analysis.captured.tensors

    def scores(q: Tensor, qb: Tensor, k: Tensor, kb: Tensor, few: int) -> Tensor:
        a, b = (F.linear(X, w, c).view(4, 6, HEADS, DIMS).transpose(1, 2)[..., :few] for w, c in ((q, qb), (k, kb)))
        return F.softmax(a @ b.transpose(-1, -2) / DIMS**0.5, -1)

    old = [model.q.weight, model.q.bias, model.k.weight, model.k.bias]
    new = [tensors[n] for n in ("q.weight", "q.bias", "k.weight", "k.bias")]
    with torch.no_grad():
        whole = scores(*old, DIMS)  # type: ignore[arg-type]
        lost = [float((scores(*which, 4) - whole).square().sum()) for which in (old, new)]  # type: ignore[arg-type]
        torch.testing.assert_close(scores(*new, DIMS), whole, rtol=1e-3, atol=1e-5)
    assert lost[1] < 0.05 * lost[0]


@pytest.mark.parametrize("how", ["plain", "written out"])
def test_less_is_lost(how: str) -> None:
    model = made(how)
    lost = {}
    for basis in ("none", "principal"):
        recipe = {"target": {"macs": 0.75}, "groups": ["head_dims"], "round_to": 1, "basis": basis}
        pruned = fxprune.compile(model, X, recipe, calibration=DATA)
        assert any("principal components" in n for n in pruned.report.notes) == (basis == "principal")
        with torch.no_grad():
            lost[basis] = float((pruned.module(X) - model(X)).square().sum())
    assert lost["principal"] < 0.3 * lost["none"]


def test_a_plan_in_this_basis_takes_data() -> None:
    model = made("plain")
    plan = fxprune.dry_run(model, X, {"target": {"macs": 0.7}, "round_to": 1}, calibration=DATA)
    assert plan.basis
    assert type(plan).from_json(plan.to_json()).basis
    with pytest.raises(InputError, match="in the basis of principal components"):
        fxprune.compile(model, X, plan=plan)
    first, second = (fxprune.compile(model, X, plan=plan, calibration=DATA).module for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(first(X), second(X))


def test_there_may_be_nothing_to_turn() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    changed, _ = turned(model)
    assert changed is None
    pruned = fxprune.compile(model, X, target={"macs": 0.5}, calibration=DATA)
    assert not pruned.plan.basis


def test_a_few_samples_are_of_the_whole_data() -> None:
    """Loaders may be sorted, by length or by class: what looks at a part of the data looks at all of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    captured = capture(net, (torch.randn(2, 4),), {})
    rows = torch.linspace(0, 1, 640).unsqueeze(1).expand(640, 4)
    data = calibration(list(rows.split(32)), captured)
    analysis = analyse(captured)
    for count in (64, 128):
        few = some_samples(analysis, data, count)
        values = torch.cat([b.inputs[0][:, 0] for b in few.batches])
        assert len(values) == count
        assert abs(float(values.mean()) - 0.5) < 0.02 and values.min() < 0.03 and values.max() > 0.97
    assert some_samples(analysis, data, 640) is data
    rest, held = tune.split(data, Statistics(analysis, 0, data))
    for part in (rest, held):
        values = torch.cat([b.inputs[0][:, 0] for b in part.batches])
        assert abs(float(values.mean()) - 0.5) < 0.1
    assert rest.samples + held.samples == 640 and held.samples == 96
