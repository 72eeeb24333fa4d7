"""What methods compute, against the formula written down independently or against autograd."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import RecipeError, TargetError
from fxprune.groups import find_groups
from fxprune.passes import training
from fxprune.passes.training import cut
from fxprune.passes.training.find import find, known_patterns
from fxprune.passes.training.ramp import RAMPS, Schedule
from fxprune.passes.training.stage import Stage
from fxprune.passes.training.units import AxisUnits, CountedUnits, WeightUnits
from fxprune.training.pruner import Pruner
from tests.training.nets import NETS, batch, finished, go_on, loss, train

training.load()


# ---------------------------------------------------------------------- ramps
@given(
    ramp=st.sampled_from(RAMPS.names()),
    start=st.integers(0, 20),
    length=st.integers(1, 50),
    every=st.integers(1, 60),
    target=st.floats(0.05, 0.99),
)
def test_ramps_rise_and_end_at_the_target(ramp: str, start: int, length: int, every: int, target: float) -> None:
    schedule = Schedule(ramp, start, start + length, every)
    shares = [schedule.share(s, target) for s in range(start + length + 3)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(shares))
    assert shares[:start] == [0.0] * start
    assert shares[-1] == shares[start + length] == pytest.approx(target)
    updates = [s for s in range(start + length + 3) if schedule.updates(s)]
    assert updates[0] == start
    assert updates[-1] == (start if ramp == "oneshot" else start + length)


@pytest.mark.parametrize(
    ("ramp", "formula"),
    [
        ("linear", lambda p, s: s * p),
        ("cubic", lambda p, s: s - s * (1 - p) ** 3),
        ("cube", lambda p, s: s * p**3),
        ("exponential", lambda p, s: 1 - (1 - s) ** p),
        ("cosine", lambda p, s: s * math.sin(math.pi * p / 2) ** 2),
        ("quarter_cosine", lambda p, s: s - s * math.cos(math.pi * p / 2)),
    ],
)
def test_ramps_are_these_formulas(ramp: str, formula: object) -> None:
    schedule = Schedule(ramp, 0, 40)
    found = [schedule.share(step, 0.8) for step in range(41)]
    assert found == pytest.approx([formula(step / 40, 0.8) for step in range(41)])  # type: ignore[operator]


def test_dense_and_sparse_phases_alternate_and_end_sparse() -> None:
    schedule = Schedule(start=2, end=14, dense=3, sparse=3)
    shares = [schedule.share(s, 0.5) for s in range(16)]
    assert shares == [0] * 5 + [0.5] * 3 + [0] * 3 + [0.5] * 5
    assert [s for s in range(16) if schedule.updates(s)] == [5, 8, 11, 14]


# ---------------------------------------------------------------------- what goes
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_cut_removes_the_lowest_and_the_share_exactly(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    counts = {str(i): float(data.draw(st.sampled_from([1, 4, 16]))) for i in range(len(sizes))}
    most = data.draw(st.floats(0.5, 1.0))
    bounds = cut.Bounds(0.0, most)
    floors = {n: data.draw(st.integers(0, 1)) for n in scores}
    high = cut.reachable({n: len(s) for n, s in scores.items()}, counts, bounds, floors)[1]
    share = data.draw(st.floats(0, 1))
    if share > high + 1e-9:
        with pytest.raises(TargetError, match="cannot be reached"):
            cut.keep(scores, counts, share, "global", bounds, floors)
        return
    kept = cut.keep(scores, counts, share, "global", bounds, floors)
    total = sum(len(s) * counts[n] for n, s in scores.items())
    gone = sum(int((~kept[n]).sum()) * counts[n] for n in scores)
    assert abs(gone / total - share) <= max(counts.values()) / 2 / total + 1e-9
    for n, k in kept.items():
        assert int((~k).sum()) <= min(math.floor(most * len(k) + 1e-9), len(k) - floors[n])
        if k.any() and not k.all():
            assert scores[n][~k].max() <= scores[n][k].min()


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_local_scope_takes_the_same_share_of_each(share: float, sizes: list[int]) -> None:
    scores = {str(i): torch.rand(n) for i, n in enumerate(sizes)}
    kept = cut.keep(scores, dict.fromkeys(scores, 1.0), share, "local", cut.Bounds())
    assert [int((~k).sum()) for k in kept.values()] == [round(share * n) for n in sizes]


# ---------------------------------------------------------------------- units
def _units(kind: str, pattern: str) -> list[object]:
    net, _ = NETS[kind]
    captured = capture(net().eval(), (batch(kind, 0)[0],), {})
    analysis = analyse(captured)
    return list(find(analysis, find_groups(analysis), Stage(pattern=pattern, target=0.5)).units)  # type: ignore[arg-type]


PATTERNS = ["element", "4x1", "1x4", "2:4", "1xchannel", "channelx1", "channel", "head", "head_dim", "ffn", "layer"]


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_expand_is_the_transpose_of_reduce(kind: str, pattern: str) -> None:
    """<spread(u), w> = <u, reduce(w)> for all u, w: both speak of the same entries."""
    if kind == "cnn" and pattern in ("head", "head_dim", "layer"):
        pytest.skip("there are none")
    model = NETS[kind][0]()
    for units in _units(kind, pattern):
        assert isinstance(units, AxisUnits | WeightUnits) or pattern == "layer"
        values = {n: torch.randn_like(model.get_parameter(n)).double() for n in units.weights}
        numbers = torch.randn(units.size).double()
        spread = units.spread(numbers)
        left = sum(float((spread[n] * values[n]).sum()) for n in values)
        assert left == pytest.approx(float((numbers * units.reduce(values.__getitem__)).sum()))
        mask = torch.rand(units.size) > 0.5
        inside = units.expand(mask)
        assert set(inside) == set(units.weights)
        if isinstance(units, WeightUnits):
            assert torch.equal(inside[units.name], units.spread(mask.double())[units.name] > 0)


def test_blocks_of_a_convolution_are_of_channels_at_one_place() -> None:
    units = next(u for u in _units("cnn", "1x4") if u.name == "3.weight")  # type: ignore[attr-defined]
    assert isinstance(units, WeightUnits)
    mask = torch.zeros(units.size, dtype=torch.bool)
    mask[0] = True
    block = {tuple(i) for i in units.expand(mask)["3.weight"].nonzero().tolist()}
    assert block == {(0, channel, 0, 0) for channel in range(4)}


def test_a_mask_on_an_axis_is_what_the_compiler_masks() -> None:
    """Zero weights of removed units give the outputs of the smaller model: no producer or consumer is forgotten."""
    for kind, pattern in (
        ("cnn", "channel"),
        ("transformer", "head"),
        ("transformer", "ffn"),
        ("transformer", "head_dim"),
    ):
        pruner = train(kind, {"pattern": pattern, "target": 0.5, "schedule": {"ramp": "oneshot", "start": 3}}, steps=4)
        _, difference = finished(pruner, kind)
        assert difference < 1e-5, pattern


def test_every_pattern_is_known_by_a_test_here_or_elsewhere() -> None:
    elsewhere = {"32x32", "filter", "hidden", "hybrid", "hybrid-filled", "struct"}
    assert set(known_patterns()) <= {*PATTERNS, *elsewhere}


# ---------------------------------------------------------------------- gradients
def _first_step(kind: str, pruning: dict[str, object]) -> tuple[Pruner, dict[str, Tensor], dict[str, Tensor]]:
    """A Pruner before its first optimizer step, the plain gradients, and those that the method left."""
    model = NETS[kind][0]()
    pruner = Pruner(model, batch(kind, -1, 2)[0], pruning, steps=20)
    pruner.on_step_begin()
    loss(model, kind, 0).backward()
    weights = pruner._subject.weights
    before = {n: weights.parameter(n).grad.clone() for n in weights}  # type: ignore[union-attr]
    pruner.on_before_optimizer_step()
    after = {n: weights.parameter(n).grad.clone() for n in weights if weights.parameter(n).grad is not None}  # type: ignore[union-attr]
    return pruner, before, after


LATE = {"start": 15, "end": 15, "ramp": "linear"}


def test_group_lasso_adds_the_gradient_of_its_penalty() -> None:
    pruner, before, after = _first_step(
        "cnn", {"method": {"name": "group_lasso", "reg": 0.01}, "pattern": "4x1", "target": 0.5, "schedule": LATE}
    )
    for name in before:
        weight = (
            pruner.model.get_parameter(name.replace(".weight", ".parametrizations.weight.original")).detach().clone()
        )
        weight.requires_grad_()
        matrix = weight.reshape(len(weight), -1)
        blocks = matrix.reshape(-1, 4, matrix.shape[1]).transpose(1, 2).reshape(-1, 4)
        (0.01 * 2.0 * blocks.norm(dim=1).sum()).backward()  # sqrt of four entries
        assert torch.allclose(after[name] - before[name], weight.grad, atol=1e-6)  # type: ignore[arg-type]


def test_group_sl_decays_the_unimportant_the_most() -> None:
    pruner, before, after = _first_step(
        "cnn", {"method": {"name": "group_sl", "reg": 0.1}, "pattern": "1xchannel", "target": 0.5, "schedule": LATE}
    )
    for name in before:
        weight = pruner._subject.weights.value(name)
        norms = weight.flatten(1).norm(dim=1)
        gamma = 2 ** (4 * (norms.max() - norms) / (norms.max() - norms.min()))
        expected = 0.1 * gamma.reshape(-1, *[1] * (weight.dim() - 1)) * weight
        assert torch.allclose(after[name] - before[name], expected, atol=1e-6)
        assert gamma.max() == 16
        assert gamma.min() == 1


def test_slimming_adds_the_sign_of_scales() -> None:
    _, before, after = _first_step(
        "cnn", {"method": {"name": "slimming", "reg": 0.3}, "pattern": "channel", "target": 0.5, "schedule": LATE}
    )
    assert torch.allclose(after["1.weight"] - before["1.weight"], torch.full((16,), 0.3))
    assert torch.equal(after["0.weight"], before["0.weight"])


def test_growing_reg_rises_for_what_is_to_go_alone() -> None:
    stage = {
        "method": {"name": "growing_reg", "delta": 0.5, "every": 1},
        "pattern": "1xchannel",
        "target": 0.5,
        "schedule": LATE,
    }
    pruner, before, after = _first_step("cnn", stage)
    (one,) = pruner.prunings
    for u in one.units:
        going = ~one.method._chosen[u.name]
        change = (after[u.name] - before[u.name]).flatten(1)
        weight = pruner._subject.weights.value(u.name).flatten(1)
        assert torch.allclose(change[going], 0.5 * weight[going], atol=1e-6)
        assert not change[~going].any()
    gone = sum(int((~one.method._chosen[u.name]).sum()) * u.counts for u in one.units)
    total = sum(u.size * u.counts for u in one.units)
    assert gone / total == pytest.approx(0.5, abs=max(u.counts for u in one.units) / total)


def test_sr_ste_passes_the_whole_gradient_and_decays_the_masked() -> None:
    model = NETS["cnn"][0]()
    stage = {"method": {"name": "straight_through", "decay": 0.1}, "pattern": "2:4", "schedule": {"ramp": "oneshot"}}
    stage["schedule"] = {"start": 0, "end": 9, "every": 1, "ramp": "linear", "initial": 0.4999}
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=20)
    pruner.on_step_begin()
    weights = pruner._subject.weights
    dense = {n: weights.value(n) for n in weights}
    masked = {n: (w * weights.mask(n)).clone().requires_grad_() for n, w in dense.items()}
    state = {**dict(model.state_dict()), **masked}
    plain = NETS["cnn"][0]()
    x, y = batch("cnn", 0)
    wanted = torch.autograd.grad(
        nn.functional.cross_entropy(
            torch.func.functional_call(plain, {k: v for k, v in state.items() if "parametrizations" not in k}, (x,)), y
        ),
        list(masked.values()),
    )
    loss(model, "cnn", 0).backward()
    pruner.on_before_optimizer_step()
    for (name, weight), gradient in zip(dense.items(), wanted, strict=True):
        expected = gradient + (0.1 * ~weights.mask(name) * weight if not pruner.prunings[0].done else 0)
        assert torch.allclose(weights.parameter(name).grad, expected, atol=1e-5)  # type: ignore[arg-type]


def test_movement_scores_get_the_straight_through_gradient() -> None:
    """dL/dS of a block is the sum of w dL/dw' over it, and the weight gets the masked gradient."""
    stage = {
        "method": {"name": "movement", "lr": 1.0},
        "pattern": "4x4",
        "target": 0.5,
        "schedule": {"start": 0, "end": 9, "initial": 0.3},
    }
    model = NETS["transformer"][0]()
    pruner = Pruner(model, batch("transformer", -1, 2)[0], stage, steps=20)
    pruner.on_step_begin()
    loss(model, "transformer", 0).backward()
    weights = pruner._subject.weights
    (one,) = pruner.prunings
    gradients = {n: weights.parameter(n).grad.clone() for n in weights}  # type: ignore[union-attr]
    pruner.on_before_optimizer_step()
    for u in one.units:
        product = weights.value(u.name) * gradients[u.name]
        high, wide = (n // 4 for n in product.shape)
        expected = product.reshape(high, 4, wide, 4).sum((1, 3)).reshape(-1)
        assert torch.allclose(one.method._scores[u.name].grad, expected, atol=1e-6)
        assert torch.equal(weights.parameter(u.name).grad, gradients[u.name] * weights.mask(u.name))


@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("pattern", ["struct", "layer"])
def test_movement_scores_of_what_is_masked_get_the_slope_of_a_factor_on_it(pattern: str, regrow: bool) -> None:
    """Heads, widths and layers: against autograd through factors on the weights that read or make them."""
    method = {"name": "movement", "regrow": regrow}
    stage = {"method": method, "pattern": pattern, "target": 0.5, "schedule": {"end": 9, "initial": 0.4}}
    model = NETS["transformer"][0]()
    plain = copy.deepcopy(model)
    pruner = Pruner(model, batch("transformer", -1, 2)[0], stage, steps=20)
    pruner.on_step_begin()
    loss(model, "transformer", 0).backward()
    pruner.on_before_optimizer_step()
    (one,) = pruner.prunings
    factors = {u.name: one.kept[u.name].float().requires_grad_() for u in one.units}
    weights = dict(plain.named_parameters())
    for u in one.units:
        weights |= {name: plain.get_parameter(name) * f for name, f in u.expand(factors[u.name]).items()}

    class Factored(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(plain, weights, (x,))

    loss(Factored(), "transformer", 0).backward()
    assert any(bool(f.grad[~one.kept[n]].any()) for n, f in factors.items())  # type: ignore[index]
    for u in one.units:
        wanted = factors[u.name].grad * (1.0 if regrow else one.kept[u.name])  # type: ignore[operator]
        assert torch.allclose(one.method._scores[u.name].grad, wanted, atol=1e-6)


def test_a_factor_on_what_makes_a_branch_is_one_on_the_branch() -> None:
    """The parameters at the end of a branch alone, behind what moves numbers, and with a scale or a norm there."""
    names = ("norm", "scale", "last", "odd", "twice")

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.up, self.scale = nn.Conv2d(4, 4, 1), nn.Parameter(torch.rand(4))
            self.first, self.last, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.1)
            self.odd, self.twice = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def parts(self, x: Tensor) -> dict[str, Tensor]:
            moved = self.first(x.permute(0, 2, 3, 1)).relu()
            return {
                "norm": self.norm(self.conv(x)),
                "scale": (self.up(x).permute(0, 2, 3, 1) * self.scale).permute(0, 3, 1, 2),
                "last": self.drop(self.last(moved)).permute(0, 3, 1, 2),
                "odd": self.odd(x).tanh(),
                "twice": self.twice(self.twice(x).relu()),
            }

        def forward(self, x: Tensor) -> Tensor:
            for name in names:
                x = x + self.parts(x)[name]
            return x

    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(2, 4, 5, 5)
    analysis = analyse(capture(model, (x,), {}))
    (units,) = find(analysis, find_groups(analysis), Stage(pattern="layer", target=0.5)).units
    for number, block in enumerate(units.blocks):
        owner = next(name for name in names if name in str(sorted(block.parameters)))
        factors = torch.ones(units.size)
        factors[number] = 0.5
        scaled = units.expand(factors)
        changed = {n for n, f in scaled.items() if not (f == 1).all()}
        found = torch.func.functional_call(
            copy.deepcopy(model), {n: model.get_parameter(n) * f for n, f in scaled.items()}, (x,)
        )
        if owner in ("odd", "twice"):  # a factor on the last layer is none on the branch: all of it is scaled
            assert changed == block.parameters
            continue

        class Halved(Branches):
            half = owner

            def parts(self, x: Tensor) -> dict[str, Tensor]:
                parts = super().parts(x)
                return parts | {self.half: 0.5 * parts[self.half]}

        halved = Halved().eval()
        halved.load_state_dict(model.state_dict())
        assert torch.allclose(found, halved(x), atol=1e-5)
        assert changed < block.parameters


@pytest.mark.parametrize("end", [torch.sigmoid, lambda y: y + 1, lambda y: 1 / y, lambda y: y / y.norm()])
def test_a_branch_that_adds_something_with_zeros_in_its_parameters_is_left_alone(end: Callable[..., Tensor]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + end(self.a(x))
            return x + torch.relu(self.b(x)) / 2

    analysis = analyse(capture(Gated(), (torch.randn(2, 8),), {}))
    found = find(analysis, find_groups(analysis), Stage(pattern="layer", target=0.5))
    assert [b.name for b in found.units[0].blocks] == ["b"]
    assert "zeros in all of its parameters" in found.unfit["a"]


@pytest.mark.parametrize(("form", "keep", "weigh"), [("code", 0.9, 1.0), ("document", 1.0, 0.9)])
def test_snip_momentum_in_both_forms(form: str, keep: float, weigh: float) -> None:
    stage = {
        "method": {"name": "snip_momentum", "form": form},
        "pattern": "element",
        "target": 0.5,
        "schedule": {"start": 15, "end": 15},
    }
    model = NETS["cnn"][0]()
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=20)
    expected: dict[str, Tensor] = {}
    for number in range(3):
        pruner.on_step_begin()
        model.zero_grad()
        loss(model, "cnn", number).backward()
        weights = pruner._subject.weights
        for n in weights:
            now = (weights.value(n) * weights.parameter(n).grad).abs()  # type: ignore[operator]
            expected[n] = weigh * now if number == 0 else keep * expected[n] + weigh * now
        pruner.on_before_optimizer_step()
        pruner.on_step_end()
    (one,) = pruner.prunings
    for u in one.units:
        whole = u.expand(one.method.scores(one, u))[u.name]
        assert torch.allclose(whole, expected[u.name], rtol=1e-5)


def test_snip_looks_at_weights_that_have_not_moved() -> None:
    model = NETS["cnn"][0]()
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    stage = {"method": {"name": "snip", "batches": 3}, "target": 0.5, "schedule": {"ramp": "oneshot", "start": 3}}
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=20).attach(optimizer)
    go_on(pruner, optimizer, "cnn", 0, 3)
    for name, value in first.items():
        assert torch.equal(pruner._subject.weights.parameter(name), value)
    go_on(pruner, optimizer, "cnn", 3, 4)
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_l0_gates_get_the_gradient_of_the_loss_and_of_the_constraint() -> None:
    stage = {
        "method": {"name": "l0", "lr": 1e-9, "hold": "lagrangian"},
        "pattern": "ffn",
        "target": 0.5,
        "schedule": {"start": 0, "end": 15},
    }
    model = NETS["transformer"][0]()
    pruner = Pruner(model, batch("transformer", -1, 2)[0], stage, steps=20)
    pruner.on_step_begin()
    (one,) = pruner.prunings
    method = one.method
    plain = NETS["transformer"][0]()
    gates = {u.name: method._gates[u.name].detach().clone().requires_grad_() for u in one.units}

    def value(name: str) -> Tensor:
        noise = method._noise[name]
        s = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + gates[name]) / (2 / 3))
        return (s * 1.2 - 0.1).clamp(0, 1)

    state = dict(plain.state_dict())
    for u in one.units:
        down = u.name.replace("up.weight.0", "down.weight")
        state[down] = state[down] * value(u.name)
    x, y = batch("transformer", 0)
    out = torch.func.functional_call(plain, state, (x,))
    nn.functional.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
    method._multipliers = torch.tensor([0.7, 0.2])
    gone = 1 - sum(float(method._open(u.name).detach().sum()) for u in one.units) / sum(u.size for u in one.units)
    loss(model, "transformer", 0).backward()
    pruner.on_before_optimizer_step()
    goal = one.schedule.share(0, 0.5)
    for u in one.units:
        probability = torch.sigmoid(gates[u.name] - 2 / 3 * math.log(0.1 / 1.1))
        share = (1 - probability).sum() / sum(v.size for v in one.units)
        own = torch.autograd.grad(share * (0.7 + 2 * 0.2 * (gone - goal)), gates[u.name])[0]
        assert torch.allclose(method._gates[u.name].grad, gates[u.name].grad + own, atol=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 0.01), ("lagrangian", 0.3)])
