"""A family of ever faster models: each made from the one before, all said of the dense one."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Pruned
from fxprune.errors import InputError, RecipeError

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
SPEEDUPS = (1.5, 2.5, 4.0)


class Residual(nn.Module):
    """Two blocks that add to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


@pytest.fixture
def clock(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the tests for measured reports, too."""
    from fxprune.passes import meet

    monkeypatch.setattr("fxprune.measure.compare", meet.compare)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def run(
    tune: Any = lambda module, teacher, rung: None,
    speedups: Any = SPEEDUPS,
    model: nn.Module | None = None,
    **more: Any,
) -> list[Pruned]:
    given = {"calibration": [X[:32], X[32:]], "backend": "torch", "threads": 1, "round_to": 1} | more
    return fxprune.ladder(model or network(), X[:4], speedups, tune, **given)


@pytest.mark.usefixtures("clock")
def test_every_rung_is_as_fast_as_asked_for_and_smaller_than_the_one_before() -> None:
    family = run()
    found = [pruned.report.latency[-1].speedup for pruned in family]
    assert found == pytest.approx(SPEEDUPS, rel=0.1)
    sizes = [sum(p.numel() for p in pruned.module.parameters()) for pruned in family]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.usefixtures("clock")
def test_plans_and_reports_are_of_the_dense_model() -> None:
    dense = network()
    whole = sum(p.numel() for p in dense.parameters())
    family = run(model=dense)
    for pruned in family:
        left = sum(p.numel() for p in pruned.module.parameters())
        assert (pruned.report.params.dense, pruned.report.params.pruned) == (whole, left)
        assert pruned.plan.costs["params"] == (whole, left)
        again = pruned.module_like()
        assert type(again) is Residual
        assert torch.allclose(again(X), pruned.module(X), atol=1e-5)
    for earlier, later in pairwise(family):
        for name, table in earlier.plan.kept.items():
            for dim, indices in table.items():
                assert set(later.plan.kept[name][dim]) <= set(indices), name
    assert not any("cannot be said" in note for pruned in family for note in pruned.report.notes)
    assert "1.5" in family[1].report.notes[-1]


@pytest.mark.usefixtures("clock")
def test_a_rung_is_made_from_what_tuning_left_of_the_one_before() -> None:
    dense = network()
    before = copy.deepcopy(dense.state_dict())
    seen: list[tuple[int, bool, bool]] = []
    begun: list[float] = []

    def tune(module: nn.Module, teacher: nn.Module, rung: int) -> None:
        seen.append((rung, teacher.training, any(p.requires_grad for p in teacher.parameters())))
        assert all(torch.equal(p, before[n]) for n, p in teacher.state_dict().items())
        with torch.no_grad():
            begun.append(float(module.get_parameter("head.bias")[0]))
            module.get_parameter("head.bias").fill_(rung + 1.0)

    family = run(tune, model=dense, reconstruction="none")
    assert begun[1:] == [1.0, 2.0]
    assert seen == [(0, False, False), (1, False, False), (2, False, False)]
    biases = [pruned.module.get_parameter("head.bias").detach() for pruned in family]
    assert [sorted(set(bias.tolist())) for bias in biases] == [[1.0], [2.0], [3.0]]
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.usefixtures("clock")
def test_an_interrupted_family_goes_on_with_the_rung_that_it_was_at(tmp_path: Path) -> None:
    dense = network()
    metric = lambda model: -float((model(X) - dense(X)).square().mean())  # noqa: E731
    whole, folder = run(model=dense, metric=metric), tmp_path / "family"

    def stops(module: nn.Module, teacher: nn.Module, rung: int) -> None:
        if rung == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stops, model=dense, directory=folder)
    assert sorted(place.name for place in folder.iterdir()) == ["1.5x", "2.5x"]
    rungs: list[int] = []
    family = run(lambda module, teacher, rung: rungs.append(rung), model=dense, directory=folder, metric=metric)
    assert rungs == [2]
    assert [pruned.plan.kept for pruned in family] == [pruned.plan.kept for pruned in whole]
    assert family[-1].report.metric is not None and family[-1].report.metric == whole[-1].report.metric
    for pruned in family:
        assert torch.allclose(pruned.module_like()(X), pruned.module(X), atol=1e-5)
    (folder / "4x" / "graph.json").write_text("{}")  # what is damaged is made anew
    run(lambda module, teacher, rung: rungs.append(rung), model=dense, directory=folder)
    assert rungs == [2, 2]


def test_what_makes_no_sense_is_refused_before_anything_runs() -> None:
    for speedups, text in (
        ((), "none do not"),
        ((1.0, 2.0), "1, 2 do not"),
        ((2.0, 2.0), "ascend"),
        ((3, 2), "ascend"),
    ):
        with pytest.raises(RecipeError, match=text):
            run(speedups=speedups)
    with pytest.raises(RecipeError, match="leave `target` out"):
        run(target={"macs": 0.5})


@pytest.mark.usefixtures("clock")
def test_a_metric_that_is_no_number_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="the metric gives"):
        run(metric=lambda model: float("nan"))
