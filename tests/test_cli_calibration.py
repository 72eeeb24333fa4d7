"""Calibration on the command line: every form of data, losses and metrics, and every error, in one line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import fxprune
from fxprune import cli
from fxprune.data import READERS, Data, read_data
from fxprune.report import Attempt, Clocked
from fxprune.saved import load_pruned
from fxprune.sources import Source

TASK = """
import torch
from torch import nn
from torch.nn import functional

torch.manual_seed(1)
X, Y = torch.randn(21, 8), torch.randint(0, 4, (21,))
batches = [(X[:10], Y[:10]), (X[10:], Y[10:])]
number, word = 3, "word"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)))


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 32), nn.Linear(32, 4)

    def forward(self, ids):
        return self.head(torch.relu(self.table(ids)))


def net():
    return Net(), torch.randn(4, 8)


def ids():
    return Ids(), {"ids": torch.randint(0, 10, (2, 5))}


def loader():
    yield from batches


def drawn():
    return [torch.randn(5, 8)]


def empty():
    return []


def breaks():
    yield X
    raise ValueError("the disk is full")


def nothing():
    pass


def loss(output, labels):
    return functional.cross_entropy(output, labels)


def accuracy(model):
    assert type(model) is Net or "graph" in type(model).__module__.lower()
    return (model(X).argmax(1) == Y).float().mean()


def fails(model):
    raise ValueError("no test set")


def infinite(model):
    return float("inf")


unknown = [{"ids": torch.full((2, 5), 99)}]
"""
FLAGS = "--no-measure", "--proof", "quick", "--round-to", "1", "--out", "small", "--overwrite"
HALF = "--target", "macs=0.5"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with task.py and a file of every kind in it."""
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(21, 8), torch.randint(0, 4, (21,))
    torch.save(x, "x.pt")
    torch.save((x, y), "xy.pth")
    torch.save({"y": y, "x": x}, "dict.pt")
    torch.save([(x[:10], y[:10]), (x[10:], y[10:])], "list.pt")
    np.save("x.npy", x.double().numpy())
    np.savez("xy.npz", y=y.numpy(), x=x.numpy())
    save_file({"y": y, "x": x}, "xy.safetensors")
    save_file({"images": x}, "one.safetensors")
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("task", "fxprune_model_task"):
        sys.modules.pop(name, None)