def test_l0_holds_the_expected_share_to_the_schedule(method: str, tolerance: float) -> None:
    stage = {
        "method": {"name": "l0", "lr": 0.05, "lr_multipliers": 1.0, "hold": method},
        "pattern": "ffn",
        "target": 0.6,
        "schedule": {"start": 0, "end": 300, "ramp": "linear", "every": 100},
    }
    pruner = train("transformer", stage, steps=302)
    (one,) = pruner.prunings
    gone = 1 - sum(float(one.method._open(u.name).detach().sum()) for u in one.units) / sum(u.size for u in one.units)
    assert gone == pytest.approx(0.6, abs=tolerance)
    assert one.sparsity() == pytest.approx(0.6, abs=0.01)


def test_learned_masks_get_the_gradient_of_the_loss() -> None:
    stage = {
        "method": {
            "name": "mask_learning",
            "lr": 1e-9,
            "keep_large": 0.0,
            "scale": (1.0, 1.0),
            "temperature": (1.0, 1.0),
        },
        "pattern": "2:4",
        "schedule": {"start": 15, "end": 15},
        "include": "1.q",
    }
    model = NETS["transformer"][0]()
    pruner = Pruner(model, batch("transformer", -1, 2)[0], stage, steps=20)
    pruner.on_step_begin()
    (one,) = pruner.prunings
    (u,) = one.units
    assert isinstance(u, CountedUnits)
    method = one.method
    logits = method._logits[u.name].detach().clone().requires_grad_()
    candidates = torch.tensor([[float(i in c) for i in range(4)] for c in itertools.combinations(range(4), 2)])
    gumbel = -torch.log(-torch.log(method._noise[u.name]))
    mask = (torch.softmax(logits + gumbel, 1) @ candidates).reshape(16, 16)
    plain = NETS["transformer"][0]()
    state = dict(plain.state_dict())
    state["1.q.weight"] = state["1.q.weight"] * mask
    x, y = batch("transformer", 0)
    out = torch.func.functional_call(plain, state, (x,))
    nn.functional.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
    loss(model, "transformer", 0).backward()
    pruner.on_before_optimizer_step()
    assert torch.allclose(method._logits[u.name].grad, logits.grad, atol=1e-6)  # type: ignore[arg-type]
    assert pruner._subject.weights.parameter(u.name).grad is None  # frozen


