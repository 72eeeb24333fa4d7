"""Rows 35 and 37: what tables of operators lacked: YOLO stems, grouped convolutions, space to depth, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import RecipeError
from tests.failures.checks import compare, filled, prune
from tests.failures.layers import SPPF, Bottleneck, C2f, ConvBN


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


class Pooled(nn.Module):
    """Layers and a classifier."""

    def __init__(self, channels: int, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


# ---------------------------------------------------------------------- 35
class Focus(nn.Module):
    """YOLOv5's stem: every second pixel in four ways, concatenated."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv = ConvBN(4 * into, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.conv(torch.cat(parts, 1))


class C3(nn.Module):
    """YOLOv5's block: two branches side by side, one of them with bottlenecks."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first, self.second = ConvBN(into, out // 2), ConvBN(into, out // 2)
        self.blocks = nn.Sequential(Bottleneck(out // 2))
        self.last = ConvBN(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat((self.blocks(self.first(x)), self.second(x)), dim=1))


class RepVGG(nn.Module):
    """YOLOv6's block while it is trained: 3 x 3, 1 x 1 and identity, each with its batch norm."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.dense = ConvBN(channels, channels, 3, groups=groups, act=False)
        self.point = ConvBN(channels, channels, 1, groups=groups, act=False)
        self.same = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.same(x))


