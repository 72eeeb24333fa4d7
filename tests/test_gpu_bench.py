"""`bench.gpu` without a GPU: it says so; and its whole way on the CPU, with a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import gpu
from fxprune.backends.sparse import holds_pattern


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))


SUBJECT = gpu.Subject("mlp", "torch", small, lambda batch: (torch.randn(batch, 64),))


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(file=tmp_path / "gpu.json")
    assert capsys.readouterr().out == f"nothing measured: torch {torch.__version__} finds no CUDA device\n"
    assert not list(tmp_path.iterdir())


def test_the_variants_are_modules_of_their_own() -> None:
    found = {name: (module, known) for name, module, known in gpu.variants(SUBJECT)}
    assert list(found) == list(gpu.VARIANTS)
    patterned = {name: holds_pattern(module.get_submodule("0").weight) for name, (module, _) in found.items()}
    assert patterned == {"dense": False, "pruned": False, "2:4": True, "pruned + 2:4": True}
    assert found["pruned + 2:4"][0].get_submodule("0").weight.shape == (128, 64)
    assert found["pruned + 2:4"][1]["masked"] == 2
    assert found["pruned"][1]["macs"] == pytest.approx(0.5)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the CPU in the GPU's place, with options that it has."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SAMPLE", 1e-4)
    monkeypatch.setattr(gpu, "ROUNDS", 6)
    options = {"device": "cpu", "dtype": "bfloat16"}
    monkeypatch.setattr(gpu, "ROUTES", {"eager": ("torch", options, (1, 8)), "other": ("torch", options, (8,))})
    monkeypatch.setattr(gpu, "SUBJECTS", (SUBJECT, gpu.Subject("absent", "no_such_library", small, lambda n: ())))
    monkeypatch.setattr(gpu, "gpu", lambda: {"name": "made up"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")


@pytest.mark.usefixtures("on_the_cpu")
def test_rows_are_written_as_they_come_and_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "gpu.json"
    gpu.main(file=file, batches=[8])
    data = json.loads(file.read_text())
    assert list(data["rows"]) == ["mlp/eager/8", "mlp/other/8"]
    figures = data["rows"]["mlp/eager/8"]["variants"]
    assert list(figures) == list(gpu.VARIANTS)
    for row in figures.values():
        assert row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        assert 0 < row["parity"]["max_rel"] < 0.05
    assert figures["dense"]["speedup"]["median"] == 1
    said = capsys.readouterr().out
    assert "absent left out: no_such_library is not installed" in said
    assert "4 rows are left; call again to go on: mlp/eager/1, absent/eager/1" in said.replace("\n", " ")
    gpu.main(file=file, seconds=100)
    again = json.loads(file.read_text())["rows"]
    assert again["mlp/eager/8"] == data["rows"]["mlp/eager/8"]
    assert list(again) == ["mlp/eager/8", "mlp/other/8", "mlp/eager/1"]


@pytest.mark.usefixtures("on_the_cpu")
def test_another_gpu_has_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"gpu": {"name": "another"}, "rows": {"mlp/eager/8": {}}}))
    with pytest.raises(SystemExit, match=r"gpu\.json holds figures of .*another.*name another file"):
        gpu.main(file=file)


def test_what_cannot_be_built_is_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such kernel\nand more")

    options: dict[str, Any] = {"device": "cpu"}
    figures = gpu.measure({"dense": small(), "pruned": Fails()}, (torch.randn(2, 64),), "torch", options, 6)
    assert figures["pruned"] == {"error": "BackendError: backend 'torch' cannot run the model: no such kernel"}
    assert "ms" in figures["dense"]
    assert set(gpu.measure({"dense": Fails()}, (torch.randn(2, 64),), "torch", options, 6)["dense"]) == {"error"}
