"""Rows 30-32: layers taken out, models pruned again, constants that removed channels leave, sets of coupled layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.failures.checks import filled, prune
from tests.failures.layers import Bottleneck, ConvBN
from tests.rules.checks import close


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(2, channels, size, size)


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(x)
    return result


#: Copying the description of a graph module's inputs makes torch warn of a class of its own.
deep_copies = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


# ---------------------------------------------------------------------- 30
def _residual_net() -> nn.Sequential:
    return nn.Sequential(
        ConvBN(3, 16, 3, 2), Bottleneck(16), Bottleneck(16), Bottleneck(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def test_row_30_block_replaced_by_identity() -> None:
    """A user takes a whole block out before the widths are cut. TP#254."""
    model = _residual_net()
    model[2] = nn.Identity()
    result = prune(model, images())
    result.cut("0.conv.weight.0", "[13].*.conv.weight.[01]", "6.weight.1")
    assert not any(name.startswith("2.") for name, _ in result.pruned.module.named_parameters())


@deep_copies
def test_row_30_block_taken_out_of_a_pruned_model() -> None:
    """What comes out is a module tree like any other: a block of it can be replaced, and the rest cut again. TP#254."""
    model = _residual_net()
    first = prune(model, images(), target={"macs": 0.7}).pruned
    node = next(n for n in first.module.graph.nodes if n.op == "call_function" and "add" in str(n.target))
    shortcut = next(a for a in node.args if "2_second" not in a.name and "1_second" not in a.name)
    node.replace_all_uses_with(shortcut)  # the block adds nothing any more
    first.module.graph.eliminate_dead_code()
    first.module.recompile()
    second = prune(first.module, images())
    second.cut("0.conv.weight.0", "6.weight.1")
    # The layers of the block that was taken out are there, and no part of what is computed.
    assert any("take no part in the outputs" in note for note in second.pruned.report.notes)


@pytest.mark.parametrize(
    "silent",
    [
        "conv",
        pytest.param("bn", marks=pytest.mark.xfail(strict=True, reason="a scale of zero is not followed backwards")),
    ],
)
def test_row_30_a_silent_branch_goes_without_changing_the_output(silent: str) -> None:
    """Of a block that adds a constant one channel is left, for a layer is never empty. TP#254."""
    model = filled(_residual_net())
    with torch.no_grad():
        model[2].second.get_submodule(silent).weight.zero_()
    pruned = fxprune.compile(model, images(), {"target": {"dead": True}})
    x = torch.randn(5, 3, 16, 16)
    assert close([outputs(model, x)], [outputs(pruned.module, x)], 1e-5)
    assert pruned.module.get_parameter("1.first.conv.weight").shape[0] == 16
    assert pruned.module.get_parameter("2.first.conv.weight").shape[0] == 1


def _convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=5, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), patch_size=2)


@deep_copies
@pytest.mark.parametrize("build", [_convnext, _residual_net], ids=["convnext", "resnet"])
def test_row_30_pruned_again_and_again(build: Any) -> None:
    """A second and a third pass start from the result of the one before, and are as right as the first. TP#119."""
    model = build()
    x = images(size=32)
    macs = []
    for _ in range(3):
        result = prune(model, x, target={"macs": 0.7})
        macs += [result.pruned.report.macs.dense, result.pruned.report.macs.pruned]
        wide = [n for n, p in model.named_parameters() if p.dim() == 4 and "dw" not in n]
        result.cut(*(f"{n}.0" for n in wide))
        model = result.pruned.module
    assert macs[1] == macs[2] and macs[3] == macs[4]
    assert macs[5] < 0.7**3 * macs[0]


class FromNothing(nn.Module):
    """Widths that no layer makes: of a learned tensor, of a buffer, of an input that is embedded by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(7, 24))
        self.register_buffer("grid", torch.randn(7, 20))
        self.of_query = nn.Linear(24, 16)
        self.of_grid = nn.Linear(20, 16)
        self.of_input = nn.Linear(6, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.of_query(self.query.sin()) + self.of_grid(self.grid)
        return self.head((self.of_input(x) + made).relu())


def test_row_30_groups_that_begin_where_a_layer_takes_its_input() -> None:
    """Input columns of a layer are cut with the tensor they meet, though no layer's output makes it. TP#520."""
    result = prune(FromNothing(), torch.randn(2, 7, 6))
    result.cut("query.1", "of_query.weight.[01]", "of_grid.weight.[01]", "of_input.weight.0", "head.weight.1")
    assert result.pruned.module.get_buffer("grid").shape[1] == result.width("of_grid.weight", 1) < 20
    result.whole("dimension 2 of the input 'x'", "of_input.weight.1")


