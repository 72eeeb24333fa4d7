"""INT8 behind pruning: what it costs and gains, and the file that comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import quantization
from fxprune.errors import BackendError, RecipeError, TargetError
from fxprune.saved import load_pruned


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 16, 3), nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.conv(x)).mean((2, 3)) * scale
        return {"y": self.down(F.gelu(self.up(y)))}


@pytest.fixture
def model() -> nn.Module:
    return Net().eval().requires_grad_(False)


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 8, 8), torch.rand(rows, 1)


def compiled(model: nn.Module, **recipe: Any) -> fxprune.Pruned:
    data = [batch(8) for _ in range(8)]
    return fxprune.compile(model, batch(), calibration=data, **recipe)


def types(file: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(file).graph.node}


def test_the_file_computes_in_8_bits_and_is_close(model: nn.Module, tmp_path: Path) -> None:
    """Oracle: onnxruntime alone, on the exported file and fresh data, beside the dense model."""
    pruned = compiled(model, quantization={"when": "always"})
    (step,) = pruned.report.steps
    assert step.taken
    assert step.error is not None
    assert step.error[0] < 1e-9 < step.error[1] < 0.05
    assert "quantization int8: taken; error of the outputs" in str(pruned.report)
    path = pruned.export(tmp_path / "small.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= types(path.read_bytes())
    opened = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (3, 7):
        inputs = batch(rows)
        (found,) = opened.run(None, {"x": inputs[0].numpy(), "scale": inputs[1].numpy()})
        expected = model(*inputs)["y"].numpy()
        assert np.square(found - expected).mean() / expected.var() < 0.05
    plain = pruned.export(tmp_path / "float.onnx", dtype="float32")
    assert "QuantizeLinear" not in types(plain.read_bytes())


def test_pruned_sparse_and_in_8_bits(model: nn.Module) -> None:
    pruned = compiled(
        model, target={"params": 0.7}, round_to=4, sparsity="2:4", quantization={"when": "always"}, keep=["conv"]
    )
    steps = pruned.report.steps
    assert [s.name for s in steps] == ["sparsity 2:4, alps", "quantization int8"]
    assert all(s.taken and s.error is not None for s in steps)
    assert steps[1].error[0] == pytest.approx(steps[0].error[1], rel=1e-6)  # type: ignore[index]
    assert pruned.report.params.ratio < 0.75
    assert pruned.quantized is not None
    weights = [onnx.numpy_helper.to_array(i) for i in onnx.load_from_string(pruned.quantized.file).graph.initializer]
    ints = [w for w in weights if w.dtype == np.int8 and w.ndim == 2 and min(w.shape) > 4]
    assert ints
    for w in ints:  # (out, in): still at most 2 of 4 along the inputs
        assert int((w.reshape(len(w), -1, 4) != 0).sum(2).max()) == 2


def test_saved_with_the_model(model: nn.Module, tmp_path: Path) -> None:
    pruned = compiled(model, quantization={"when": "always"})
    folder = pruned.save(tmp_path / "small")
    loaded = load_pruned(folder)
    assert loaded.quantized == pruned.quantized
    assert loaded.report.steps == pruned.report.steps
    assert loaded.export(tmp_path / "a.onnx").read_bytes() == pruned.export(tmp_path / "b.onnx").read_bytes()
    with torch.no_grad():
        loaded.module.get_parameter("up.weight").mul_(2)
    with pytest.raises(BackendError, match="the weights have changed since the model was quantised"):
        loaded.export(tmp_path / "c.onnx")
    again = load_pruned(loaded.save(tmp_path / "again"))
    assert again.quantized is None
    assert any("the file in 8 bits was not saved" in note for note in again.report.notes)


@pytest.mark.parametrize(("speedup", "taken"), [((1.5, 1.4, 1.6), True), ((0.9, 0.8, 1.01), False)])
def test_it_is_taken_where_it_pays(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, speedup: tuple[float, float, float], taken: bool
) -> None:
    monkeypatch.setattr(quantization, "_timed", lambda *_: speedup)
    pruned = compiled(model, quantization="int8")
    (step,) = pruned.report.steps
    assert (step.taken, step.speedup, pruned.quantized is not None) == (taken, speedup, taken)
    assert ("it pays" if taken else "it does not pay on this backend") in step.line()


def test_it_is_really_timed(model: nn.Module) -> None:
    (step,) = compiled(model, quantization="int8").report.steps
    assert step.speedup is not None
    median, low, high = step.speedup
    assert 0 < low <= median <= high


def test_a_drop_above_what_is_allowed_stops(model: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"quantization int8 costs .* of the outputs' variance; 1e-09 is allowed"):
        compiled(model, quantization={"when": "always", "max_drop": 1e-9})
    fresh = batch(32)
    goal = model(*fresh)["y"]

    def metric(module: nn.Module) -> float:
        return -float((module(*fresh)["y"] - goal).square().mean())

    with pytest.raises(TargetError, match=r"of the metric; 1e-12 is allowed. Reached: quantization int8"):
        compiled(model, quantization={"when": "always", "max_drop": 1e-12}, metric=metric)
    (step,) = compiled(model, quantization={"when": "always", "max_drop": 1.0}, metric=metric).report.steps
    assert step.metric is not None
    assert step.metric[1] < step.metric[0] <= 0


def test_symmetric_files_are_for_tensorrt(model: nn.Module, tmp_path: Path) -> None:
    pruned = compiled(model, quantization="int8", backend="tensorrt-rtx")
    (step,) = pruned.report.steps
    assert step.name == "quantization int8, symmetric"
    assert "not timed: an engine of 'tensorrt-rtx' is built from the file when it is exported" in step.line()
    assert pruned.quantized is not None
    for tensor in onnx.load_from_string(pruned.quantized.file).graph.initializer:
        if "zero_point" in tensor.name:
            assert not onnx.numpy_helper.to_array(tensor).any()
    pytest.importorskip("tensorrt_rtx")
    path = pruned.export(tmp_path / "small.engine", compute_capability="8.9")
    assert path.stat().st_size > 0
    (engine,) = pruned.report.engines
    assert engine.compute_capability == ("8.9",)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"quantization": "int4"}, "dtype is one of int8, not 'int4'"),
        ({"quantization": {"range": "minmax"}}, "no option 'range'; did you mean 'ranges'"),
        ({"quantization": {"ranges": "all"}}, "ranges is one of minmax, percentile, entropy, not 'all'"),
        ({"quantization": {"samples": 0}}, "samples is a number from 1 on, not 0"),
        ({"quantization": {"max_drop": -1}}, "max_drop is a number from 0 on, not -1"),
        ({"quantization": "int8", "backend": "torch"}, "which backend 'torch' does not run"),
        (
            {"quantization": "int8", "backend": {"name": "onnxruntime", "dtype": "float16"}},
            "starts from a file in float32",
        ),
    ],
)
def test_what_a_recipe_gets_wrong(model: nn.Module, recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        compiled(model, **recipe)


def test_it_takes_data(model: nn.Module) -> None:
    with pytest.raises(RecipeError, match="quantization takes calibration data"):
        fxprune.compile(model, batch(), quantization="int8")
