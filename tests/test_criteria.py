"""Each criterion against its formula, written out for a two-layer network, and what distinguishes it from others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import InputError, RecipeError
from fxprune.groups import find_groups
from fxprune.passes import CRITERIA, load
from fxprune.passes.calibration import calibration
from fxprune.passes.choose import score
from fxprune.passes.statistics import Scores, Statistics

load()
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
ROWS, UNITS, CLASSES = 40, 12, 5


class Net(nn.Module):
    """One hidden layer behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, UNITS), nn.BatchNorm1d(UNITS), nn.Linear(UNITS, CLASSES)
        nn.init.uniform_(self.norm.weight, 0.2, 2.0)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x))  # type: ignore[no-any-return]

    def hidden(self, x: Tensor) -> Tensor:
        """What the last layer reads."""
        return torch.relu(self.norm(self.first(x)))


def loss(y: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(y, labels)


class Case:
    """The network, data in two unequal batches, and dense float64 views of all of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net().eval()
        self.x, self.labels = torch.randn(ROWS, 6), torch.randint(0, CLASSES, (ROWS,))
        self.analysis = analyse(capture(self.net, (self.x[:3],), {}))
        (self.group,) = find_groups(self.analysis)
        self.hidden = self.net.hidden(self.x).detach().double().numpy()
        self.weight = self.net.last.weight.detach().double().numpy()
        self.parameters = dict(self.net.named_parameters())

    def scores(self, name: str, **options: Any) -> Scores:
        batches = [(self.x[:24], self.labels[:24]), (self.x[24:], self.labels[24:])]
        data = calibration(batches, self.analysis.captured, loss)
        return self.all(name, data, **options)

    def all(self, name: str, data: Any, **options: Any) -> Scores:
        bound = CRITERIA[name].bound({"name": name, **options})
        return score(bound, [self.group], Statistics(self.analysis, 0, data))[self.group.name]

    def gradients(self) -> list[dict[str, Tensor]]:
        """Of each row's loss, by parameter."""
        found = []
        for i in range(ROWS):
            value = loss(self.net(self.x[i : i + 1]), self.labels[i : i + 1])
            gradients = torch.autograd.grad(value, list(self.parameters.values()))
            found.append({n: g.double() for n, g in zip(self.parameters, gradients, strict=True)})
        return found

    def masks(self) -> Scores:
        """The gradient of each row's loss with respect to a factor on each unit, (rows, units)."""
        hidden = self.net.hidden(self.x).detach().requires_grad_()
        nn.functional.cross_entropy(self.net.last(hidden), self.labels, reduction="sum").backward()
        assert hidden.grad is not None
        return (hidden.detach() * hidden.grad).double().numpy()

    def by_unit(self, values: dict[str, Tensor]) -> Scores:
        """Sums over all that a unit cuts: rows of the first layer, the norm, columns of the last."""
        total = values["first.weight"].sum(1) + values["first.bias"] + values["last.weight"].sum(0)
        return (total + values["norm.weight"] + values["norm.bias"]).numpy()


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def same(found: Scores, expected: Scores) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-9 + 1e-6 * np.abs(expected).max())


def test_of_activations(case: Case) -> None:
    h, w = case.hidden, case.weight
    same(case.scores("activation", normalize="none"), np.sqrt((h**2).mean(0)))
    same(case.scores("activation", p=1, normalize="none"), np.abs(h).mean(0))
    same(case.scores("apoz"), (h > 0).mean(0))
    same(case.scores("wanda", normalize="none"), (np.abs(w) * np.sqrt((h**2).mean(0))).sum(0))
    same(case.scores("flap", normalize="none"), (w**2 * h.var(0)).sum(0))
    standard = (w**2 * h.var(0)).sum(0)
    same(case.scores("flap", normalize="zscore") + 10, (standard - standard.mean()) / standard.std() + 10)


def test_of_weights(case: Case) -> None:
    made = torch.cat([case.net.first.weight], 1).detach().double()
    same(case.scores("fpgm", normalize="none"), torch.cdist(made, made).sum(1).numpy())
    power = (made.square().sum(1) + case.net.last.weight.detach().double().square().sum(0)).numpy()
    expected = [power[u] / power[power >= power[u]].sum() for u in range(UNITS)]
    same(case.scores("lamp"), np.array(expected))
    same(case.scores("bn_scale", normalize="none"), case.net.norm.weight.detach().double().abs().numpy())


