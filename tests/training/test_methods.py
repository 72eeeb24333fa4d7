"""Every method on every pattern it takes: the target exactly, a smaller model, the same function as the masked one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fxprune
from fxprune.errors import RecipeError
from fxprune.passes import training
from fxprune.passes.training.units import CountedUnits
from tests.training.nets import CLASSES, Attention, Mlp, finished, train

training.load()
SCHEDULE = {"start": 2, "end": 8, "every": 2}
#: What each kind of method is tried on: (network, pattern, target).
WEIGHTS = [
    ("cnn", "element", 0.8),
    ("cnn", "4x1", 0.5),
    ("transformer", "4x4", 0.5),
    ("transformer", "attention:4x4", 0.75),
    ("cnn", "1xchannel", 0.4),
    ("transformer", "channelx1", 0.4),
]
AXES = [
    ("cnn", "channel", 0.5),
    ("cnn", "filter", {"macs": 0.5}),
    ("transformer", "head", 0.5),
    ("transformer", ("head", "ffn"), {"params": 0.7}),
    ("transformer", "layer", 0.5),
    ("transformer", "layer", {"macs": 0.6}),
]
COUNTED = [("cnn", "2:4", None), ("transformer", "1:4", None)]
BY_KIND = {"any": [WEIGHTS, AXES, COUNTED], "blocks": [WEIGHTS], "axes": [AXES], "n:m": [COUNTED]}
#: Those that go another way to the end, tested by themselves.
APART = {"pattern_lock", "slimming"}


def _cases() -> list[tuple[Any, ...]]:
    """Magnitude with everything, each other method with two cases of each kind that it takes, in turn."""
    cases: list[tuple[Any, ...]] = []
    for number, name in enumerate(sorted(set(training.METHODS.names()) - APART)):
        for kind in BY_KIND[training.METHODS[name].patterns]:
            some = kind if name == "magnitude" else [kind[(2 * number + i) % len(kind)] for i in range(2)]
            cases += [(name, *case) for case in some]
    return cases


CASES = _cases()


@pytest.mark.parametrize(("method", "kind", "pattern", "target"), CASES, ids=lambda v: str(v))
def test_target_size_and_function(method: str, kind: str, pattern: Any, target: Any) -> None:
    pruner = train(kind, {"method": method, "pattern": pattern, "target": target, "schedule": SCHEDULE, "round_to": 1})
    (one,) = pruner.prunings
    if not isinstance(target, dict):
        total = sum(u.size * u.counts for u in one.units)
        largest = max(u.counts for u in one.units) / total
        assert one.sparsity() == pytest.approx(one.target, abs=largest / 2 + 1e-9)
    for u in one.units:
        if isinstance(u, CountedUnits):
            groups = one.kept[u.name].reshape(-1, u.pattern.m).sum(1)
            assert groups.unique().tolist() == [u.pattern.n]
    result, difference = finished(pruner, kind)
    assert difference < 1e-5
    if isinstance(target, dict):
        ((cost, share),) = target.items()
        pair = getattr(result.report, cost)
        assert pair.ratio <= share + 1e-6
    elif pattern in ("element", "4x1", "4x4", "attention:4x4", "2:4", "1:4"):
        zeros = sum(int((~mask).sum()) for mask in result.plan.masks.values())
        assert zeros or result.report.params.ratio < 1
    else:
        assert result.report.params.ratio < 0.95
    for name, mask in result.plan.masks.items():
        assert not result.module.get_parameter(name)[~mask].any()
    assert not any(parametrize.is_parametrized(m) for m in pruner.model.modules())


def test_slimming_is_for_what_norms_scale() -> None:
    pruner = train("cnn", {"method": "slimming", "pattern": "channel", "target": 0.5, "schedule": SCHEDULE})
    (one,) = pruner.prunings
    assert {u.name for u in one.units} == {"0.weight.0", "3.weight.0"}
    assert "8.weight.0" in pruner.unfit()
    result, difference = finished(pruner, "cnn")
    assert difference < 1e-5
    assert sum(g.kept for g in result.plan.groups if g.name in ("0.weight.0", "3.weight.0")) == 24
    with pytest.raises(RecipeError, match="no norm scales any unit of 'ffn'"):
        train("transformer", {"method": "slimming", "pattern": "ffn", "target": 0.5})


@pytest.mark.parametrize("pattern", ["element", "2:4", "4x1"])
def test_a_locked_pattern_stays(pattern: str) -> None:
    from tests.training.nets import cnn

    model = cnn()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                layer.weight[:, ::4] = 0
    zeros = {n: (p == 0) for n, p in model.named_parameters() if p.dim() == 4}
    pruner = train("cnn", {"method": "pattern_lock", "pattern": pattern, "schedule": {"ramp": "oneshot"}}, model=model)
    masked = {u.name for one in pruner.prunings for u in one.units}
    result, difference = finished(pruner, "cnn")
    assert difference < 1e-5
    assert "3.weight" in masked  # the first layer's three channels are no groups of four
    for name, zero in ((n, z) for n, z in zeros.items() if n in masked):
        weight = dict(model.named_parameters())[name]
        assert bool((weight[zero] == 0).all())
        assert bool((weight[~zero] != 0).all())
    assert result.plan.masks or result.report.params.ratio < 1


def test_an_unknown_method_or_option_is_named() -> None:
    with pytest.raises(RecipeError, match="no training method is called 'movment'; did you mean 'movement'"):
        train("cnn", {"method": "movment", "target": 0.5})
    with pytest.raises(RecipeError, match="has no option 'lrr'; did you mean 'lr'"):
        train("cnn", {"method": {"name": "movement", "lrr": 1}, "target": 0.5})
    with pytest.raises(RecipeError, match="there is no pattern 'chanel'; did you mean 'channel'"):
        train("cnn", {"pattern": "chanel", "target": 0.5})
    with pytest.raises(RecipeError, match="training method 'l0' is for axes, not for pattern 'element'"):
        train("cnn", {"method": "l0", "pattern": "element", "target": 0.5})


def test_two_prunings_beside_each_other() -> None:
    pruner = train(
        "transformer",
        [
            {"pattern": "head", "target": 0.5, "schedule": SCHEDULE},
            {"pattern": "2:4", "schedule": SCHEDULE, "include": "*.up"},
        ],
    )
    result, difference = finished(pruner, "transformer")
    assert difference < 1e-5
    assert sorted(result.plan.masks) == ["2.up.weight", "4.up.weight"]
    assert sum(len(g.heads) for g in result.plan.groups if g.kind == "heads") == HEADS_LEFT
    again = fxprune.compile(pruner.model, torch.randn(2, 5, 3), plan=result.plan)
    assert torch.equal(again.module.get_parameter("2.up.weight"), result.module.get_parameter("2.up.weight"))


HEADS_LEFT = 4


def _wide() -> nn.Module:
    """Heads of 32 dimensions, as block movement's blocks of 32 x 32 want them."""
    torch.manual_seed(0)
    blocks = (Attention(64, 2), Mlp(64), Attention(64, 2), Mlp(64))
    return nn.Sequential(nn.Linear(3, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, CLASSES))


