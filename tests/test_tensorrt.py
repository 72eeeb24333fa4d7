"""Engines of pruned models for three generations of GPUs, really built by TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.backends import BACKENDS, engines, onnxfile, onnxruntime
from fxprune.backends.engines import Engine
from fxprune.backends.tensorrt import TensorRTBackend
from fxprune.pruned import Pruned

RTX = BACKENDS["tensorrt-rtx"]
assert isinstance(RTX, TensorRTBackend)
HALF = RTX.configured(dtype="float16")
CAPABILITIES = ["8.6", "8.9", "12.0"]
pytestmark = [
    pytest.mark.skipif(RTX.can_build() is not None, reason=str(RTX.can_build())),
    # torch's own, when a module with a tree specification is copied
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class Block(nn.Module):
    """Attention and MLP, before or after the norm."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.before(x)
        q, k, v = (
            layer(normed).view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.between(x))))


class SmallViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(image).flatten(2).transpose(1, 2)).mean(1))


class SmallBert(nn.Module):
    """An encoder with embeddings and an additive mask, as large as float32 goes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = (1 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, mask.expand(-1, 1, input_ids.shape[1], -1))
        return self.head(x[:, 0])


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def small_bert_inputs() -> dict[str, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(0, 50, (2, 12)), "attention_mask": mask}


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "cnn": (small_cnn, lambda: torch.randn(2, 3, 16, 16)),
    "vit": (SmallViT, lambda: torch.randn(2, 3, 16, 16)),
    "bert": (SmallBert, small_bert_inputs),
}


def masked(module: nn.Module) -> nn.Module:
    """Return a copy whose linear layers and convolutions have 2 zeros, the smallest, in every 4 weights of an input."""
    result = copy.deepcopy(module)
    for layer in result.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[1] % 4 == 0:
            grouped = layer.weight.data.movedim(1, -1)
            fours = grouped.reshape(-1, 4)
            fours = fours.scatter(1, fours.abs().argsort(1)[:, :2], 0.0)
            layer.weight.data = fours.view(grouped.shape).movedim(-1, 1).contiguous()
    return result


def masked_file(path: Path, target: Path) -> Path:
    """The same to an ONNX file, whose models take long to export."""
    model = ir.load(path)
    for node in model.graph:
        found = onnxfile._weight(node)
        if found is not None and found[1].shape[found[2]] % 4 == 0:
            _, weight, axis = found
            moved = np.moveaxis(weight, axis, -1)
            fours = moved.reshape(-1, 4).copy()
            np.put_along_axis(fours, np.argsort(np.abs(fours), axis=1)[:, :2], 0, axis=1)
            weight = np.ascontiguousarray(np.moveaxis(fours.reshape(moved.shape), -1, axis))
            node.inputs[1].const_value = ir.Tensor(weight, name=node.inputs[1].name)
    ir.save(model, target)
    return target


@dataclass
class Ready:
    """A pruned model and its ONNX files, dense weights and 2:4."""

    dense: nn.Module
    pruned: Pruned
    files: dict[bool, Path]


def weight_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of weights that an engine holds one by one: queries, keys and values may become one matrix."""
    layers = (nn.Linear, nn.Conv2d)
    return [
        wide(tuple(layer.weight.shape))
        for name, layer in module.named_modules()
        if isinstance(layer, layers) and not name.endswith(("query", "key", "value"))
    ]


