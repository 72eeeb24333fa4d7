"""Packages compiled ahead of time: what "torch-aot" does beyond the conformance suite of backends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.backends import BACKENDS
from fxprune.backends import torch as torch_backend
from fxprune.errors import BackendError

needs_compiler = pytest.mark.skipif(
    BACKENDS["torch-aot"].available() is not None, reason=str(BACKENDS["torch-aot"].available())
)
#: What another process does, in another folder and without the class or fxprune.
PROGRAM = """
import sys
import torch
inputs = torch.load("inputs.pt")
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(x) for x in inputs], "outputs.pt")
print("fxprune" in sys.modules)
"""


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend.shutil, "which", lambda name: None)
    assert "neither g++ nor clang++ was found" in str(BACKENDS["torch-aot"].available())


@needs_compiler
def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"a package of torch ends in \.pt2, which 'net\.so' does not"):
        BACKENDS["torch-aot"].build(nn.Linear(2, 2), (torch.zeros(2, 2),), threads=1, path=tmp_path / "net.so")


@needs_compiler
def test_a_pruned_model_runs_in_another_process_from_the_file_alone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    pruned = fxprune.compile(net, torch.randn(2, 3, 4, 4), target={"macs": 0.5})
    path = pruned.export(tmp_path / "small.pt2")
    assert path == tmp_path / "small.pt2"
    inputs = [torch.randn(batch, 3, 4, 4) for batch in (1, 2, 7)]
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-W", "ignore", "-I", "-c", PROGRAM, "small.pt2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    for given, (found,) in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
        torch.testing.assert_close(found, pruned.module(given), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_what_it_was_built_for_is_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled code checks nothing: without these checks it would read beside the tensors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor, options: dict[str, object]) -> dict[str, Tensor]:
            return {"y": self.layer(x) * options["factor"] + options["bias"]}

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    net, x, bias = Net(), torch.randn(2, 3), torch.randn(4)
    backend = BACKENDS["torch-aot"].configured(dtype="bfloat16")
    built = backend.build(net, (x, {"factor": 2, "bias": bias}), threads=1)
    (found,) = built.run(torch.randn(5, 3), {"factor": 2, "bias": bias})
    assert found.shape == (5, 4) and found.dtype == torch.float32
    with pytest.raises(BackendError, match=r"'x' of shape \(2, 3\) and torch.bfloat16, but is run with \(2, 2\)"):
        built.run(x[:, :2], {"factor": 2, "bias": bias})
    with pytest.raises(BackendError, match=r"'options_bias' of shape \(4,\).*with \(3,\)"):
        built.run(x, {"factor": 2, "bias": bias[:3]})
    with pytest.raises(BackendError, match=r"'x' of shape .* with \(2, 3\) and torch.int64"):
        built.run(torch.ones(2, 3, dtype=torch.int64), {"factor": 2, "bias": bias})
    with pytest.raises(BackendError, match=r"constants \{'options_factor': 3\}; build it again"):
        built.run(x, {"factor": 3, "bias": bias})
    told = json.loads(json.dumps(built.describe()))
    assert (told["dynamic"], told["options"]["dtype"], told["tolerance"]) == ({"x": {"0": "batch"}}, "bfloat16", 0.05)
    # A package that nobody asked to keep goes with its runner.
    assert list(tmp_path.glob("fxprune-*/model.pt2"))
    del built
    assert not list(tmp_path.glob("fxprune-*"))


@needs_compiler
def test_a_batch_that_cannot_be_dynamic_is_said(tmp_path: Path) -> None:
    class FixedBatch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 3) * 2

    with pytest.raises(BackendError, match=r"(?s)torch.export failed: .*Build with dynamic=False"):
        BACKENDS["torch-aot"].build(FixedBatch(), (torch.randn(2, 3),), threads=1, path=tmp_path / "net.pt2")