def test_of_gradients(case: Case) -> None:
    each = case.gradients()
    mean = {n: torch.stack([g[n] for g in each]).mean(0) for n in each[0]}
    product = {n: p.detach().double() * mean[n] for n, p in case.parameters.items()}
    sizes = {n: v.abs() for n, v in product.items()}
    same(case.scores("taylor"), case.by_unit(sizes))
    same(case.scores("taylor", reduce="sum"), np.abs(case.by_unit(product)))
    same(case.scores("taylor", form="bn"), (product["norm.weight"] + product["norm.bias"]).abs().numpy())
    same(case.scores("snip"), case.by_unit(sizes) / float(sum(v.sum() for v in sizes.values())))
    squares = {n: torch.stack([g[n] for g in each]).square().mean(0) for n in mean}
    curved = {n: 0.5 * p.detach().double().square() * squares[n] for n, p in case.parameters.items()}
    same(case.scores("obd"), case.by_unit(curved))


def test_of_masks(case: Case) -> None:
    g = case.masks()
    same(case.scores("fisher", rearrange=False), 0.5 * (g**2).mean(0))
    same(case.scores("taylor", form="activation"), np.abs(g).mean(0))
    sizes = np.abs(g).mean(0)
    same(case.scores("fastformers"), sizes / np.linalg.norm(sizes))


def test_fisher_rearranged_removes_what_costs_least_together(case: Case) -> None:
    """Greedy, one unit after the other; the scores of what is removed add up to the cost of the set."""
    g = case.masks()
    found, gone = case.scores("fisher"), list[int]()
    for unit in np.argsort(found):
        costs = {u: 0.5 * float(np.square(g[:, [*gone, u]].sum(1)).mean()) for u in range(UNITS) if u not in gone}
        best = min(costs.values())
        assert costs[int(unit)] <= best + 1e-9 + 1e-6 * best
        gone.append(int(unit))


def test_regression_keeps_what_explains_the_most(case: Case) -> None:
    """The best unit first, then the one that lowers the error the most beside it, with all factors fitted anew."""
    z = case.hidden[:, :, None] * case.weight.T[None]  # (rows, units, classes): what each unit contributes
    flat = z.transpose(1, 0, 2).reshape(UNITS, -1)
    target = flat.sum(0)

    def left(units: list[int]) -> float:
        fit = np.linalg.lstsq(flat[units].T, target, rcond=None)[0]
        return float(np.square(flat[units].T @ fit - target).sum())

    order = np.argsort(-case.scores("regression"))
    chosen: list[int] = []
    for unit in order[:6]:
        errors = [left([*chosen, u]) for u in range(UNITS) if u not in chosen]
        assert left([*chosen, int(unit)]) <= min(errors) * (1 + 1e-4) + 1e-9
        chosen.append(int(unit))


def test_obs_is_brute_force(case: Case) -> None:
    """The first unit to go is the one without which the refitted layer is nearest to the dense one."""
    found = case.scores("obs", rounds=1000)
    ones = np.concatenate([case.hidden, np.ones((ROWS, 1))], 1)
    full = np.concatenate([case.weight, case.net.last.bias.detach().double().numpy()[:, None]], 1)
    rows = torch.from_numpy(ones @ full.T)
    each = []
    for row, label in zip(rows, case.labels, strict=True):
        row = row.clone().requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(row[None], label[None]), row)
        each.append(slope)
    slopes = torch.stack(each).square().mean(0).numpy()
    h = ones.T @ ones / ROWS
    h += 1e-3 * h.diagonal().mean() * np.eye(len(h))  # as damped as the criterion's
    errors = []
    for unit in range(UNITS):
        keep = [i for i in range(UNITS + 1) if i != unit]
        fitted = np.zeros_like(full)
        fitted[:, keep] = (full @ h)[:, keep] @ np.linalg.inv(h[np.ix_(keep, keep)])
        change = full - fitted
        errors.append(0.5 * float(slopes @ ((change @ h) * change).sum(1)))
    assert int(np.argmin(found)) == int(np.argmin(errors))
    np.testing.assert_allclose(found.min(), min(errors), rtol=1e-3)


# ---------------------------------------------------------------------- what is asked for wrongly
@pytest.mark.parametrize("name", sorted(n for n in CRITERIA if CRITERIA[n].needs))
def test_data_are_asked_for(case: Case, name: str) -> None:
    with pytest.raises(InputError, match=r"calibration data .* or choose criterion 'magnitude'"):
        case.all(name, None)


@pytest.mark.parametrize("name", ["taylor", "snip"])
def test_a_loss_is_asked_for(case: Case, name: str) -> None:
    with pytest.raises(InputError, match="pass `loss`"):
        case.all(name, calibration([case.x], case.analysis.captured))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("activation", {"p": 3}, "p is 1 or 2"),
        ("wanda", {"normalize": "sum"}, "normalize is mean, max or none"),
        ("taylor", {"form": "gates"}, "form is weight, activation or bn"),
        ("taylor", {"reduce": "max"}, "reduce abs or sum"),
        ("flap", {"p": 2}, "no option 'p'"),
    ],
)
def test_unknown_options_are_refused(case: Case, name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        case.scores(name, **options)