@pytest.mark.parametrize("pattern", ["hybrid", "hybrid-filled", "struct"])
def test_the_three_ways_of_block_movement(pattern: str) -> None:
    stage = {"method": "movement", "pattern": pattern, "target": 0.5, "schedule": SCHEDULE}
    pruner = train("transformer", stage, model=_wide())
    kinds = {u.kind for u in pruner.prunings[0].units}
    assert kinds == ({"head", "ffn"} if pattern == "struct" else {"attention:32x32", "ffn"})
    result, difference = finished(pruner, "transformer")
    assert sum(g.kept for g in result.plan.groups if g.role == "ffn") <= 128  # half of the inner widths
    zeros = sum(int((p == 0).sum()) for n, p in result.module.named_parameters() if n.endswith("weight"))
    if pattern == "hybrid":
        assert result.plan.masks
        assert zeros >= 32 * 32
    else:
        assert not result.plan.masks
        assert not zeros
    assert difference < (1.0 if pattern == "hybrid-filled" else 1e-5)


def test_masks_survive_saving(tmp_path: Any) -> None:
    result, _ = finished(train("cnn", {"pattern": "2:4", "schedule": SCHEDULE}), "cnn")
    result.save(tmp_path / "m")
    from fxprune.saved import load_pruned

    loaded = load_pruned(tmp_path / "m")
    assert loaded.plan.masks == result.plan.masks
    locked = loaded.lock()
    locked(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.optim.SGD(locked.parameters(), 0.1).step()
    module = loaded.unlock()
    for name, mask in loaded.plan.masks.items():
        assert not module.get_parameter(name)[~mask].any()


def test_hidden_widths_are_said_to_differ() -> None:
    pruner = train("transformer", {"pattern": "hidden", "target": 0.5, "schedule": SCHEDULE})
    result = pruner.finish()
    assert any("norms counted what was masked as zeros" in note for note in result.report.notes)
    assert result.report.macs.ratio < 0.6