def test_rigl_drops_the_smallest_and_grows_where_gradients_are_large() -> None:
    stage = {"method": "rigl", "pattern": "element", "target": 0.7, "schedule": {"start": 0, "end": 12, "every": 4}}
    model = NETS["cnn"][0]()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=20).attach(optimizer)
    (one,) = pruner.prunings
    assert one.sparsity() == pytest.approx(0.7, abs=1e-3)
    weights = pruner._subject.weights
    for number in range(4):
        before = {n: k.clone() for n, k in one.kept.items()}
        optimizer.zero_grad()
        loss(model, "cnn", number).backward()
        gradients = {n: weights.parameter(n).grad.abs().reshape(len(weights.value(n)), -1) for n in weights}  # type: ignore[union-attr]
        optimizer.step()
    changed = 0
    for u in one.units:
        slope = u.reduce(lambda n: gradients[n].reshape(weights.value(n).shape))
        dropped = before[u.name] & ~one.kept[u.name]
        grown = ~before[u.name] & one.kept[u.name]
        assert int(dropped.sum()) == int(grown.sum())
        changed += int(grown.sum())
        stayed, never = before[u.name] & one.kept[u.name], ~before[u.name] & ~one.kept[u.name]
        if dropped.any() and never.any() and stayed.any():
            assert slope[grown].min() >= slope[never].max()
        assert not weights.value(u.name)[u.expand(grown)[u.name]].any()  # what grows starts at zero
    assert changed
    go_on(pruner, optimizer, "cnn", 4, 13)
    assert one.sparsity() == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("pattern", ["1xchannel", "channel"])