def wide(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its dimensions of one: a convolution of one pixel is a matrix product to an engine."""
    return tuple(size for size in shape if size > 1)


def in_engine(engine: Engine) -> set[tuple[int, ...]]:
    """The shapes of all weights in an engine, matrices either way round."""
    found = {wide(port.shape) for layer in engine.layers for port in layer.constants}
    return found | {shape[::-1] for shape in found if len(shape) == 2}


def capability_name(value: str) -> str:
    return "SM" + value.replace(".", "")


# --------------------------------------------------------------------------------------------------------- small models


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ready]:
    """Three pruned models, exported once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    ready = {}
    for name, (make, inputs) in SMALL.items():
        dense = make().eval()
        pruned = fxprune.compile(dense, inputs(), target={"params": 0.5})
        files = {sparse: folder / f"{name}-{sparse}.onnx" for sparse in (False, True)}
        onnxruntime.export(pruned.module, pruned.args, pruned.kwargs, files[False])
        if name == "vit":  # once the long way, through the layers
            onnxruntime.export(masked(pruned.module), pruned.args, pruned.kwargs, files[True])
        else:
            masked_file(files[False], files[True])
        ready[name] = Ready(dense, pruned, files)
    return ready


@pytest.mark.parametrize("capability", CAPABILITIES, ids=capability_name)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("name", list(SMALL))
def test_small_engines_have_the_pruned_shapes(
    name: str, sparse: bool, capability: str, small: dict[str, Ready], tmp_path: Path
) -> None:
    ready = small[name]
    engine = HALF.compile_engine(ready.files[sparse], path=tmp_path / "a.engine", compute_capability=capability)
    assert engine.compute_capability == (capability,)
    assert engine.size == engine.path.stat().st_size > 0
    assert (engine.sparsity.asked, engine.sparsity.held > 0) == (sparse, sparse)
    if sparse:
        assert engine.sparsity.held == engine.sparsity.possible
    kept = [shape for shape in weight_shapes(ready.pruned.module) if shape[1] > 3 and shape[0] > 10]
    gone = set(weight_shapes(ready.dense)) - set(weight_shapes(ready.pruned.module))
    assert kept and gone
    assert set(kept) <= in_engine(engine)
    assert not gone & in_engine(engine)
    kinds = {port.dtype for layer in engine.layers for port in layer.constants if len(port.shape) > 1}
    assert "float16" in kinds
    assert engines.read(engine.path) == engine


# ---------------------------------------------------------------------------------------------------------- real models


def resnet() -> tuple[nn.Module, Any]:
    return pytest.importorskip("timm").create_model("resnet50"), torch.randn(2, 3, 224, 224)


def vit() -> tuple[nn.Module, Any]:
    return pytest.importorskip("timm").create_model("vit_base_patch16_224"), torch.randn(2, 3, 224, 224)


def minilm() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536
    )
    ids = torch.randint(0, config.vocab_size, (2, 128))
    return transformers.BertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


#: Most of MiniLM's parameters are its embeddings, which stay.
REAL: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], dict[str, float]]] = {
    "resnet50": (resnet, {"params": 0.5}),
    "vit_base": (vit, {"params": 0.5}),
    "minilm": (minilm, {"macs": 0.5}),
}


@pytest.fixture(scope="module", params=list(REAL))
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    make, target = REAL[request.param]
    model, inputs = make()
    # The proof is other tests' business.
    pruned = fxprune.compile(model.eval(), inputs, target=target, proof="quick")
    file = folder / "dense.onnx"
    onnxruntime.export(pruned.module, pruned.args, pruned.kwargs, file)
    return Ready(model, pruned, {False: file, True: masked_file(file, folder / "sparse.onnx")})


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=capability_name)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
def test_real_engines_have_the_pruned_shapes(sparse: bool, capability: str, real: Ready, tmp_path: Path) -> None:
    engine = HALF.compile_engine(real.files[sparse], path=tmp_path / "a.engine", compute_capability=capability)
    assert (engine.compute_capability, engine.dtype) == ((capability,), "float16")
    kept = {shape for shape in weight_shapes(real.pruned.module) if shape[1] > 3 and shape[0] != 1000}
    gone = set(weight_shapes(real.dense)) - set(weight_shapes(real.pruned.module))
    assert kept <= in_engine(engine)
    assert gone and not gone & in_engine(engine)
    assert (
        engine.sparsity.held == engine.sparsity.possible if sparse else engine.sparsity.held < engine.sparsity.possible
    )
    assert engines.read(engine.path) == engine
    weights = sum(p.numel() for p in real.pruned.module.parameters())
    assert 0.9 < engine.size / (2 * weights) < 1.5
