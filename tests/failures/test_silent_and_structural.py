"""Rows 19-24: deep graphs, weights without gradients, layers that stay, scores of groups, depthwise, copies."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.failures.checks import Result, compare, filled, prune
from tests.failures.layers import Bottleneck, C2f, ConvBN, Yolo
from tests.failures.test_shape_operators import images
from tests.rules.checks import close


# ---------------------------------------------------------------------- 19
class Ladder(nn.Module):
    """Residual steps in one long chain: a graph that is deeper than Python may recurse."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(16) + 0.5) for _ in range(steps)])
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for scale in self.scales:
            x = x + (x * scale).tanh() * 0.1
        return self.last(x)


class Dense(nn.Module):
    """Each layer reads all before it: the number of couplings grows with the square of the depth."""

    def __init__(self, layers: int, growth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 + i * growth, growth, 1) for i in range(layers)])
        self.last = nn.Conv2d(3 + layers * growth, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.last(x)


def test_row_19_deep_graph() -> None:
    """A chain of more nodes than the recursion limit. TP#474, #43."""
    steps = 120
    model = Ladder(steps)
    # Room for the tools that call this test, and for a walk over as much of the graph as no algorithm may need.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 240)
    try:
        result = prune(model, torch.randn(2, 6))
    finally:
        sys.setrecursionlimit(limit)
    assert len(result.pruned.module.graph.nodes) > 4 * steps > 240
    result.cut("first.weight.0", "scales.*.0", "last.weight.1")


def test_row_19_dense_connections() -> None:
    """Every layer is coupled with all that follow, each by a part of a concatenation. TP#474."""
    result = prune(Dense(30), images(size=4))
    result.cut("layers.*.weight.0", "last.weight.1")
    assert result.width("last.weight", 1) == 3 + sum(result.width(f"layers.{i}.weight") for i in range(30))
    result.whole("of the input", "layers.0.weight.1")


# ---------------------------------------------------------------------- 20
def _classifier() -> nn.Sequential:
    return nn.Sequential(
        ConvBN(3, 16, 3, 2), Bottleneck(16), C2f(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


CLASSIFIER = ["[01].*conv.weight.0", "[012].*bn.weight.0", "[012].*bn.bias.0", "2.*.conv.weight.[01]", "5.weight.1"]


def check_buffers(result: Result) -> None:
    """Every batch norm is as wide as its statistics."""
    norms = [m for m in result.pruned.module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms, "batch norms are layers of the result"
    for norm in norms:
        assert norm.num_features == len(norm.weight) == len(norm.running_mean) == len(norm.running_var)


@pytest.mark.parametrize("which", ["all", "convolutions", "norms"])
def test_row_20_frozen_weights(which: str) -> None:
    """`requires_grad=False` says nothing about the width: also a residual branch's norm is cut. TP#463, #136, #178."""
    model = _classifier()
    for parameter in model.parameters():
        if which == "all" or (which == "convolutions") == (parameter.dim() == 4):
            parameter.requires_grad_(False)
    result = prune(model, images())
    result.cut(*CLASSIFIER)
    check_buffers(result)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in result.pruned.module.named_parameters()} == before


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_row_20_compiled_without_gradients(around: Any) -> None:
    """Compiled where gradients are off, and by inference tensors as inputs. TP#136, #178."""
    model = filled(_classifier())
    with around():
        pruned = fxprune.compile(model, images(), {"target": {"macs": 0.5}, "round_to": 1})
    result = Result(model, pruned)
    result.cut(*CLASSIFIER)
    compare(model, pruned, images())
    x = images()
    pruned.module(x).sum().backward()
    gradients = [p.grad for p in pruned.module.parameters()]
    assert all(g is not None for g in gradients), "the result can be trained"


def test_row_20_weights_made_in_inference_mode() -> None:
    """Inference tensors as weights: they allow no gradient, no view and no copy that others do. TP#463."""
    with torch.inference_mode():
        model = filled(_classifier())
    assert all(p.is_inference() for p in model.parameters())
    usual = _classifier().eval()
    usual.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    pruned = fxprune.compile(model, images(), {"target": {"macs": 0.5}, "round_to": 1})
    Result(model, pruned).cut(*CLASSIFIER)
    compare(usual, pruned, images())


class Labelled(Tensor):
    """An ordinary tensor that carries something along, as images of training libraries do."""


@pytest.mark.parametrize("kind", ["subclass", "parameter", "needs_gradient"])
def test_row_20_tensor_subclass_inputs(kind: str) -> None:
    """Inputs that are no plain tensors do not hide the graph. fasterai PR#63, TP#463."""
    x = images()
    if kind == "subclass":
        x = x.as_subclass(Labelled)  # type: ignore[arg-type]
    elif kind == "parameter":
        x = nn.Parameter(x)
    else:
        x.requires_grad_()
    result = prune(_classifier(), x, images())
    result.cut(*CLASSIFIER)
    check_buffers(result)
    outputs = result.pruned.module(x)
    assert outputs.shape == (2, 5)


# ---------------------------------------------------------------------- 21
def test_row_21_detection_head_that_stays() -> None:
    """What is to stay whole keeps its inputs as well as its outputs, and all else is cut. TP#341, #160."""
    model = Yolo()
    result = prune(model, images(size=32), keep=["detect"], target={"macs": 0.6})
    for name, parameter in model.detect.named_parameters():
        assert result.pruned.module.get_parameter(f"detect.{name}").shape == parameter.shape, name
    result.cut("stem.conv.weight.0", "stage?.*.first.conv.weight.[01]", "up.first.conv.weight.[01]")
    # The layers that feed the head are as wide as the head wants them, and cut on their other side.
    assert (result.width("up.last.conv.weight"), result.width("low.last.conv.weight")) == (16, 32)
    result.cut("up.last.conv.weight.1", "low.last.conv.weight.1")


def test_row_21_only_the_inputs_of_the_head() -> None:
    """Without a word about the head its inner widths are cut; classes and box sides are outputs, and stay. TP#160."""
    # The bins of a side are a width too: a softmax over fewer bins is another expectation, which nobody wants here.
    result = prune(Yolo(), images(size=32), keep=["detect.expected"])
    result.cut("detect.boxes.*.0.conv.weight.[01]", "detect.scores.*.0.conv.weight.[01]", "detect.*.1.weight.1")
    result.whole("of a model output", "detect.scores.0.1.weight.0", "detect.scores.1.1.weight.0")
    assert result.width("detect.boxes.0.1.weight") == 16


# ---------------------------------------------------------------------- 22
class Elan(nn.Module):
    """YOLOv7's block: two branches, one of which grows, and four of the tensors on the way concatenated."""

    def __init__(self, into: int, hidden: int, out: int, groups: int) -> None:
        super().__init__()

        def layer(a: int, b: int, kernel: int) -> nn.Sequential:
            norm = nn.GroupNorm(groups, b) if groups else nn.BatchNorm2d(b)
            return nn.Sequential(nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), norm, nn.SiLU())

        self.a, self.b = layer(into, hidden, 1), layer(into, hidden, 1)
        self.c, self.d = layer(hidden, hidden, 3), layer(hidden, hidden, 3)
        self.out = layer(4 * hidden, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.a(x), self.b(x)]
        parts.append(self.c(parts[-1]))
        parts.append(self.d(parts[-1]))
        return self.out(torch.cat(parts[::-1], 1))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("groups", [0, 4], ids=["batch_norm", "group_norm"])
def test_row_22_importance_over_flattened_and_concatenated_layers(groups: int, allocation: str) -> None:
    """Scores of units whose members are parts of wider tensors have one value for each unit. TP#268, #252."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), Elan(12, 8, 16, groups), nn.MaxPool2d(2), Elan(16, 12, 20, groups), nn.Flatten(),
        nn.Linear(20 * 16, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip
    criterion = {"name": "magnitude", "p": 1, "normalize": "max"}
    result = prune(model, images(), allocation=allocation, criterion=criterion, floor=0.2)
    if allocation == "uniform":
        result.cut("0.weight.0", "[13].[abcd].0.weight.[01]", "[13].out.0.weight.[01]", "5.weight.[01]")
    assert result.width("5.weight", 1) == 16 * result.width("3.out.0.weight")
    for block in (1, 3):
        parts = [result.width(f"{block}.{branch}.0.weight") for branch in "abcd"]
        assert result.width(f"{block}.out.0.weight", 1) == sum(parts)
    if groups:
        kept = Counter(i // 2 for i in result.pruned.plan.kept["1.a.0.weight"][0])
        norm = result.pruned.module.get_submodule("1.a.1")
        assert norm.num_groups == len(kept) and len(set(kept.values())) == 1, "each group keeps as many channels"


# ---------------------------------------------------------------------- 23
def _mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    setting = [[1, 8, 1, 1], [3, 12, 2, 2], [3, 16, 1, 1]]
    return MobileNetV2(num_classes=5, width_mult=1.0, inverted_residual_setting=setting, round_nearest=4)


def _mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    rows = [(16, 3, 16, 16, True, "RE", 2, 1), (16, 3, 36, 12, False, "HS", 1, 1), (12, 5, 36, 12, True, "HS", 1, 1)]
    return MobileNetV3([InvertedResidualConfig(*row, 1.0) for row in rows], last_channel=24, num_classes=5)


MOBILE = {"v2": _mobilenet_v2, "v3": _mobilenet_v3}


@pytest.mark.parametrize(("name", "criterion"), [("v2", "magnitude"), ("v3", "random")])
def test_row_23_depthwise_groups_follow(name: str, criterion: str) -> None:
    """A depthwise convolution has as many groups as channels, whatever scored them; nothing comes back as it was.

    TP#328, #303.
    """
    model = MOBILE[name]()
    result = prune(model, images(size=32), criterion=criterion)
    depthwise = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise
    for path in depthwise:
        layer = result.pruned.module.get_submodule(path)
        assert isinstance(layer, nn.Conv2d)
        assert layer.groups == layer.in_channels == layer.out_channels == len(layer.weight), path
    narrower = [p for p in depthwise if result.width(f"{p}.weight") < model.get_submodule(p).groups]
    assert len(narrower) >= len(depthwise) - 1
    params = result.pruned.report.params
    assert params.pruned == sum(p.numel() for p in result.pruned.module.parameters()) < params.dense


# ---------------------------------------------------------------------- 24
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, from copying any fx graph
def test_row_24_deep_copy_after_pruning() -> None:
    """The detector keeps tensors that its forward makes: none of them holds a gradient's graph. TP#374."""
    model = Yolo()
    x = images(size=32)
    pruned = prune(model, x, keep=["detect.expected"]).pruned
    for module in [*model.modules(), *pruned.module.modules()]:
        held = [v for v in vars(module).values() if isinstance(v, Tensor)] + list(module.buffers(recurse=False))
        assert all(t.grad_fn is None for t in held)
    pruned.module(x).sum().backward()  # with gradients on, as in training
    copies = [copy.deepcopy(pruned.module), copy.deepcopy(pruned).module, pickle.loads(pickle.dumps(pruned.module))]
    copies.append(copy.deepcopy(model))
    with torch.no_grad():
        expected, dense = pruned.module(x), model(x)
        for again, right in zip(copies, [expected, expected, expected, dense], strict=True):
            assert close([right], [again(x)], 1e-6)
    pruned.module.zero_grad()
    names = [n for n, p in copies[0].named_parameters() if p.requires_grad]
    copies[0](x).square().mean().backward()
    assert names and all(copies[0].get_parameter(n).grad is not None for n in names)
    assert all(p.grad is None for p in pruned.module.parameters()), "a copy shares nothing"


def test_row_24_the_model_is_as_it_was() -> None:
    """Compiling leaves nothing behind on the model: neither tensors nor attributes. TP#374."""
    model = filled(Yolo())
    before = {n: (sorted(vars(m)), vars(m).get("shape"), m.training) for n, m in model.named_modules()}
    values = {n: t.clone() for n, t in model.state_dict().items()}
    fxprune.compile(model, images(size=32), {"target": {"macs": 0.5}, "round_to": 1})
    assert {n: (sorted(vars(m)), vars(m).get("shape"), m.training) for n, m in model.named_modules()} == before
    assert model.detect.anchors.numel() == 0
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
