"""Rows 1-9: operators that move channels: chunk, cat, GLU, unbind, indexing, pixel shuffle, channel shuffle, views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.failures.checks import prune
from tests.failures.layers import C2f, ConvBN, CoordinateAttention


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(2, channels, size, size)


# ---------------------------------------------------------------------- 1
def _yolo(attention: bool) -> nn.Module:
    """A stem, two C2f blocks with their shortcuts, and a classifier."""
    tail = [CoordinateAttention(32)] if attention else []
    return nn.Sequential(
        ConvBN(3, 16, 3, 2), C2f(16, 16, 2), ConvBN(16, 32, 3, 2), C2f(32, 32, 1), *tail, ConvBN(32, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


@pytest.mark.parametrize("macs", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("attention", [False, True], ids=["c2f", "c2f_and_coordinate_attention"])
def test_row_01_yolov8_c2f(attention: bool, macs: float) -> None:
    """`chunk(2, 1)`, bottlenecks that go on from the last part, and a concatenation of all of them.

    TP#147, #477, #503, ultralytics#14171, geta#13, OTO#5.
    """
    result = prune(_yolo(attention), images(), target={"macs": macs})
    result.cut("1.first.conv.weight.[01]", "1.blocks.1.*.conv.weight.[01]", "1.last.conv.weight.[01]")
    result.cut("3.first.conv.weight.[01]", "3.blocks.0.*.conv.weight.[01]", "3.last.conv.weight.[01]")
    # The second half comes twice more, with what its two bottlenecks add.
    halves = result.pruned.plan.kept["1.first.conv.weight"][0]
    second = sum(i >= 8 for i in halves)
    assert result.width("1.last.conv.weight", 1) == len(halves) + 2 * second
    assert result.width("1.blocks.0.first.conv.weight", 1) == second


# ---------------------------------------------------------------------- 2
class Twice(nn.Module):
    """One tensor, or two in turns, several times in a concatenation."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.order = order
        self.out = nn.Conv2d(sum({"a": 12, "b": 8}[c] for c in order), 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = {"a": self.a(x).relu(), "b": self.b(x).relu()}
        return self.out(torch.cat([made[c] for c in self.order], 1))


@pytest.mark.parametrize("order", ["aa", "abab", "aba"])
def test_row_02_cat_of_one_tensor_twice(order: str) -> None:
    """Both copies lose the same channels. TP#146."""
    result = prune(Twice(order), images())
    result.cut("a.weight.0", "b.weight.0" if "b" in order else "a.bias.0", "out.weight.1")
    widths = {c: result.width(f"{c}.weight") for c in set(order)}
    assert result.width("out.weight", 1) == sum(widths[c] for c in order)


# ---------------------------------------------------------------------- 3
def test_row_03_glu() -> None:
    """The two halves of what goes into `nn.GLU` lose the same channels. TP#366."""
    model = nn.Sequential(
        nn.Conv1d(4, 24, 3, padding=1), nn.GLU(dim=1), nn.BatchNorm1d(12), nn.Conv1d(12, 16, 3), nn.GLU(dim=-2),
        nn.Flatten(), nn.Linear(8 * 14, 20), nn.GLU(), nn.Linear(10, 3),
    )  # fmt: skip
    result = prune(model, torch.randn(2, 4, 16))
    result.cut("0.weight.0", "2.weight.0", "3.weight.[01]", "6.weight.[01]", "8.weight.1")
    first = result.pruned.plan.kept["0.weight"][0]
    assert [i + 12 for i in first[: len(first) // 2]] == first[len(first) // 2 :]


# ---------------------------------------------------------------------- 4 and 5
class Attention(nn.Module):
    """Self-attention on one projection to queries, keys and values, taken apart in one of the ways people write it."""

    def __init__(
        self, apart: Callable[[Tensor, int], Any], norm: bool = False, width: int = 32, heads: int = 4
    ) -> None:
        super().__init__()
        self.apart, self.heads = apart, heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads) if norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.apart(self.qkv(x), self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        scores = (q @ k.transpose(-2, -1)) * (32 // self.heads) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _by_head(qkv: Tensor, heads: int) -> Tensor:
    n, t, c = qkv.shape
    return qkv.reshape(n, t, 3, heads, c // 3 // heads).permute(2, 0, 3, 1, 4)


def _indexed(qkv: Tensor, heads: int) -> Any:
    parts = _by_head(qkv, heads)
    return parts[0], parts[1], parts[2]


def _indexed_last(qkv: Tensor, heads: int) -> Any:
    """The part number between the heads and their dimensions."""
    parts = qkv.unflatten(-1, (heads, 3, -1)).transpose(1, 2)
    return parts[:, :, :, 0], parts[..., 1, :], parts[:, :, :, -1]


def _sliced(qkv: Tensor, heads: int) -> Any:
    c = qkv.shape[-1] // 3
    return (_split_heads(p, heads) for p in (qkv[..., :c], qkv[..., c : 2 * c], qkv[..., -c:]))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


APART: dict[str, Callable[[Tensor, int], Any]] = {
    "unbind": lambda qkv, heads: _by_head(qkv, heads).unbind(0),
    "unbind_two_dimensions_on": lambda qkv, heads: (
        p.transpose(1, 2) for p in qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    ),
    "iterated": lambda qkv, heads: tuple(_by_head(qkv, heads)),
    "indexed": _indexed,
    "indexed_in_the_middle": _indexed_last,
    "chunk": lambda qkv, heads: (_split_heads(p, heads) for p in qkv.chunk(3, -1)),
    "split": lambda qkv, heads: (_split_heads(p, heads) for p in qkv.split(qkv.shape[-1] // 3, -1)),
    "sliced": _sliced,
}


class Block(nn.Module):
    """Tokens of an image, attention, and a head."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.norm = nn.LayerNorm(32)
        self.attention = attention
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(self.norm(x))).mean(1))


def check_attention(model: nn.Module, widths: int) -> None:
    """Heads and head dimensions are cut; `widths`: whether values may become narrower than queries and keys."""
    result = prune(model, torch.randn(2, 10, 6))
    assert result.kinds == {"hidden": 1, "heads": 1, "head_dims": widths}
    result.cut("attention.qkv.weight.[01]", "attention.qkv.bias.0", "attention.proj.weight.[01]", "head.weight.1")
    (heads,) = (g.kept for g in result.pruned.report.groups if g.kind == "heads")
    queries, *_, values = [g.kept for g in result.pruned.report.groups if g.kind == "head_dims"] * 2
    assert result.width("attention.proj.weight", 1) == heads * values
    assert result.width("attention.qkv.weight") == heads * (2 * queries + values)


@pytest.mark.parametrize("way", ["unbind", "unbind_two_dimensions_on", "iterated"])
def test_row_04_qkv_unbind_with_query_and_key_norm(way: str) -> None:
    """`qkv.unbind(0)` makes three parts, however many nodes use each of them. TP#524."""
    check_attention(Block(Attention(APART[way], norm=True)), widths=1)


@pytest.mark.parametrize("way", ["indexed", "indexed_in_the_middle", "chunk", "split", "sliced"])
def test_row_05_qkv_taken_apart_by_index(way: str) -> None:
    """`qkv[0], qkv[1], qkv[2]` as in DINO, and its relatives. TP#393."""
    # Parts one behind the other can be cut each by itself; those that a reshape interleaves are cut alike.
    check_attention(Block(Attention(APART[way])), widths=1 if "indexed" in way else 2)


# ---------------------------------------------------------------------- 6
class SuperResolution(nn.Module):
    """Upsampling by pixel shuffle, `factor` at a time, with channels after it that can be cut as well."""

    def __init__(self, shuffle: Callable[[int], nn.Module], factor: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.Conv2d(16, 12 * factor**2, 3, padding=1)
        self.shuffle = shuffle(factor)
        self.act = nn.PReLU(12)
        self.last = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.body(x).relu()
        return self.last(self.act(self.shuffle(self.up(x))))


class ByHand(nn.Module):
    """Pixel shuffle written out as view, permute and reshape."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        r = self.factor
        return x.view(n, c // r**2, r, r, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // r**2, h * r, w * r)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("shuffle", [nn.PixelShuffle, ByHand])
def test_row_06_pixel_shuffle(shuffle: Callable[[int], nn.Module], factor: int) -> None:
    """A channel after the shuffle is `factor` squared channels before it. TP#98, #420."""
    result = prune(SuperResolution(shuffle, factor), images(size=6))
    result.cut("first.weight.0", "body.weight.[01]", "up.weight.[01]", "act.weight.0", "last.weight.1")
    assert result.width("up.weight") == factor**2 * result.width("last.weight", 1)


# ---------------------------------------------------------------------- 7
class ShuffleUnit(nn.Module):
    """One unit of ShuffleNetV2: half of the channels pass, the others go through a branch, then both are mixed."""

    def __init__(self, channels: int, shuffle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            ConvBN(half, half, 1), ConvBN(half, half, 3, groups=half, act=False), ConvBN(half, half, 1)
        )
        self.shuffle = shuffle

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        return self.shuffle(torch.cat([kept, self.branch(worked)], 1))


def _shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


@pytest.mark.parametrize("shuffle", [_shuffled, lambda x: F.channel_shuffle(x, 2)], ids=["views", "operator"])
def test_row_07_shufflenet_v2(shuffle: Callable[[Tensor], Tensor]) -> None:
    """view, transpose, view: the halves interleave. TP#14, #45, nni#3453."""
    model = nn.Sequential(
        ConvBN(3, 16, 3, 2), ShuffleUnit(16, shuffle), ShuffleUnit(16, shuffle), ConvBN(16, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    result = prune(model, images())
    result.cut("0.conv.weight.0", "1.branch.*.conv.weight.0", "2.branch.[02].conv.weight.[01]", "3.conv.weight.[01]")


def test_row_07_torchvision_shufflenet_v2() -> None:
    """The whole of it: units that halve the image concatenate two branches. TP#14, nni#3453."""
    from torchvision.models import ShuffleNetV2

    model = ShuffleNetV2([2, 2, 1], [8, 16, 32, 64, 48], num_classes=5)
    result = prune(model, images(size=32))
    result.cut("conv1.0.weight.0", "stage*.branch[12].*.weight.0", "conv5.0.weight.[01]", "fc.weight.1")


# ---------------------------------------------------------------------- 8
class Decoder(nn.Module):
    """A vector becomes an image: linear, view, transposed convolutions."""

    def __init__(self, unflatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 20)
        self.linear = nn.Linear(20, 16 * 4 * 4)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.last = nn.ConvTranspose2d(8, 3, 4, 2, 1)
        self.unflatten = unflatten

    def forward(self, x: Tensor) -> Tensor:
        x = self.unflatten(self.linear(self.hidden(x).relu()))
        return self.last(self.up(self.norm(x).relu()).relu())


@pytest.mark.parametrize(
    "unflatten",
    [
        lambda x: x.view(-1, 16, 4, 4),
        lambda x: x.reshape(x.shape[0], 16, 4, 4),
        lambda x: x.unflatten(1, (16, 4, 4)),
        lambda x: x[..., None].reshape(len(x), -1, 4, 4),
    ],
    ids=["view", "reshape", "unflatten", "channels_inferred"],
)
def test_row_08_linear_view_conv_transpose(unflatten: Callable[[Tensor], Tensor]) -> None:
    """One channel of the image is 16 entries of the vector. TP#125, #57."""
    result = prune(Decoder(unflatten), torch.randn(2, 6))
    result.cut("hidden.weight.0", "linear.weight.[01]", "norm.weight.0", "up.weight.[01]", "last.weight.0")
    assert result.width("linear.weight") == 16 * result.width("up.weight")


def test_row_08_conv1d_flatten_linear() -> None:
    """One channel of the signal is as many columns of the linear layer as it has samples. TP#451."""
    model = nn.Sequential(
        nn.Conv1d(2, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(16 * 7, 24),
        nn.ReLU(), nn.Linear(24, 3),
    )  # fmt: skip
    result = prune(model, torch.randn(2, 2, 16))
    result.cut("0.weight.0", "5.weight.[01]", "7.weight.1")
    assert result.width("5.weight", 1) == 7 * result.width("0.weight")


# ---------------------------------------------------------------------- 9
def rearranged_tokens(x: Tensor, patch: int) -> Tensor:
    """`b c (h p1) (w p2) -> b (h w) (p1 p2 c)`, as einops does it: reshape, permute, reshape with numbers."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


class RearrangedAttention(nn.Module):
    """Attention whose sizes are numbers in `forward`, with a class token and a fused or a written-out kernel."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm = nn.LayerNorm(32)
        self.to_qkv = nn.Linear(32, 3 * 48, bias=False)
        self.to_out = nn.Sequential(nn.Linear(48, 32), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        q, k, v = (t.reshape(b, n, 4, 12).permute(0, 2, 1, 3) for t in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 12**-0.5).softmax(-1), v)
        return x + self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, 48))


class RearrangedViT(nn.Module):
    """A vision transformer after the habits of vit_pytorch."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 32), nn.LayerNorm(32))
        self.position = nn.Parameter(torch.randn(1, 17, 32))
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.attention = nn.ModuleList([RearrangedAttention(fused) for _ in range(2)])
        self.feed = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(rearranged_tokens(x, 4))
        tokens = self.token.expand(len(x), 1, 32)
        x = torch.cat([tokens, x], 1) + self.position[:, : x.shape[1] + 1]
        for layer in self.attention:
            x = layer(x)
        return self.head((x + self.feed(x))[:, 0])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "einsum"])
def test_row_09_vit_with_constants_in_forward(fused: bool) -> None:
    """Numbers that code passes to reshape, expand and einsum follow what is cut. TP#357, #450."""
    result = prune(RearrangedViT(fused), images())
    assert result.kinds == {"hidden": 2, "heads": 2, "head_dims": 4}
    result.cut("attention.*.to_qkv.weight.[01]", "attention.*.to_out.0.weight.[01]", "feed.[13].weight.[01]", "token.2")
    result.whole("of the input", "embed.0.weight.0")
