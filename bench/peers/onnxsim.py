"""onnxsim, which since 2026 not only simplifies ONNX files but prunes them, too: channels, heads, 2:4 masks.

Installed with `pip install onnxsim`; its pruning came with 0.8. What it makes is a file, which runs in onnxruntime.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.peers.limit import limited
from fxprune.backends import BACKENDS
from fxprune.backends.base import Runner
from fxprune.backends.onnxruntime import OnnxRunner, OnnxRuntimeBackend

Inputs = tuple[Tensor, ...]
Method = Literal["magnitude", "wanda", "2:4 magnitude", "2:4 wanda", "2:4 sparsegpt"]


def missing() -> str | None:
    """Return why its pruning cannot run here; None where it can."""
    if importlib.util.find_spec("onnxsim") is None:
        return "onnxsim is not installed (pip install onnxsim)"
    if importlib.util.find_spec("onnxsim.pruning") is None:
        return "this onnxsim only simplifies; its pruning came with 0.8 (pip install 'onnxsim>=0.8')"
    return None


class File(nn.Module):
    """An ONNX file as a module that runs in onnxruntime.

    Attributes:
        path: of the file.
        size: numbers in its weights.
        zeros: those of them that are zero.
    """

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        import onnx

        self.path = path
        self.runner: Runner = _backend().load(path, threads)
        weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer]
        self.size = sum(int(array.size) for array in weights)
        self.zeros = sum(int(array.size - (array != 0).sum()) for array in weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return its first output."""
        return self.runner.run(*inputs)[0]


def _backend() -> OnnxRuntimeBackend:
    backend = BACKENDS["onnxruntime"]
    assert isinstance(backend, OnnxRuntimeBackend)
    return backend


def prune(
    model: nn.Module,
    example: Inputs,
    share: float,
    method: Method,
    data: Sequence[Inputs],
    folder: Path,
    threads: int,
    limit: float = 600.0,
) -> File:
    """Return the pruned file of a model, in `folder`.

    Args:
        share: of the channels and heads that goes; patterns take two of four.
        data: what "wanda" and "sparsegpt" measure activations on.
        limit: seconds.

    Raises:
        TimeoutError: after `limit` seconds.
        Exception: whatever onnxsim raises, or onnxruntime of what it leaves.
    """
    pruning: Any = importlib.import_module("onnxsim.pruning")
    import onnx

    with tempfile.TemporaryDirectory() as name, limited(limit, "onnxsim"):
        dense = Path(name) / "dense.onnx"
        runner = _backend().build(model, example, threads=threads, path=dense)
        assert isinstance(runner, OnnxRunner)
        samples = [{k: x.numpy() for k, x in zip(runner.names, batch, strict=True)} for batch in data]
        graph = onnx.load(str(dense))
        if method == "magnitude":
            graph = pruning.apply_attention_head_pruning(pruning.apply_structured_pruning(graph, share), share)
        elif method == "wanda":
            graph = pruning.apply_structured_wanda_pruning(graph, samples, sparsity=share)
            graph = pruning.apply_attention_head_wanda_pruning(graph, samples, sparsity=share)
        elif method == "2:4 magnitude":
            graph = pruning.apply_magnitude_pruning(graph, n=2, m=4)
        elif method == "2:4 wanda":
            graph = pruning.apply_wanda_pruning(graph, samples, n=2, m=4)
        else:
            graph = pruning.apply_sparsegpt_pruning(graph, samples, n=2, m=4)
    path = folder / f"{method.replace(':', '')}-{share:.4f}.onnx"
    onnx.save(graph, str(path))
    file = File(path, threads).eval()
    with torch.inference_mode():
        file(*example)
    return file