def run(*arguments: str, model: str = "task.py:net", code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["compile", model, *FLAGS, *arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


# ---------------------------------------------------------------------- forms
@pytest.mark.parametrize(
    ("what", "shown", "samples"),
    [
        ("task.py:loader", "2 batches, the first 10x8 float32, 10 int64", 21),
        ("task:loader", "2 batches, the first 10x8 float32, 10 int64", 21),
        ("task.py:batches", "2 batches, the first 10x8 float32, 10 int64", 21),
        ("task.py:X", "6 batches, the first 4x8 float32", 21),
        ("x.pt", "6 batches, the first 4x8 float32", 21),
        ("xy.pth", "6 batches, the first 4x8 float32, 4 int64", 21),
        ("dict.pt", "6 batches, the first y=4 int64, x=4x8 float32", 21),
        ("list.pt", "2 batches, the first 10x8 float32, 10 int64", 21),
        ("x.npy", "6 batches, the first 4x8 float64", 21),
        ("xy.npz", "6 batches, the first y=4 int64, x=4x8 float32", 21),
        ("xy.safetensors", "6 batches, the first", 21),
        ("one.safetensors", "6 batches, the first images=4x8 float32", 21),
    ],
)
def test_every_form_of_data(folder: Path, what: str, shown: str, samples: int) -> None:
    data = run_json(*HALF, "--calibration", what)
    (note,) = [n for n in data["notes"] if n.startswith("calibration: ")]
    assert note.startswith(f"calibration: {what}, {shown}")
    report = data["report"]
    assert (report["samples"], report["random"]) == (samples, False)
    assert {r["name"] for r in report["refitted"]} == {"first.weight", "head.weight"}
    assert fxprune.load("small")(torch.randn(3, 8)).shape == (3, 4)


def test_every_ending_is_tested() -> None:
    assert set(READERS) == {".pt", ".pth", ".npy", ".npz", ".safetensors"}


@pytest.mark.filterwarnings("always:calibration on random numbers:UserWarning")
def test_random_samples_come_with_a_warning(folder: Path) -> None:
    result = run(*HALF, "--calibration", "24")
    assert result.stderr == (
        "warning: calibration on random numbers: what is kept suits these, not the data that the model will see\n"
    )
    assert "note: calibration: 24 samples of random numbers, not data" in result.stdout
    assert "calibrated on 24 samples of random numbers" in result.stdout


def test_the_report_names_the_data_and_the_worst_layers(folder: Path) -> None:
    text = run(*HALF, "--calibration", "xy.npz").stdout
    assert "calibrated on 21 samples\n" in text
    assert "refitted 2 layers after the proof: relative error of a layer" in text
    assert "the largest errors of refitted layers: head.weight " in text


def test_labels_and_the_loss_reach_the_criterion(folder: Path) -> None:
    common = (*HALF, "--criterion", "taylor", "--calibration")
    first = run_json(*common, "xy.npz", "--loss", "task.py:loss")
    assert first["report"]["recipe"]["criterion"] == "taylor"
    again = run_json(*common, "xy.safetensors", "--loss", "torch.nn.functional:cross_entropy")
    assert [(r["name"], r["after"]) for r in again["report"]["refitted"]] == [
        (r["name"], r["after"]) for r in first["report"]["refitted"]
    ]


def test_a_metric_that_may_drop(folder: Path) -> None:
    data = run_json("--target", "max_drop=0.5", "--calibration", "task.py:loader", "--metric", "task.py:accuracy")
    metric = data["report"]["metric"]
    assert metric["dense"] - metric["pruned"] <= 0.5


def test_a_metric_is_reported_whatever_the_target(folder: Path) -> None:
    report = run_json(*HALF, "--metric", "task.py:accuracy")["report"]
    assert 0 <= report["metric"]["pruned"] <= 1 and report["error"] is None
    assert "metric" in run(*HALF, "--metric", "task.py:accuracy", "--out", "shown").stdout


def test_batch_is_that_of_the_example_and_of_what_is_cut(folder: Path) -> None:
    notes = run_json(*HALF, "--calibration", "x.pt", "--batch", "7")["notes"]
    assert notes == ["example inputs: 7x8 float32", "calibration: x.pt, 3 batches, the first 7x8 float32"]
    assert load_pruned("small").args[0].shape == (7, 8)


def test_a_dry_run_chooses_by_the_data_and_its_plan_is_refitted_on_them(folder: Path) -> None:
    asked = (*HALF, "--calibration", "xy.npz")
    plan = run_json(*asked, "--dry-run")
    assert not (folder / "small").exists()
    assert any(n.startswith("calibration: xy.npz") for n in plan["notes"])
    (folder / "plan.json").write_text(json.dumps(plan))
    result = CliRunner().invoke(
        cli.app,
        [
            *("compile", "task.py:net", "--plan", "plan.json", "--calibration", "xy.npz"),
            *("--out", "small", "--no-measure", "--json"),
        ],
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    assert report["groups"] == plan["plan"]["groups"]
    assert len(report["refitted"]) == 2


def test_what_a_function_draws_depends_on_the_seed_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    first, again, other = (read_data("task.py:drawn", seed).value[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_rows_of_nested_inputs_are_cut_together() -> None:
    source = Source(nn.Identity(), ([torch.zeros(2, 3), torch.zeros(2)], 1.5))
    batches: Any = Data("made", (([torch.zeros(5, 3), torch.zeros(5)], 1.5), torch.arange(5))).batches(source)
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 3], [4]]
    assert batches[0][0][0][0].shape == (2, 3) and batches[0][0][1] == 1.5


def test_a_saved_report_prints_as_before(folder: Path) -> None:
    pruned = fxprune.compile(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)),
        torch.randn(2, 8),
        target={"macs": 0.5},
        calibration=[torch.randn(16, 8)],
    )
    pruned.report.clocked = Clocked(1.5, "torch", 1, [Attempt(1.6, 1.5, (1.4, 1.6))])
    pruned.save("small")
    assert str(load_pruned("small").report) == str(pruned.report)


# ---------------------------------------------------------------------- errors
class Pickled:
    """What only a pickle can hold."""


def spoil(folder: Path) -> None:
    x = torch.randn(21, 8)
    torch.save([], "none.pt")
    torch.save(torch.zeros(0, 8), "zero.pt")
    torch.save(torch.tensor(1.0), "scalar.pt")
    torch.save(nn.Linear(8, 4), "module.pt")
    torch.save(3, "three.pt")
    torch.save((x, x[:3]), "rows.pt")
    torch.save(x[:, :5], "narrow.pt")
    torch.save(x.int(), "whole.pt")
    torch.save(x * float("nan"), "nan.pt")
    np.savez("object.npz", x=np.array([{}], dtype=object))
    np.save("text.npy", np.array(["a", "b"]))
    save_file({"images": x, "labels": x + 1}, "unnamed.safetensors")
    for name in ("bad.pt", "bad.npz", "bad.safetensors"):
        (folder / name).write_text("nothing")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("0", "--calibration 0: this is no number of samples"),
        ("-3", "--calibration -3: this is no number of samples"),
        ("data.csv", "--calibration data.csv: this is none of: a number of random samples; FILE.py:NAME or"),
        ("word", "--calibration word: this is none of"),
        ("gone.npz", "there is no file 'gone.npz'"),
        ("gone.py:loader", "there is no file 'gone.py'"),
        ("gone:loader", "there is no module 'gone' here or among the installed ones"),
        ("task.py", "'task.py' needs the name of an iterable of batches or a function that returns one: task.py:NAME"),
        ("task.py:laoder", "'task.py' has no 'laoder'; did you mean 'loader'? It defines: X, Y, batches"),
        ("task:laoder", "'task' has no 'laoder'; did you mean 'loader'?"),
        ("task.py:number", "'task.py:number' is of type int, not an iterable of batches or a function"),
        ("task.py:word", "'task.py:word' is of type str, not an iterable of batches or a function"),
        ("task.py:nothing", "'task.py:nothing' returns NoneType, not an iterable of batches"),
        ("task.py:net", "calibration: 'x' is Net, not Tensor"),
        ("task.py:loss", "'task.py:loss' failed: TypeError: loss() missing 2 required positional arguments"),
        ("task.py:empty", "'task.py:empty' yields no batch"),
        ("task.py:breaks", "'task.py:breaks' failed: ValueError: the disk is full (line 52)"),
        ("none.pt", "'none.pt' yields no batch"),
        ("zero.pt", "'zero.pt' yields no batch"),
        ("scalar.pt", "'scalar.pt' holds no tensor with rows: ()"),
        ("three.pt", "'three.pt' holds int, not a tensor, tuple, dict or list of batches"),
        ("module.pt", "'module.pt' cannot be read as .pt: it is damaged, or holds pickled objects. Save tensors"),
        ("object.npz", "'object.npz' cannot be read as .npz: it is damaged, or holds pickled objects"),
        ("bad.pt", "'bad.pt' cannot be read as .pt: it is damaged, or holds pickled objects"),
        ("bad.npz", "'bad.npz' cannot be read as .npz: it is damaged, or holds pickled objects"),
        ("bad.safetensors", "'bad.safetensors' cannot be read as .safetensors: Error while deserializing header"),
        ("text.npy", "'text.npy' holds an array of <U1, which no tensor can hold"),
        ("rows.pt", "'rows.pt' holds tensors of different numbers of rows: (21, 8), (3, 8)"),
        ("narrow.pt", "calibration: 'x' has the shape (4, 5), the example (4, 8); only dimension 0 may differ"),
        ("whole.pt", "calibration: 'x' is int32, the example float32"),
        ("nan.pt", "calibration: 'x' holds NaN or infinite values"),
        ("unnamed.safetensors", "'unnamed.safetensors' holds images, labels, but no x: tensors in such files have no"),
    ],
)
def test_data_that_are_none(folder: Path, what: str, message: str) -> None:
    spoil(folder)
    refused(message, 3, *HALF, "--calibration", what)


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "--loss is taken on calibration data: give --calibration, too", (*HALF, "--loss", "task.py:loss")),
        (3, "the loss takes labels", (*HALF, "--calibration", "x.pt", "--loss", "task.py:loss")),
        (
            3,
            "'task.py:number' is of type int, not a function (output, labels) -> scalar",
            (*HALF, "--calibration", "x.pt", "--loss", "task.py:number"),
        ),
        (
            3,
            "'torch.nn:MSELoss' is a class, not a function (output, labels) -> scalar",
            (*HALF, "--calibration", "x.pt", "--loss", "torch.nn:MSELoss"),
        ),
        (
            3,
            "'mse' does not name a function (output, labels) -> scalar: write FILE.py:NAME or MODULE:NAME",
            (*HALF, "--calibration", "x.pt", "--loss", "mse"),
        ),
        (
            3,
            "'task.py' has no 'acuracy'; did you mean 'accuracy'?",
            ("--target", "max_drop=0.1", "--metric", "acuracy"),
        ),
        (3, "the metric fails: ValueError: no test set", ("--target", "max_drop=0.1", "--metric", "fails")),
        (3, "the metric gives inf, of type float, not a finite", ("--target", "max_drop=0.1", "--metric", "infinite")),
        (2, "target max_drop takes `metric`", ("--target", "max_drop=0.1")),
        (2, "--dry-run makes no model whose --metric", (*HALF, "--metric", "accuracy", "--dry-run")),
        (3, "criterion 'taylor' takes calibration data", (*HALF, "--criterion", "taylor")),
    ],
)
def test_losses_and_metrics_that_are_none(folder: Path, code: int, message: str, arguments: tuple[str, ...]) -> None:
    given = [
        f"task.py:{a}" if before == "--metric" else a for before, a in zip(("", *arguments), arguments, strict=False)
    ]
    refused(message, code, *given)