class FaceUnit(nn.Module):
    """ShuffleFaceNet's unit: halves by slices, PReLU for each channel, a shuffle of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            ConvBN(half, half, act=nn.PReLU(half)),
            ConvBN(half, half, 3, groups=half, act=False),
            ConvBN(half, half, act=nn.PReLU(half)),
        )

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half], self.branch(x[:, half:])], 1)
        n, c, h, w = x.shape
        return x.reshape(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)


class GlobalDepthwise(nn.Module):
    """A depthwise convolution as large as the image instead of a mean, and an embedding."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, size, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "yolov5": (
        lambda: Pooled(32, Focus(3, 16), C3(16, 16), Focus(16, 24), C3(24, 32), SPPF(32, 32)),
        ["layers.0.conv.conv.weight.0", "layers.1.*.conv.weight.[01]", "layers.2.conv.conv.weight.[01]",
         "layers.4.*.conv.weight.[01]"],
    ),
    "yolov6": (
        lambda: Pooled(24, ConvBN(3, 24, 3, 2), RepVGG(24), RepVGG(24)),
        ["layers.0.conv.weight.0", "layers.[12].*.conv.weight.[01]", "layers.[12].same.weight.0"],
    ),
    "yolov8": (
        lambda: Pooled(32, ConvBN(3, 16, 3, 2), C2f(16, 16, 2), ConvBN(16, 32, 3, 2), C2f(32, 32, 1), SPPF(32, 32)),
        ["layers.[02].conv.weight.0", "layers.[134].*.conv.weight.[01]"],
    ),
    "shuffle_face_net": (
        lambda: Pooled(
            32, ConvBN(3, 24, 3, 2, act=nn.PReLU(24)), FaceUnit(24), FaceUnit(24), ConvBN(24, 32),
            GlobalDepthwise(32, 8),
        ),
        ["layers.0.*.weight.0", "layers.[12].branch.*.weight.0", "layers.3.conv.weight.[01]", "layers.4.*.weight.0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_row_35_yolo_and_face_nets(name: str) -> None:
    """Slices with a step, sums of branches, PReLU for each channel. OTO#5, #17, #39, #57."""
    build, dimensions = NETS[name]
    result = prune(build(), images())
    result.cut(*dimensions, "head.weight.1")
    if name == "yolov5":
        assert result.width("layers.2.conv.conv.weight", 1) == 4 * result.width("layers.1.last.conv.weight")
        result.whole("of the input", "layers.0.conv.conv.weight.1")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("groups", "out"), [(4, 24), (4, 48), (2, 24), (3, 12)])
def test_row_35_grouped_convolution(groups: int, out: int, transposed: bool) -> None:
    """Groups that are not as many as channels: whole groups can go, and channels inside all of them. OTO#45."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = Pooled(16, ConvBN(3, 24, 3), kind(24, out, 3, padding=1, groups=groups), nn.ReLU(), ConvBN(out, 16, 1))
    result = prune(model, images())
    result.cut("layers.0.conv.weight.0", "layers.3.conv.weight.1")
    left: Any = result.pruned.module.get_submodule("layers.1").groups
    weight = result.pruned.module.get_parameter("layers.1.weight")
    into, made = (left * weight.shape[1], weight.shape[0])[:: -1 if transposed else 1]
    assert into == result.width("layers.0.conv.weight") and made == result.width("layers.3.conv.weight", 1)
    assert weight.numel() < model.get_parameter("layers.1.weight").numel()


def test_row_35_transformer() -> None:
    """Attention, norms and embeddings need no list of layers that cannot be pruned. OTO#46."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(3, 50, (2, 9))
    result = prune(
        BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, keep=[]
    )
    result.cut("*.query.weight.0", "*.value.weight.0", "*.intermediate.dense.weight.0", "*.output.dense.weight.1")


def test_row_35_what_stays_whole_is_said_by_name() -> None:
    """Names of modules, which no version of torch changes; a name that is not there is an error. OTO#17, #46."""
    build, _ = NETS["yolov5"]
    model, x = build(), images()
    result = prune(model, x, keep=["layers.1.blocks", "head"], least=0.2)
    for name, parameter in model.named_parameters():
        if name.startswith(("layers.1.blocks.", "head.")):
            assert result.pruned.module.get_parameter(name).shape == parameter.shape, name
    result.cut("layers.0.conv.conv.weight.0", "layers.1.second.conv.weight.[01]", "layers.2.conv.conv.weight.0")
    with pytest.raises(RecipeError, match=r"'layers.1.block' matches no module and no parameter of the model"):
        fxprune.compile(model, x, {"target": {"macs": 0.5}, "keep": ["layers.1.block"]})


def test_row_35_frozen_layers_are_cut_with_the_others() -> None:
    """Weights that are not trained are weights: no group is empty because of them, and they stay untrained. OTO#57."""
    build, dimensions = NETS["yolov8"]
    model = build()
    model.layers[:2].requires_grad_(False)
    result = prune(model, images())
    result.cut(*dimensions)
    for name, parameter in model.named_parameters():
        assert result.pruned.module.get_parameter(name).requires_grad is parameter.requires_grad, name


# ---------------------------------------------------------------------- 37
class Darknet(nn.Module):
    """YOLOv3 in small: residual stages, routes that are upsampled and concatenated, three scales of output."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.1)
        self.stem = ConvBN(3, 8, 3, act=act)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvBN(8 * 2**i, 16 * 2**i, 3, 2, act=act), Bottleneck(16 * 2**i)) for i in range(3)
        )
        self.necks = nn.ModuleList([ConvBN(64, 16, 1, act=act), ConvBN(32 + 8, 16, 1), ConvBN(16 + 8, 16, 1)])
        self.routes = nn.ModuleList([ConvBN(16, 8, 1, act=act), ConvBN(16, 8, 1)])
        self.heads = nn.ModuleList([nn.Conv2d(16, 3 * 7, 1) for _ in range(3)])
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        made, route = [], None
        for i, (neck, head) in enumerate(zip(self.necks, self.heads, strict=True)):
            x = neck(maps[-1 - i] if route is None else torch.cat((self.up(route), maps[-1 - i]), 1))
            n, _, h, w = x.shape
            made.append(head(x).view(n, 3, 7, h, w).permute(0, 1, 3, 4, 2).contiguous())
            route = self.routes[i](x) if i < 2 else None
        return made


def test_row_37_yolov3() -> None:
    """Routes, upsampling and concatenation. aimet#1392."""
    result = prune(Darknet(), images(32))
    result.cut("stem.conv.weight.0", "stages.*.conv.weight.[01]", "necks.*.conv.weight.[01]", "heads.*.weight.1")
    stages = [result.width(f"stages.{i}.0.conv.weight") for i in range(3)]
    for neck, route, stage in ((1, 0, 1), (2, 1, 0)):
        assert (
            result.width(f"necks.{neck}.conv.weight", 1) == result.width(f"routes.{route}.conv.weight") + stages[stage]
        )


@pytest.mark.parametrize("dim", [1, -3])
def test_row_37_concatenation(dim: int) -> None:
    """Branches of several widths, one of which is the input itself. aimet#732."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = ConvBN(3, 12, 3), ConvBN(3, 20, 1)
            self.last = ConvBN(12 + 3 + 20, 8, 1)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(torch.cat([self.a(x), x, self.b(x)], dim)))

    result = prune(Branches(), images())
    result.cut("[ab].conv.weight.0", "last.conv.weight.[01]", "head.weight.1")
    assert {12, 13, 14} <= set(result.pruned.plan.kept["last.conv.weight"][1]), "the channels of the input stay"


def test_row_37_efficientnet() -> None:
    """Squeeze and excitation, depthwise convolutions and swish, in the arrangement of EfficientNet-B1. aimet#862."""
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 16, 8, 2, 1, 1), MBConvConfig(6, 5, 2, 8, 12, 2, 1, 1)]
    result = prune(EfficientNet(blocks, dropout=0.2, num_classes=5, last_channel=48), images(32))
    result.cut("features.0.0.weight.0", "features.*.block.*.0.weight.0", "features.*.fc1.weight.1")
    result.cut("features.*.fc2.weight.0")
    result.cut("features.3.0.weight.[01]", "classifier.1.weight.1")