def test_soft_masks_let_what_is_masked_come_back(pattern: str) -> None:
    stage = {
        "method": "soft_mask",
        "pattern": pattern,
        "target": 0.5,
        "schedule": {"start": 0, "end": 30, "every": 1, "ramp": "linear", "initial": 0.49},
    }
    model = NETS["cnn"][0]()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=40).attach(optimizer)
    (one,) = pruner.prunings
    first = {n: k.clone() for n, k in one.kept.items()}
    go_on(pruner, optimizer, "cnn", 0, 25)
    assert any(bool((~first[n] & k).any()) for n, k in one.kept.items())


def test_rewinding_puts_weights_back() -> None:
    stage = {"target": 0.5, "rewind": 2, "schedule": {"ramp": "oneshot", "start": 6}}
    model = NETS["cnn"][0]()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=20).attach(optimizer)
    go_on(pruner, optimizer, "cnn", 0, 2)
    wanted = {n: p.detach().clone() for n, p in model.named_parameters()}
    go_on(pruner, optimizer, "cnn", 2, 6)
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert not optimizer.state
    go_on(pruner, optimizer, "cnn", 6, 8)
    assert not all(torch.equal(p, wanted[n]) for n, p in model.named_parameters())


def test_stages_that_rewind_to_different_steps_are_refused() -> None:
    stages = [{"pattern": p, "target": 0.5, "rewind": r} for p, r in (("element", "start"), ("channel", 3))]
    model = NETS["cnn"][0]()
    with pytest.raises(RecipeError, match="steps 0, 3"):
        Pruner(model, batch("cnn", -1, 2)[0], stages, steps=20)
    assert not any("parametrizations" in n for n, _ in model.named_parameters())