def test_indices_outside_of_a_table(folder: Path) -> None:
    message = "calibration: 'ids' holds 99 to 99, but 'table.weight' has 10 rows"
    refused(message, 3, *HALF, "--calibration", "task.py:unknown", model="task.py:ids")


def refused(message: str, code: int, *arguments: str, model: str = "task.py:net") -> None:
    """Check that an error is one line, and that nothing is left behind."""
    before = {p.name for p in Path().iterdir()}
    result = run(*arguments, model=model, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert {p.name for p in Path().iterdir()} <= before | {"__pycache__"}


# ---------------------------------------------------------------------- what follows structured pruning
def test_sparsity_and_quantization(folder: Path) -> None:
    recipe = "target: {macs: 0.5}\nsparsity: {pattern: '2:4', method: sparsegpt}\nquantization: {when: always}\n"
    (folder / "recipe.yaml").write_text(recipe)
    data = run_json("--recipe", "recipe.yaml", "--calibration", "x.pt", "--onnx", "small.onnx")
    steps = data["report"]["steps"]
    assert [(s["name"], s["taken"]) for s in steps] == [("sparsity 2:4, sparsegpt", True), ("quantization int8", True)]
    assert all(0 < value < 1 for s in steps for value in s["error"])
    assert {s["name"] for s in data["report"]["sparse"]} == {"first.weight", "head.weight"}
    assert (folder / "small" / "int8.onnx").read_bytes() == (folder / "small.onnx").read_bytes()
    assert float((load_pruned("small").module.get_parameter("first.weight") != 0).float().mean()) == 0.5


def test_a_pattern_needs_no_target(folder: Path) -> None:
    text = run("--sparsity", "2:4").stdout
    assert "sparsity 2:4, magnitude: taken" in text
    assert "2:4 in 2 layers, 50.0% of 384 weights stay" in text
    result = run("--sparsity", "two", code=2)
    assert "there is no sparsity 'two'; known: 2:4 or any n:m" in " ".join(result.stderr.split())
