"""The same again: a saved recipe with the same data and seed gives the same plan and weights, to the bit."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxprune
from fxprune import cli
from fxprune.passes.choose import exact
from fxprune.provenance import fingerprint
from fxprune.recipe import Recipe, read_recipe
from fxprune.saved import RECIPE, load_pruned


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
RECIPES: list[tuple[dict[str, Any], bool]] = [
    ({"target": {"macs": 0.5}}, False),
    ({"target": {"params": 0.4}, "criterion": "random", "seed": 7, "round_to": 4}, False),
    ({"target": {"macs": 0.4}}, True),
    ({"target": {"memory": 0.8}, "allocation": "evolution", "seed": 5}, True),
    ({"target": {"macs": 0.6}, "sparsity": {"pattern": "2:4", "when": "always"}, "ratios": {"0": {"min": 0.5}}}, True),
    ({"target": {"macs": 0.6}, "reconstruction": {"name": "least_squares", "tune": 1}, "keep": ["7"]}, True),
]


@pytest.mark.parametrize(("recipe", "data"), RECIPES)
def test_the_saved_recipe_gives_the_same_to_the_bit(recipe: dict[str, Any], data: bool, tmp_path: Path) -> None:
    given = DATA if data else None
    first = fxprune.compile(net(), X, recipe, calibration=given)
    first.save(tmp_path / "first")
    again = fxprune.compile(net(), X, tmp_path / "first" / RECIPE, calibration=given)
    assert again.plan.kept == first.plan.kept and again.plan.masks == first.plan.masks
    assert again.plan.groups == first.plan.groups
    assert again.report.recipe == first.report.recipe  # nothing was left open that would be filled in differently
    assert again.report.made.data == first.report.made.data
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


@pytest.mark.usefixtures("counted")
def test_a_plan_gives_the_same_where_the_clock_decided(tmp_path: Path) -> None:
    first = fxprune.compile(net(), X, target={"speedup": 1.5}, backend="torch", threads=1, calibration=DATA)
    place = first.save(tmp_path / "first")
    assert "--plan plan.json" in (place / RECIPE).read_text()
    again = fxprune.compile(net(), X, plan=load_pruned(place).plan, calibration=DATA)
    assert again.plan.kept == first.plan.kept
    for name, tensor in first.module.state_dict().items():
        assert torch.allclose(tensor, again.module.state_dict()[name], atol=1e-6), name


def test_what_was_left_open_is_written_out() -> None:
    with_data = exact(read_recipe({"target": {"macs": 0.5}}), True)
    assert (with_data.criterion, with_data.allocation, with_data.reconstruction, with_data.basis) == (
        "obs",
        "knapsack",
        "least_squares",
        "principal",
    )
    without = exact(read_recipe({"target": {"macs": 0.5}}), False)
    assert (without.criterion, without.allocation, without.reconstruction, without.basis) == (
        "magnitude",
        "uniform",
        "none",
        "none",
    )
    assert without.round_to and without.threads
    named = exact(read_recipe({"target": {"macs": 0.5}, "criterion": {"name": "magnitude", "p": 1}}), True)
    assert named.criterion == {"name": "magnitude", "p": 1}
    assert not {k for k, v in without.model_dump().items() if v == "auto"}
    assert exact(without, False) == without and isinstance(without, Recipe)


def test_where_it_comes_from_is_said(tmp_path: Path) -> None:
    made = fxprune.compile(net(), X, target={"macs": 0.5}, calibration=DATA).save(tmp_path / "small")
    report = load_pruned(made).report
    assert report.made.data == fingerprint([([x], None) for x in DATA])
    assert report.made.versions["torch"] == torch.__version__.partition("+")[0] or report.made.versions["torch"]
    text = (made / RECIPE).read_text()
    assert f"calibration data {report.made.data} (48 samples)" in text and "criterion: obs" in text
    others = [*DATA[:2], DATA[2] + 1e-6]
    assert fingerprint([([x], None) for x in others]) != report.made.data


NETS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval(), torch.randn(4, 16)

DATA = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]

def score(model):
    return -float(sum(model(x).square().mean() for x in DATA))
"""


def test_the_command_line_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints as `again` runs, in a process of its own, and makes the same plan and weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    flags = ["--target", "macs=0.5", "--calibration", "nets.py:DATA", "--metric", "nets.py:score", "--no-measure"]
    run = CliRunner().invoke(
        cli.app, ["compile", "nets.py:net", *flags, "--seed", "4", "--out", "a small one", "--json"]
    )
    assert run.exit_code == 0, run.stderr
    command = json.loads(run.stdout)["commands"]["again"]
    words = shlex.split(command)
    assert words[:3] == ["fxprune", "compile", "nets.py:net"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--no-measure"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, again = load_pruned(tmp_path / "a small one"), load_pruned(tmp_path / "a small one-again")
    assert first.plan.kept == again.plan.kept
    assert first.report.metric == again.report.metric
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])
