"""`sweep`: several targets in one go give what each alone gives; what cannot be reached does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import InputError, RecipeError, SavedModelError, TargetError
from fxprune.sweep import INDEX, points


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(32, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
TARGETS = [{"macs": 0.75}, {"macs": 0.5}, {"params": 0.4}]


def closeness(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(DATA[0]) - net()(DATA[0])).square().mean())


@pytest.mark.parametrize("data", [None, DATA])
@pytest.mark.parametrize("criterion", ["auto", "random"])
def test_each_is_what_compile_gives_alone(data: Any, criterion: str) -> None:
    found = fxprune.sweep(net(), X, TARGETS, {"criterion": criterion}, calibration=data, seed=3)
    assert list(found.results) == ["macs=0.75", "macs=0.5", "params=0.4"] and not found.failed
    for target, pruned in zip(TARGETS, found.results.values(), strict=True):
        alone = fxprune.compile(net(), X, {"criterion": criterion, "target": target}, calibration=data, seed=3)
        assert pruned.plan == alone.plan
        assert pruned.report.error == alone.report.error
        for name, tensor in alone.module.state_dict().items():
            assert torch.equal(tensor, pruned.module.state_dict()[name]), name


@pytest.mark.usefixtures("counted")
def test_what_is_common_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture, one scoring and one measurement of the parts, whatever the number of targets."""
    from fxprune import choosing
    from fxprune.passes import choose, meet

    done: list[str] = []

    def noted(place: Any, name: str) -> None:
        original = getattr(place, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, call)

    noted(choosing, "capture")
    noted(choose, "score")
    noted(meet, "tables")
    targets = [{"speedup": 1.2}, {"speedup": 1.5}, {"macs": 0.5}]
    fxprune.sweep(net(), X, targets, calibration=DATA, backend="torch", threads=1)
    assert sorted(done) == ["capture", "score", "tables"]


def test_a_target_out_of_reach_is_told_and_the_others_are_there() -> None:
    found = fxprune.sweep(net(), X, [{"macs": 0.5}, {"macs": 0.001}], floor=0.2)
    assert list(found.results) == ["macs=0.5"]
    assert "cannot be reached" in found.failed["macs=0.001"]
    with pytest.raises(TargetError, match="cannot be reached"):
        fxprune.sweep(net(), X, [{"macs": 0.001}], floor=0.2)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], RecipeError, "a sweep takes targets"),
        ([{"macs": 0.5}, {"macs": 0.5}], RecipeError, "a target is there twice: macs=0.5, macs=0.5"),
        ([{"macs": 0.5}, {"dead": True}], RecipeError, "target dead removes what is dead"),
        ([{"macs": 0.5}, {"max_drop": 0.1}], RecipeError, "target max_drop takes `metric`"),
        ([{"macs": 0.5}, {"macs": 2}], RecipeError, "macs"),
        ([{"macs": 0.5, "params": 0.5}], RecipeError, "exactly one"),
    ],
)
def test_targets_that_make_no_sense(targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fxprune.sweep(net(), X, targets)


def test_the_dense_models_metric_is_taken_once() -> None:
    dense = net()
    asked: list[bool] = []

    def metric(model: nn.Module) -> float:
        asked.append(model is dense)
        return closeness(model)

    fxprune.sweep(dense, X, [*TARGETS, {"max_drop": 1.0}], metric=metric)
    assert sum(asked) == 1 and len(asked) > 4


def test_a_metric_that_fails_stops_all() -> None:
    with pytest.raises(InputError, match="the metric gives"):
        fxprune.sweep(net(), X, TARGETS, metric=lambda m: float("nan"))


def test_measured_together_and_saved(tmp_path: Path) -> None:
    found = fxprune.sweep(net(), X, [*TARGETS, {"max_drop": 10.0}], calibration=DATA, metric=closeness)
    found.measure(backend="torch", threads=1, rounds=6)
    times = [pruned.report.latency[0] for pruned in found.results.values()]
    assert len({t.milliseconds.dense for t in times}) == 1  # all in one run
    assert all(t.backend == "torch" and t.rounds == 6 and t.batch == 8 for t in times)
    place = found.save(tmp_path / "front")
    index = json.loads((place / INDEX).read_text())
    assert index["models"]["macs=0.5"] == "macs-0.5" and index["failed"] == {}
    for name, folder in index["models"].items():
        assert torch.equal(fxprune.load(place / folder)(X), found.results[name].module(X))
    with pytest.raises(SavedModelError, match="holds a sweep; pass overwrite=True"):
        found.save(place)
    found.save(place, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing.txt").write_text("mine")
    with pytest.raises(SavedModelError, match="is no sweep of fxprune"):
        found.save(tmp_path / "other", overwrite=True)
    marks = points({name: pruned.report for name, pruned in found.results.items()})
    assert [m["speedup"] for m in marks] == sorted(m["speedup"] for m in marks) and len(marks) == 4
    assert marks[0]["left"] <= 0


def test_nothing_is_added_up_from_target_to_target() -> None:
    """Notes and seconds are those of one target."""
    found = fxprune.sweep(net(), X, TARGETS, sparsity={"pattern": "2:4", "when": "always"}, calibration=DATA)
    for pruned in found.results.values():
        assert sum("are in the order in which" in note for note in pruned.report.notes) <= 1
    seconds = [pruned.report.seconds for pruned in found.results.values()]
    assert all(s["capture"] == seconds[0]["capture"] for s in seconds)
