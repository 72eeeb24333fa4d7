"""The zoo builds, the command measures each model in a process of its own, and no model's end is the command's."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from bench import coverage, zoo

#: Quick to build, one or two of each kind that a shelf has.
SMALL = [
    ("timm", "test_vit"),
    ("timm", "test_byobnet"),
    ("transformers", "llama"),
    ("transformers", "t5"),
    ("further", "deepseek_v3"),
    ("further", "hubert"),
    ("torchvision", "fasterrcnn_mobilenet_v3_large_fpn"),
    ("handmade", "recurrent_tagger"),
    ("handmade", "diffusion_unet"),
]


@pytest.fixture
def command(tmp_path: Path, app: Any) -> Any:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "coverage.json"), "--threads", "1"])

    return run


@pytest.fixture
def app() -> Any:
    import typer

    made = typer.Typer()
    made.command()(coverage.main)
    return made


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    return lambda: json.loads((tmp_path / "coverage.json").read_text())["rows"]


def test_names_are_unique_within_their_shelf_and_found_by_globs() -> None:
    for shelf in zoo.SHELVES:
        names = [n for _, n in zoo.names(shelves=[shelf])]
        assert len(names) == len(set(names)) > 8
    assert zoo.names(["swin*"], ["transformers", "timm"]) == [
        ("transformers", "swin"),
        ("timm", "swin_tiny_patch4_window7_224"),
        ("timm", "swinv2_cr_tiny_224"),
        ("timm", "swinv2_tiny_window8_256"),
    ]


@pytest.mark.filterwarnings("ignore")  # of the libraries' own code
@pytest.mark.parametrize(("shelf", "name"), SMALL)
def test_a_model_is_the_same_each_time_it_is_built(shelf: str, name: str) -> None:
    (first, inputs), (second, again) = (zoo.build(shelf, name) for _ in range(2))
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))
    weights = second.state_dict()
    assert all(torch.equal(w, weights[k]) for k, w in first.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for s, n in zoo.names() if s == "handmade"])
def test_handmade_models_are_pruned_to_half_and_proved(name: str) -> None:
    row = coverage.run_fxprune("handmade", name, "quick")
    assert "error" not in row
    assert row["macs"] <= 0.5 and row["free"] > 0.8 and row["unknown"] == {}


@pytest.mark.slow
def test_one_model_of_each_shelf_through_the_command_and_back_without_work(command: Any, rows: Any) -> None:
    arguments = ["llama", "test_vit", "points", "xglm", "--peer-above", "4e5", "--proof", "quick"]
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    found = rows()
    assert set(found) == {"timm/test_vit", "transformers/llama", "further/xglm", "handmade/points"}
    for row in found.values():
        ours = row["fxprune"]
        assert ours["macs"] <= 0.5 and ours["proof"] < 1e-3 and ours["parameters"] > 1000
        assert {"capture", "analyse", "rewrite", "prove"} <= set(ours["seconds"])
        assert "torch_pruning" not in row  # all are below the limit
    assert "4" in done.output and "all" in done.output

    start = time.monotonic()
    again = command(*arguments, "--resume")
    assert again.exit_code == 0 and rows() == found
    assert time.monotonic() - start < 5  # nothing was measured anew


def test_what_is_not_there_is_refused(command: Any) -> None:
    for arguments in (["no_such_model"], ["--shelf", "no_such_shelf"], ["--proof", "maybe"]):
        said = command(*arguments)
        assert said.exit_code == 2, said.output
        assert not isinstance(said.exception, (ImportError, KeyError))


def test_a_process_that_dies_hangs_or_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "START", "fork")  # so that the child sees these instead of the tools

    def dies(*_: str) -> Any:
        os._exit(9)

    def raises(*_: str) -> Any:
        raise ValueError("what\nit says")

    monkeypatch.setattr(coverage, "TOOLS", {"dies": dies, "hangs": lambda *_: time.sleep(60), "raises": raises})
    said = {tool: coverage.measure(tool, "", "", "quick", 2, 1)["error"] for tool in coverage.TOOLS}
    assert said["dies"] == "the process died with exit code 9"
    assert said["hangs"] == "no result in 2 s"
    assert said["raises"] == "crash: ValueError: what"


def _row(**more: Any) -> dict[str, Any]:
    ours = {"parameters": 9e6, "total": 3.0, "seconds": {"prove": 1.0}, "macs": 0.5, "free": 1.0, "like": {}}
    return {"fxprune": ours | more, "torch_pruning": {"total": 4.0, "smaller": True}}


def test_the_summary_compares_times_of_large_models_that_both_pruned_without_the_proof() -> None:
    rows = {
        "a/half": _row(),
        "a/slow": _row(total=9.0, macs=0.47),
        "a/small": _row(parameters=1e6, total=100.0, free=0.5),
        "a/peer_failed": _row() | {"torch_pruning": {"error": "IndexError"}},
        "a/failed": {"fxprune": {"parameters": 9e6, "error": "CaptureError: no"}},
    }
    said = coverage.summary(rows)
    assert (said["models"], said["proved"], said["free"], said["reached"]) == (5, 4, 3, 4)
    assert said["peer"] == [3, 4]
    assert said["ratio"] == [1.25, 2] and said["largest_ratio"] == [2.0, "a/slow"]
    assert said["slowest"] == [100.0, "a/small"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_of_timm_names_is_of_models_that_timm_has() -> None:
    import timm

    from bench.zoo.timm import NAMES

    assert set(NAMES) <= set(timm.list_models())