def test_of_updates_in_every_step_that_take_no_more_only_some_are_written_down() -> None:
    said: list[str] = []
    stage = {"method": "straight_through", "schedule": {"ramp": "linear", "initial": 0.5, "end": 24}, "pattern": "2:4"}
    model = NETS["cnn"][0]()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=30, progress=said.append).attach(optimizer)
    go_on(pruner, optimizer, "cnn", 0, 30)
    assert [row.step for row in pruner.rows] == [0, 10, 20, 24] and len(said) == 4


def test_progressive_pruning_fades_what_goes() -> None:
    stage = {
        "pattern": "1xchannel",
        "target": 0.5,
        "progressive": 3,
        "schedule": {"ramp": "linear", "start": 0, "end": 16, "every": 8},
    }
    model = NETS["cnn"][0]()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = Pruner(model, batch("cnn", -1, 2)[0], stage, steps=40).attach(optimizer)
    seen = []
    for number in range(24):
        go_on(pruner, optimizer, "cnn", number, number + 1)
        seen.append(pruner.sparsity())
    assert len(set(seen)) > 5  # more stages than the two updates
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(seen))
    (one,) = pruner.prunings
    assert seen[-1] == pytest.approx(one.sparsity(), abs=1e-6)
    _, difference = finished(pruner, "cnn")
    assert difference < 1e-5