# ---------------------------------------------------------------------- 31
def _shifted(padding: int, activation: nn.Module) -> nn.Sequential:
    """Batch norm gives a silent channel a constant, which the next convolution sees, but not in its padding."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), activation, nn.Conv2d(16, 12, 3, padding=padding),
        nn.BatchNorm2d(12), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


ACTIVATIONS = [nn.ReLU(), nn.Sigmoid(), nn.Softplus()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_row_31_output_equals_the_masked_model(padding: int, activation: nn.Module) -> None:
    """A removed channel contributes nothing: neither its values nor batch norm's shift of them. nni#2130, #3010."""
    result = prune(_shifted(padding, activation), images())
    result.cut("0.weight.0", "1.weight.0", "3.weight.[01]", "4.bias.0", "8.weight.1")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_row_31_constants_of_silent_channels(padding: int, activation: nn.Module) -> None:
    """Channels that training zeroed before batch norm are constants, and go. nni#2130, #3010."""
    model = filled(_shifted(padding, activation))
    silent, without = [1, 4, 5, 9, 14], 3
    with torch.no_grad():
        model[0].weight[silent] = 0
        model[3].weight[:, without] = 0  # this one is not constant, and nobody looks at it
        model[3].weight[[0, 7]] = 0
        if padding:
            model[1].bias[silent] = -30  # else its padding would not be the constant that it is inside
            model[1].running_mean[silent] = 0
    pruned = fxprune.compile(model, images(), {"target": {"dead": True}})
    kept = pruned.plan.kept["0.weight"][0]
    assert without not in kept
    assert pruned.module.get_parameter("3.weight").shape[0] == 10
    if not padding or isinstance(activation, nn.ReLU):
        assert sorted({*range(16)} - {*silent, without}) == kept
    assert pruned.report.proof.lossless
    x = torch.randn(5, 3, 16, 16)
    assert close([outputs(model, x)], [outputs(pruned.module, x)], 1e-5)


# ---------------------------------------------------------------------- 32
class Reshaped(nn.Module):
    """Channels seen as parts of four, each part summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.size()
        return self.last(self.norm(x.view(n, c // 4, 4, h, w).sum(2)).relu())


class Gated(nn.Module):
    """A gate of one channel, normalised, for each pixel, and one of all channels for the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBN(3, 16, 3)
        self.spatial = nn.Sequential(nn.Conv2d(16, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())
        self.channel = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Hardsigmoid())
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(torch.mul(x, self.spatial(x)) * self.channel(x.mean((2, 3), keepdim=True)))


class Sets(nn.Module):
    """Sums of layers: of equal widths, of one channel for all, and of what was summed before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (ConvBN(3, 16, 3) for _ in range(3))
        self.one = ConvBN(3, 1, 3)
        self.d = ConvBN(16, 16, 1)
        self.last = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x) + self.b(x) + self.one(x)
        second = torch.maximum(self.c(x), self.one(x))
        return self.last(torch.cat([first + self.d(first), second], 1))


class DepthwiseOfConcat(nn.Module):
    """Depthwise convolutions of concatenated and of expanded channels, whose groups follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvBN(3, 10, 3), ConvBN(3, 6, 3)
        self.depthwise = ConvBN(16, 16, 3, groups=16)
        self.expand = ConvBN(16, 48, 1)
        self.wide = ConvBN(48, 48, 3, groups=48)
        self.twice = nn.Conv2d(48, 96, 3, padding=1, groups=48)
        self.project = ConvBN(96, 16, 1, act=False)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.cat([self.a(x), self.b(x)], 1))
        return self.last(x + self.project(self.twice(self.wide(self.expand(x)))))


CASES: dict[str, tuple[Any, list[str]]] = {
    "reshape": (Reshaped, ["conv.weight.0", "norm.weight.0", "last.weight.1"]),
    "mul_and_one_channel_batch_norm": (
        Gated,
        ["conv.*.weight.0", "spatial.0.weight.1", "channel.0.weight.1", "channel.2.weight.0", "last.weight.1"],
    ),
    "dependency_sets": (Sets, ["[abc].conv.weight.0", "d.conv.weight.[01]", "last.weight.1"]),
    "depthwise_groups": (
        DepthwiseOfConcat,
        [
            "[ab].conv.weight.0",
            "depthwise.*.weight.0",
            "wide.*.weight.0",
            "twice.weight.0",
            "project.conv.weight.[01]",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_row_32_dependency_rules(name: str) -> None:
    """Widths of what is reshaped, multiplied, summed and grouped. nni#5449, #4540, #5736, #4583, #5298, #2666."""
    build, dimensions = CASES[name]
    result = prune(build(), images())
    result.cut(*dimensions)
    if name == "reshape":
        assert result.width("conv.weight") % result.width("last.weight", 1) == 0
    if name == "dependency_sets":
        assert result.pruned.plan.kept["a.conv.weight"] == result.pruned.plan.kept["b.conv.weight"]
        assert result.pruned.plan.kept["a.conv.weight"] != result.pruned.plan.kept["c.conv.weight"]
    if name == "depthwise_groups":
        groups = {m.groups for m in result.pruned.module.modules() if isinstance(m, nn.Conv2d)}
        expanded, joined = result.width("expand.conv.weight"), result.width("depthwise.conv.weight")
        assert groups == {1, joined, expanded} and result.width("twice.weight") % expanded == 0
        # Both layers in the concatenation and the sum with it lose channels of their own.
        assert joined == result.width("a.conv.weight") + result.width("b.conv.weight") == result.width("last.weight", 1)


@pytest.mark.parametrize(
    ("kept", "whole", "share"),
    [("a", {"a"}, 0.5), ("depthwise", {"a", "b"}, 0.8), ("wide", {"expand"}, 0.55), ("project.bn", {"a", "b"}, 0.8)],
)
def test_row_32_what_depends_on_a_kept_layer_is_whole(kept: str, whole: set[str], share: float) -> None:
    """All that a layer that stays depends on stays with it, and no more. nni#4583."""
    result = prune(DepthwiseOfConcat(), images(), target={"macs": share}, keep=[kept], least=0.2)
    for layer in ("a", "b", "expand"):
        now, before = (m.get_parameter(f"{layer}.conv.weight").shape[0] for m in (result.pruned.module, result.model))
        assert (now == before) == (layer in whole), layer
