"""The demo with tiny settings: it tells what it should, and the command that it prints works where nothing else is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fxprune
from bench import compile_time, demo, rounding
from bench.tasks import digits, minilm

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("sklearn")

SETTINGS = demo.Settings(
    speedup=None,
    calibration=8,
    sentences=4,
    batch=2,
    length=16,
    epochs=1,
    more=1,
    widths=(16, 16, 32),
    images=4,
    rounds=6,
)
INTERVAL = r"\d+\.\d\d x \(\d+\.\d\d-\d+\.\d\d\)"


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=100, force_terminal=False)


def run(command: str, where: Path) -> str:
    """Run a printed line in a shell that finds this Python and, of this project, nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    done = subprocess.run(
        ["sh", "-c", command], cwd=where, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_resnet_is_pruned_trained_on_and_runs_anywhere(console: Console, tmp_path: Path) -> None:
    data = digits.digits()
    few = digits.Digits(
        data.train_images[::4],
        data.train_labels[::4],
        data.train_rows[::4],
        data.test_images[::4],
        data.test_labels[::4],
        data.test_rows[::4],
    )
    file = demo.prune_resnet(console, tmp_path / "a folder", SETTINGS, few)
    (command,) = demo.show(console, [file], batch=3)
    text = console.export_text()
    assert re.search(r"accuracy +│ +\d+\.\d% │ +\d+\.\d% │ +\d+\.\d% ", text)
    assert re.search(INTERVAL, text)
    assert "proved: pruned equals masked dense" in text
    assert command in text.splitlines()
    assert "fxprune" not in command and "torch" not in command
    assert shlex.split(command)[:2] == ["python", "-c"]
    assert run(command, tmp_path).startswith(f"(3, {digits.CLASSES}) [")
    loaded = fxprune.load(tmp_path / "a folder" / "digits")
    assert loaded(few.test_images[:5]).shape == (5, digits.CLASSES)


def test_the_encoder_is_pruned_and_runs_anywhere(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    try:
        encoder = minilm.encoder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    encoder.bert.encoder.layer = encoder.bert.encoder.layer[:2]  # a third of the layers to prune and to export
    monkeypatch.setattr(minilm, "encoder", lambda: encoder)
    file = demo.prune_encoder(console, tmp_path, SETTINGS)
    (command,) = demo.show(console, [file], batch=3)
    text = console.export_text()
    cosines = {}
    for name, time in (("fxprune, calibrated", rf"\d+\.\d │ {INTERVAL}"), ("the smallest weights go", "")):
        row = re.search(rf"{name} +│ +[\d.]+ M │ +[\d.]+ M │ +(0\.\d\d\d) │ +{time}", text)
        assert row, text
        cosines[name] = float(row.group(1))
    assert cosines["fxprune, calibrated"] > cosines["the smallest weights go"]
    assert "refitted" in text
    assert run(command, tmp_path).startswith("(3, 384) [")
    loaded = fxprune.load(tmp_path / "minilm")
    for tokens in (16, 9):  # both sizes are dynamic in the saved module
        ids = torch.ones(5, tokens, dtype=torch.int64)
        assert loaded(ids, torch.ones_like(ids)).shape == (5, 384)


def test_a_bar_shows_training_on_a_terminal_only() -> None:
    for terminal in (True, False):
        console = Console(record=True, width=100, force_terminal=terminal)
        with demo.training(console, "training") as advance:
            advance(1, 2, 0.5)
        shown = console.export_text()
        assert ("training, loss 0.500" in shown) is terminal, shown


def test_compile_times_and_memory_of_both_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    pytest.importorskip("timm")
    result = compile_time.time_model("mobilenetv3_small_050", repeats=1)
    own = result["fxprune"]["seconds"]
    assert set(own) >= {"whole", *compile_time.STAGES}
    assert own["whole"][0] > sum(own[stage][0] for stage in compile_time.STAGES) * 0.99
    assert len(result["torch_pruning"]["seconds"]["whole"]) == 1

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such layer\nand more")

    monkeypatch.setitem(compile_time.RUN, "torch_pruning", fail)
    result = {"m": compile_time.time_model("mobilenetv3_small_050", repeats=1)}
    assert result["m"]["torch_pruning"] == {"error": "RuntimeError: no such layer"}
    console = Console(record=True, width=120)
    console.print(compile_time.table(result, 1))
    assert re.search(r"│ m +│ +\d+\.\d{3} │ +fails │ +- │", console.export_text())


@pytest.mark.skipif(not compile_time.STATUS.exists(), reason="needs Linux's account of memory")
def test_peak_memory_in_a_process_of_its_own() -> None:
    pytest.importorskip("timm")
    memory = compile_time._child("--models", "mobilenetv3_small_050", "--worker", "fxprune")
    assert memory["weights"] > 1e6
    assert memory["peak"] > 0


def test_roundings_of_widths_are_timed_against_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(rounding, "ROUNDINGS", (1, None))
    figures, timed = rounding.measure("vit", batch=1, threads=1, rounds=6, full=False)
    assert list(figures) == ["1", "default"]
    assert figures["1"]["round_to"] == 1 < figures["default"]["round_to"]
    console = Console(record=True, width=120)
    console.print(rounding.table(figures, timed, "title"))
    text = console.export_text()
    assert re.search(r"default \(\d+\) │ 0\.\d{3} │ +0\.\d{3} │ +\d+\.\d │ +\d+\.\d\d x │", text)