@pytest.mark.parametrize("method", ["magnitude", "l0"])
def test_a_target_on_the_clock_is_met_by_measuring(counted: type, method: str) -> None:
    model = nn.Sequential(*(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    stage = {"method": method, "pattern": "ffn", "target": {"speedup": 2.0}, "schedule": {"end": 4, "every": 1}}
    reference = copy.deepcopy(model)
    pruner = Pruner(model, torch.randn(2, 64), stage, steps=6, backend="torch").attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    rows = pruner.rows
    assert all(row.predicted is not None and row.measured is None for row in rows[1:-1])
    predicted = [row.predicted for row in rows[1:] if row.predicted is not None]
    assert predicted == sorted(predicted) and predicted[-1] > 1.5 > predicted[0]
    assert rows[-1].measured == pytest.approx(2.0, rel=0.05) and "measured 2.0" in rows[-1].line()
    other = Pruner(copy.deepcopy(reference), torch.randn(2, 64), stage, steps=6, backend="torch")
    other.load_state_dict(pruner.state_dict())
    assert other.rows == rows and other.finish().report.clocked == other.prunings[0].clocked
    result = pruner.finish()
    assert result.report.clocked is not None and result.report.clocked == other.prunings[0].clocked
    assert result.report.clocked.measured == rows[-1].measured
    assert "speed-up requested 2.00" in str(result.report)


def test_stages_that_say_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="say what to reach"):
        train("cnn", {"method": "magnitude"})
    with pytest.raises(RecipeError, match="there is nothing to do"):
        train("cnn", [])
