"""What cannot be reached is refused before anything is trained, and nothing is left on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune import Pruner
from fxprune.errors import FxpruneError, RecipeError, TargetError

RAMP = {"end": 6}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in "abc")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.last(x)


CASES: dict[str, tuple[Any, dict[str, Any], type[FxpruneError], str]] = {
    "above max_sparsity": (
        {"target": 0.99},
        {},
        TargetError,
        r"a sparsity of 0.99 of 'element' cannot be reached: .* raise max_sparsity",
    ),
    "above a max_sparsity of one's own": (
        {"pattern": "channel", "target": 0.75, "max_sparsity": 0.5},
        {},
        TargetError,
        r"a sparsity of 0.75 of 'channel' cannot be reached: with at most 0.5 of each layer",
    ),
    "above what one unit for each layer leaves": (
        {"pattern": "channel", "target": 0.96, "max_sparsity": 1.0, "scope": "local"},
        {},
        TargetError,
        r"one unit left where one is needed it is 0.9375",
    ),
    "macs below the smallest widths": (
        {"pattern": "channel", "target": {"macs": 0.001}},
        {},
        TargetError,
        r"macs",
    ),
    "params below the smallest widths": ({"pattern": "channel", "target": {"params": 0.01}}, {}, TargetError, "params"),
    "macs below the model without branches": (
        {"pattern": "layer", "target": {"macs": 0.01}},
        {"model": Residual},
        TargetError,
        r"macs 0.01 cannot be reached: without all branches it is 0.1",
    ),
    "a schedule that outlives the run": (
        {"target": 0.5, "schedule": {"end": 20}},
        {"steps": 10},
        RecipeError,
        "its last update is before step 20, and the run has 10 steps",
    ),
    "a schedule that ends a step behind the run": (
        {"target": 0.5, "schedule": {"end": 11}},
        {"steps": 10},
        RecipeError,
        "its last update is before step 11, and the run has 10 steps",
    ),
    "a schedule without an end": ({"target": 0.5, "schedule": {}}, {}, RecipeError, "without an `end`, pass `steps`"),
    "a schedule that goes backwards": (
        {"target": 0.5, "schedule": {"start": 5, "end": 2}},
        {},
        RecipeError,
        "it goes from step 5 to step 2, which is before",
    ),
    "epochs of unknown length": (
        {"target": 0.5, "schedule": {"end": 2, "unit": "epoch"}},
        {"steps": 10},
        RecipeError,
        "the unit is epochs: pass `steps_per_epoch`",
    ),
    "n:m and a sparsity": (
        {"pattern": "2:4", "target": 0.8},
        {},
        RecipeError,
        "2:4 is a sparsity of 0.5; a target says nothing more",
    ),
    "n:m and a cost": (
        {"pattern": "2:4", "target": {"macs": 0.5}},
        {},
        RecipeError,
        "2:4 is a sparsity of 0.5; a target says nothing more",
    ),
    "n:m and something else": (
        {"pattern": ["2:4", "channel"]},
        {},
        RecipeError,
        "n:m does not mix with other patterns in one stage",
    ),
    "a cost of single weights": (
        {"target": {"macs": 0.5}},
        {},
        RecipeError,
        "a target macs is one of widths, heads or layers; pattern element takes target",
    ),
    "a speedup by layers": (
        {"pattern": "layer", "target": {"speedup": 2}},
        {"model": Residual},
        RecipeError,
        "the pattern 'layer' takes targets sparsity, macs, params and memory",
    ),
    "no target": ({"pattern": "channel"}, {}, RecipeError, "say what to reach"),
    "two targets": ({"target": {"macs": 0.5, "params": 0.5}}, {}, RecipeError, "exactly one of .* not macs and params"),
    "bounds that cross": (
        {"target": 0.5, "min_sparsity": 0.6, "max_sparsity": 0.5},
        {},
        RecipeError,
        "min_sparsity is above max_sparsity",
    ),
    "a stream where there is none": ({"pattern": "hidden", "target": 0.5}, {}, RecipeError, "'hidden' fits nothing"),
    "heads where there are none": ({"pattern": "head", "target": 0.5}, {}, RecipeError, "'head' fits nothing"),
    "layers where none can go": ({"pattern": "layer", "target": 0.5}, {}, RecipeError, "'layer' fits nothing"),
    "blocks that do not fit": ({"pattern": "7x3", "target": 0.5}, {}, RecipeError, "'7x3' fits nothing"),
    "everything left out": ({"target": 0.5, "exclude": ["*"]}, {}, RecipeError, "'element' fits nothing"),
    "a layer that is not there": (
        {"target": 0.5, "include": ["layer9.*"]},
        {},
        RecipeError,
        r"include: the model has no layer or parameter 'layer9\.\*'",
    ),
    "an exception that is not there": (
        {"target": 0.5, "exclude": ["0.wieght"]},
        {},
        RecipeError,
        r"exclude: the model has no layer or parameter '0.wieght'.*0.weight",
    ),
    "a method for something else": (
        {"method": "mask_learning", "pattern": "channel", "target": 0.5},
        {},
        RecipeError,
        "'mask_learning' is for n:m, not for pattern 'channel'",
    ),
    "an option that is not there": (
        {"method": {"name": "movement", "learning_rate": 1}, "target": 0.5},
        {},
        RecipeError,
        "training method 'movement' has no option 'learning_rate'",
    ),
    "a method that is not there": ({"method": "magnitud", "target": 0.5}, {}, RecipeError, "magnitude"),
    "a pattern that is not there": ({"pattern": "chanel", "target": 0.5}, {}, RecipeError, "channel"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_before_training(name: str) -> None:
    stage, options, error, message = CASES[name]
    options = dict(options)
    net = options.pop("model", network)()
    with pytest.raises(error, match=message):
        Pruner(net, torch.randn(2, 8), {"schedule": RAMP} | stage if "schedule" not in stage else stage, **options)
    assert not any(parametrize.is_parametrized(m) for m in net.modules())


def test_a_schedule_without_an_end_is_half_of_the_run() -> None:
    pruner = Pruner(network(), torch.randn(2, 8), {"target": 0.5}, steps=10)
    assert pruner.prunings[0].schedule.end == 5


def test_the_second_stage_is_looked_at_before_the_first_masks_anything() -> None:
    net = network()
    stages = [
        {"target": 0.5, "schedule": RAMP, "include": ["0"]},
        {"target": 0.99, "schedule": RAMP, "include": ["2"]},
    ]
    with pytest.raises(TargetError, match="cannot be reached"):
        Pruner(net, torch.randn(2, 8), stages)
    assert not any(parametrize.is_parametrized(m) for m in net.modules())