def _by_views(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


@pytest.mark.parametrize(
    "way", [_by_views, nn.PixelUnshuffle(2), lambda x: F.unfold(x, 2, stride=2)], ids=["views", "operator", "unfold"]
)
def test_row_37_space_to_depth(way: Callable[[Tensor], Tensor]) -> None:
    """A channel becomes one for each pixel of a block, in front of the channels or behind them. aimet#356."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = ConvBN(3, 12, 3)
            self.second = ConvBN(48, 16, 1)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(self.second(way(x).reshape(len(x), -1, x.shape[2] // 2, x.shape[3] // 2)))

    result = prune(Net(), images(8))
    result.cut("first.conv.weight.0", "second.conv.weight.[01]", "head.weight.1")
    assert result.width("second.conv.weight", 1) == 4 * result.width("first.conv.weight")


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_row_37_transposed_convolution(groups: int) -> None:
    """Its weight has the input first; grouped ones too. aimet#832."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ConvTranspose2d(12, 24, 4, 2, 1, groups=groups), nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 5, 3, 2, 1, output_padding=1),
    )  # fmt: skip
    result = prune(model, images(8))
    result.cut("0.weight.0", "1.weight.0", "2.weight.0", "4.weight.0")
    assert result.width("1.weight") == result.width("0.weight")
    assert result.width("4.weight") == result.width("2.weight")


class Constants(nn.Module):
    """Tensors made in the forward pass in the shape of activations, and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(2 * 16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, t, c = x.shape
        half = torch.full((n, t, c), 0.5)
        steps = torch.arange(c, dtype=x.dtype).expand(n, t, c).transpose(0, 1).transpose(1, 0) / c
        x = torch.where(x > half, x, half * 2) + steps + x.new_ones(c)
        x = torch.cat(
            [
                x,
                torch.full_like(x, 0.25) * x.mT.mT,
            ],
            -1,
        )
        return self.head(self.second(x).transpose(1, 2).relu().transpose(2, 1))


def test_row_37_full_and_transpose() -> None:
    """Sizes that `torch.full`, `expand` and `arange` were given follow what is cut. aimet#4011."""
    result = prune(Constants(), torch.randn(2, 7, 6))
    result.cut("first.weight.0", "second.weight.[01]", "head.weight.1")
    assert result.width("second.weight", 1) == 2 * result.width("first.weight")


@torch.library.custom_op("fxprune_failures::unheard_of", mutates_args=())
def unheard_of(x: Tensor) -> Tensor:
    """Mix all channels in a way that nobody has written a rule for."""
    return x.cumsum(1).flip(1)


@unheard_of.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_row_37_unsupported_operators_are_skipped() -> None:
    """What touches an operator without a rule stays whole, is reported, and all the rest is cut. aimet#732, #1968."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.touching = ConvBN(3, 16, 3), ConvBN(16, 12, 3)
            self.after = ConvBN(12, 16, 3)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.after(torch.ops.fxprune_failures.unheard_of(self.touching(self.before(x)))))

    model = filled(Net())
    pruned = fxprune.compile(model, images(), {"target": {"macs": 0.55}, "round_to": 1})
    report: Any = pruned.report
    assert report.unknown == {"fxprune_failures.unheard_of.default": 1}
    assert "no rule for fxprune_failures.unheard_of.default (1 x): what it touches stays whole" in report.lines()
    shapes = {name: tuple(p.shape[:2]) for name, p in pruned.module.named_parameters() if p.dim() == 4}
    assert shapes["touching.conv.weight"][0] == shapes["after.conv.weight"][1] == 12
    for dimension in ("touching.conv.weight.0", "after.conv.weight.1"):
        assert report.whole[dimension] == "fxprune_failures.unheard_of.default has no rule"
    assert shapes["before.conv.weight"][0] == shapes["touching.conv.weight"][1] < 16
    assert shapes["after.conv.weight"][0] == shapes["head.weight"][1] < 16
    compare(model, pruned, images())
