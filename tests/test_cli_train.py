"""`fxprune train`: a recipe and a task in, a saved model out; what is wrong is said with its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import fxprune
from fxprune import cli
from fxprune.passes import training
from fxprune.passes.training.find import known_patterns
from fxprune.training.optimizers import FALLS, OPTIMIZERS

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

TASK = """
import torch
from torch import nn

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Small:
    dynamic = None
    example = (X[:4],)

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()

    def training(self, batch, number, seed=0):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed + number))
        return [((X[rows],), Y[rows]) for rows in order.split(batch)]

    def loss(self, output, labels):
        return nn.functional.cross_entropy(output, labels)

    def score(self, model):
        return float((model(X).argmax(1) == Y).double().mean())

    def calibration(self, samples, seed=0):
        return self.training(16, seed)


small = Small()
number = 3
"""
RECIPE = """
optimizer: {lr: 0.01}
proof: quick
batch: 16
stages:
  - prune: {pattern: channel, target: 0.5, schedule: {end: 1, unit: epoch}}
    epochs: 2
  - tune:
    epochs: 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a task and a recipe."""
    (tmp_path / "small.py").write_text(TASK)
    (tmp_path / "train.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("fxprune_model_small", None)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["train", *(str(a) for a in arguments)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def test_a_recipe_is_trained_and_saved(folder: Path) -> None:
    options = ["train.yaml", "--task", "small.py:small", "--out", "small", "--no-measure", "--log", "log"]
    said = run(*options).stdout
    assert "stage 1, prune magnitude channel: taken; 8 steps" in said and "proved: pruned equals masked dense" in said
    assert "again  fxprune train train.yaml --task small.py:small --out small-again" in said
    module = fxprune.load("small")
    assert module.get_parameter("0.weight").shape == (16, 8)
    assert (folder / "log" / "training.csv").read_text().count("\n") == 17
    assert (folder / "small" / "train.yaml").read_text() == RECIPE
    assert not (folder / "small.run").exists()
    run(*options, code=9)
    again = json.loads(run(*options, "--overwrite", "--json").stdout)
    assert again["report"]["metric"]["pruned"] > again["report"]["metric"]["dense"]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fxprune.load("small").parameters(), strict=True))


def test_options_override_the_recipe(folder: Path) -> None:
    options = ["train.yaml", "--task", "small.py:small", "--no-measure", "--json"]
    short = json.loads(run(*options, "--out", "a", "--epochs", 2, "--batch", 8).stdout)
    steps = [step["why"] for step in short["report"]["steps"]]
    assert steps[:2] == ["8 steps", "8 steps"]
    seeded = json.loads(run(*options, "--out", "b", "--seed", 5, "--threads", 1, "--backend", "torch").stdout)
    assert seeded["report"]["recipe"]["seed"] == 5 and seeded["report"]["recipe"]["backend"] == "torch"


def test_a_run_that_was_stopped_goes_on(folder: Path) -> None:
    """The loss fails in the third epoch; without the fault the run ends as one that had none."""
    options = ["train.yaml", "--no-measure", "--task", "small.py:small"]
    run(*options, "--out", "straight")
    broken = TASK.replace("return nn.f", "Small.calls = getattr(Small, 'calls', 0) + 1\n        return nn.f").replace(
        "labels)\n\n    def score", "labels) * (float('nan') if Small.calls == 10 else 1)\n\n    def score"
    )
    (folder / "broken.py").write_text(broken)
    stopped = run("train.yaml", "--no-measure", "--task", "broken.py:small", "--out", "small", code=7)
    assert "the loss is NaN" in stopped.stderr and "small.run" in stopped.stderr
    run(*options, "--out", "small", "--resume")
    first, second = (fxprune.load(folder / name).state_dict() for name in ("straight", "small"))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert "there is no" in run(*options, "--out", "other", "--resume", code=3).stderr


def test_onnx_and_eight_bits(folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    (folder / "train.yaml").write_text(RECIPE + "  - quantize: {when: always}\n")
    said = run(
        *("train.yaml", "--task", "small.py:small", "--out", "small", "--onnx", "small.onnx", "--no-measure"),
        *("--calibration", 32),
    ).stdout
    assert "quantization int8: taken" in said
    assert (folder / "small.onnx").is_file() and (folder / "small" / "int8.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train.yaml", "--out", "x"], 2, "there is no --task"),
        ([], 2, "there is no RECIPE, no --task, no --out"),
        (["none.yaml", "--task", "small.py:small", "--out", "x"], 2, "the training recipe none.yaml cannot be read"),
        (["train.yaml", "--task", "small.py:smal", "--out", "x"], 3, "did you mean 'small'?"),
        (["train.yaml", "--task", "small.py:number", "--out", "x"], 3, "is of type int, which has no model, example"),
        (["train.yaml", "--task", "nothing", "--out", "x"], 3, "there is no task 'nothing'"),
        (["train.yaml", "--task", "small.py:small", "--out", "x", "--onnx", "y"], 3, "must end in .onnx"),
        (["train.yaml", "--task", "small.py:small", "--out", "small.py"], 9, "is not a model that fxprune saved"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], code: int, message: str, folder: Path) -> None:
    result = run(*arguments, code=code)
    assert message in " ".join(result.stderr.split())
    assert not (folder / "x").exists()


def test_the_list_has_every_name(folder: Path) -> None:
    found: dict[str, Any] = json.loads(run("--list", "--json").stdout)
    assert list(found["methods"]) == training.METHODS.names()
    assert list(found["ramps"]) == training.RAMPS.names()
    assert set(found["patterns"]) == set(known_patterns())
    assert (list(found["optimizers"]), list(found["schedules"])) == (OPTIMIZERS.names(), FALLS.names())
    assert all(method["about"] for method in found["methods"].values())
    said = run("--list").stdout
    assert all(name in said for name in [*training.METHODS, *training.RAMPS, *OPTIMIZERS])


def test_a_task_of_the_benchmarks_is_found_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.tasks import TASKS, digits

    widths = digits.Settings(widths=(4, 8, 8), epochs=1, batch=128)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setitem(TASKS, "digits_resnet", digits.task(widths))
    monkeypatch.chdir(ROOT)
    (folder / "short.yaml").write_text(
        "proof: quick\nbatch: 128\nsteps: 4\nstages:\n  - prune: {pattern: channel, target: {macs: 0.5}, round_to: 1}\n"
    )
    said = run(folder / "short.yaml", "--task", "digits_resnet", "--out", folder / "digits", "--no-measure", "--json")
    report = json.loads(said.stdout)["report"]
    assert report["macs"]["pruned"] <= 0.5 * report["macs"]["dense"]
    assert "did you mean 'digits_resnet'?" in run(
        folder / "short.yaml", "--task", "digits_resnett", "--out", folder / "x", code=3
    ).stderr.replace("\n", " ")
