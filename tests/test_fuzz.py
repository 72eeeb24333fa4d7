"""Random networks: whatever is built from the usual layers is captured, analysed, rewritten and proved.

A network grows during its first forward pass: each step looks at the shape of the running value (images, tokens or
vectors), draws one of the layers that fit, and notes what it drew, so that later passes do the same. `make fuzz` runs
more examples, and other ones each time.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from rules import FAMILIES, Net, checks, randomise
from rules.samples_experts import FALLBACK as GROUPED
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fxprune.rules.core import rule_of

EXAMPLES = int(os.environ.get("FXPRUNE_FUZZ", "300"))
REACHED: Counter[str] = Counter()
T = TypeVar("T")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:(var|std)\(\). degrees of freedom is <= 0"),  # one unit is left
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),  # torch.backends.mkldnn.flags
]


class Grown(Net):
    """A network whose choices were drawn at its first pass and are read off a tape afterwards."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        super().__init__(_grow)
        self.draw: Any = draw
        self.tape: list[Any] = []
        self.steps: list[str] = []
        self.place = 0

    def forward(self, *inputs: Any) -> Any:
        self.place = 0
        return super().forward(*inputs)

    def choose(self, options: Sequence[T]) -> T:
        """One of the options."""
        if self.draw is not None:
            self.tape.append(self.draw(st.integers(0, len(options) - 1)))
        self.place += 1
        return options[self.tape[self.place - 1]]

    def __repr__(self) -> str:
        return f"Grown({', '.join(self.steps)}; {self.tape})"


def divisors(n: int, *, proper: bool = False) -> list[int]:
    """Divisors of n; proper ones are neither 1 nor n."""
    found = [d for d in range(1, n + 1) if n % d == 0]
    return [d for d in found if 1 < d < n] if proper else found


WIDTHS = [4, 6, 8, 12]
Step = Callable[[Grown, Tensor], Tensor]


def activated(net: Grown, x: Tensor) -> Tensor:
    """One of the activations."""
    kinds: list[Callable[[Tensor], Tensor]] = [
        *(F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.hardswish, torch.abs, torch.sin, F.softplus, F.elu),
        *(lambda y: y.clamp(-1, 1), lambda y: y * torch.sigmoid(1.7 * y), lambda y: F.dropout(y, 0.1, net.training)),
    ]
    return net.choose(kinds)(x)


# ---------------------------------------------------------------------- any rank; channels where `_channels` says
def _channels(x: Tensor) -> int:
    return 1 if x.dim() == 4 else x.dim() - 1


def projected(net: Grown, x: Tensor, out: int | None = None) -> Tensor:
    """A linear layer, or a convolution with a kernel of one pixel."""
    out = out or net.choose(WIDTHS)
    return net.conv(x, out) if x.dim() == 4 else net.linear(x, out, net.choose([True, False]))


def activation(net: Grown, x: Tensor) -> Tensor:
    return activated(net, x)


def projection(net: Grown, x: Tensor) -> Tensor:
    return projected(net, x)


def residual(net: Grown, x: Tensor) -> Tensor:
    width = x.shape[_channels(x)]
    return x + projected(net, activated(net, projected(net, x)), width)


def glu(net: Grown, x: Tensor) -> Tensor:
    dim = _channels(x)
    y = x if x.shape[dim] % 2 == 0 and net.choose([True, False]) else projected(net, x, 8)
    return F.glu(y, dim)


def gated(net: Grown, x: Tensor) -> Tensor:
    """Multiplied by a gate of its own, or by one number for all channels."""
    width = net.choose([x.shape[_channels(x)], 1])
    return x * projected(net, x, width).sigmoid()


def joined(net: Grown, x: Tensor) -> Tensor:
    """Several branches, some of them the same tensor, in any order."""
    branches = [x, projected(net, x), activated(net, x)]
    order = net.choose([(0, 1), (1, 0), (0, 0, 1), (1, 2), (2, 1, 2), (1, 1)])
    return _limited(net, torch.cat([branches[i] for i in order], _channels(x)))


def _limited(net: Grown, x: Tensor) -> Tensor:
    """Keep sizes tiny."""
    return x if x.shape[_channels(x)] <= 24 else projected(net, x)


def split(net: Grown, x: Tensor) -> Tensor:
    """Taken apart along the channels, and put together in another order or way."""
    dim, width = _channels(x), x.shape[_channels(x)]
    if width % 2 == 0:
        kind = net.choose(["chunk", "tensor_split", "unbind", "sizes"])
    else:
        kind = "sizes"
    if kind == "chunk":
        parts = list(x.chunk(2, dim))
    elif kind == "tensor_split":
        parts = list(torch.tensor_split(x, 2, dim))
    elif kind == "unbind":
        parts = list(x.unflatten(dim, (2, width // 2)).unbind(dim))
    else:
        at = net.choose(range(1, width))
        parts = list(x.split([at, width - at], dim))
    if parts[0].shape == parts[1].shape and net.choose([True, False]):
        return parts[0] * activated(net, parts[1])
    return torch.cat([activated(net, parts[1]), parts[0]], dim)


def sliced(net: Grown, x: Tensor) -> Tensor:
    """A run of channels, or two that overlap."""
    width = x.shape[_channels(x)]
    start = net.choose(range(width - 1))
    piece = x.narrow(_channels(x), start, net.choose(range(1, width - start)) + 1)
    if net.choose([True, False]):
        return torch.cat([piece, x], _channels(x))
    return piece


def padded(net: Grown, x: Tensor) -> Tensor:
    """Channels, or the dimension before or after them, are padded with a constant."""
    amounts = net.choose([(1, 1), (0, 2), (2, 0)])
    if x.dim() != 4:
        return F.pad(x, amounts, value=0.5)
    kind = net.choose(["channels", "zeros", *(["reflect"] if min(x.shape[-2:]) > 1 else [])])
    return (
        F.pad(x, (0, 0, 0, 0, *amounts))
        if kind == "channels"
        else F.pad(x, (1, 1, 1, 1), *(["reflect"] * (kind != "zeros")))
    )


def written(net: Grown, x: Tensor) -> Tensor:
    """Some channels are written in place."""
    y = x.clone()
    width = x.shape[_channels(x)]
    at = net.choose(range(1, width))
    y.narrow(_channels(x), 0, at).mul_(2) if net.choose([True, False]) else y.narrow(
        _channels(x), at, width - at
    ).zero_()
    return y + x


def reduced(net: Grown, x: Tensor) -> Tensor:
    """Compared with a statistic of its channels."""
    dim = _channels(x)
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.softmax(dim),
        lambda y: y - y.mean(dim, keepdim=True),
        lambda y: y - y.amax(dim, keepdim=True),
        lambda y: y * torch.rsqrt(y.square().mean(dim, keepdim=True) + 0.1),
        lambda y: y - y.logsumexp(dim, keepdim=True),
        lambda y: y / (y.norm(dim=dim, keepdim=True) + 0.1),
        lambda y: y / (1 + y.var(dim, keepdim=True, unbiased=False)),
        lambda y: y * y.sum(dim, keepdim=True).tanh(),
        lambda y: y.masked_fill(y < y.amin(dim, keepdim=True) + 0.1, 0.3),
        lambda y: F.normalize(y + 0.1, dim=dim),
    ]
    return net.choose(kinds)(x)


def position_table(net: Grown, x: Tensor) -> Tensor:
    return x + net.parameter(1, *x.shape[1:]) if x.dim() > 2 else x * net.parameter(x.shape[1])


def shuffled(net: Grown, x: Tensor) -> Tensor:
    """Channels as (groups, width) become (width, groups): view, transpose, view."""
    width = x.shape[_channels(x)]
    groups = net.choose(divisors(width))
    if x.dim() != 4:
        return x.unflatten(-1, (groups, width // groups)).transpose(-1, -2).flatten(-2)
    n, _, h, w = x.shape
    return x.view(n, groups, width // groups, h, w).transpose(1, 2).reshape(n, -1, h, w)


def tied(net: Grown, x: Tensor) -> Tensor:
    """One weight there and, transposed, back."""
    x = x.flatten(1) if x.dim() == 4 else x
    weight = net.parameter(net.choose(WIDTHS), x.shape[-1])
    return F.linear(activated(net, F.linear(x, weight)), weight.t())


def heads_scaled(net: Grown, x: Tensor) -> Tensor:
    """Channels as heads, each with its own table."""
    if x.dim() == 4:
        return x * net.parameter(x.shape[1], 1, 1)
    heads = net.choose(divisors(x.shape[-1]))
    y = x.unflatten(-1, (heads, -1))
    y = y * net.parameter(*net.choose([(heads, 1), (y.shape[-1],), (heads, y.shape[-1])]))
    y = net.layer(lambda: nn.RMSNorm(y.shape[-1], eps=0.1))(y) if net.choose([True, False]) else y
    return y.flatten(-2)


def stacked(net: Grown, x: Tensor) -> Tensor:
    both = torch.stack([x, projected(net, x, x.shape[_channels(x)])], net.choose([0, 1, -1]))
    return both.sum(net.choose([0])) if both.shape[0] == 2 and both.shape[1:] == x.shape else x + both.mean()


def ordered(net: Grown, x: Tensor) -> Tensor:
    """Compared with what ranks its channels, or the values of each."""
    dim, other = _channels(x), x.dim() - 1 if x.dim() == 4 else max(x.dim() - 2, 1)
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: y - y.median(dim, keepdim=True)[0],
        lambda y: y - y.kthvalue(2, dim, keepdim=True)[0],
        lambda y: y - y.quantile(0.4, dim, keepdim=True),
        lambda y: y.cummax(other)[0],
        lambda y: y.msort(),
        lambda y: y * torch.bucketize(y.contiguous(), torch.tensor([-0.5, 0.5])),
    ]
    # Sums that differ in the last bit may rank otherwise: constants far apart keep the order.
    spread = torch.arange(x.shape[dim]).float().view(-1, *[1] * (x.dim() - 1 - dim)) * 50
    kind = net.choose(range(len(kinds)))
    return kinds[kind](x + spread) if kind < 3 else kinds[kind](x)


def spectral(net: Grown, x: Tensor) -> Tensor:
    """Filtered in the frequencies of the last dimension, or of rows and columns."""
    if x.dim() == 4 and net.choose([True, False]):
        return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]) + x
    dim = net.choose(range(1, x.dim()))
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: torch.fft.irfft(torch.fft.rfft(y, dim=dim) * 0.5, n=y.shape[dim], dim=dim),
        lambda y: torch.fft.fft(y, dim=dim).real,
        lambda y: torch.view_as_real(torch.fft.rfft(y, dim=dim)).sum(-1).sum(dim, keepdim=True).tanh() + y,
    ]
    return net.choose(kinds)(x)


def side_by_side(net: Grown, x: Tensor) -> Tensor:
    """Joined or cut along the dimension that the operator's name says."""
    y = projected(net, x, x.shape[_channels(x)])
    if x.dim() == 4:
        return _limited(net, net.choose([torch.hstack, torch.column_stack])([x, y]))  # type: ignore[operator]
    if x.dim() == 3:
        kinds: list[Callable[[], Tensor]] = [
            lambda: _limited(net, torch.dstack([x, y])),
            lambda: torch.hstack([x[:, :1], y]),
            lambda: torch.fliplr(x) + y,
            lambda: x * torch.diagonal(net.parameter(x.shape[-1], x.shape[-1])),
            lambda: x @ torch.diag_embed(net.parameter(x.shape[-1])),
        ]
        return net.choose(kinds)()
    pair: list[Callable[[], Tensor]] = [
        lambda: torch.hstack([y, x]),
        lambda: torch.vstack([x, y])[: x.shape[0]],
        lambda: F.linear(x, torch.block_diag(net.parameter(2, x.shape[1] // 2), net.parameter(3, -(-x.shape[1] // 2)))),
        lambda: x * torch.diag(net.parameter(x.shape[1], x.shape[1])),
        lambda: torch.stack(torch.broadcast_tensors(x, y[:, :1]), 1).sum(1),
    ]
    return net.choose(pair)()


# ---------------------------------------------------------------------- images
def sampled(net: Grown, x: Tensor) -> Tensor:
    """Read at places that a layer computes from the picture, or turned by a constant map."""
    n = x.shape[0]
    if net.choose([True, False]):
        places = F.affine_grid(
            torch.tensor([[[0.9, 0.1, 0.05], [-0.1, 0.8, 0.1]]]).expand(n, -1, -1), [n, 1, 3, 3], False
        )
    else:
        places = net.conv(x, 2).permute(0, 2, 3, 1).tanh()
    return F.grid_sample(x, places, net.choose(["bilinear", "bicubic"]), net.choose(["zeros", "border"]), False)


def unpooled(net: Grown, x: Tensor) -> Tensor:
    """Largest values, and back to where they were."""
    x = _even(x)
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(activated(net, y), places, 2) + x


def conv(net: Grown, x: Tensor) -> Tensor:
    out = net.choose(WIDTHS)
    kernel, stride = net.choose([1, 3]), net.choose([1, 2] if x.shape[-1] >= 4 else [1])
    groups = net.choose(divisors(math.gcd(x.shape[1], out)))
    padding = net.choose([kernel // 2, "same"] if stride == 1 else [kernel // 2])
    return net.conv(x, out, kernel, stride=stride, groups=groups, padding=padding, bias=net.choose([True, False]))


def depthwise(net: Grown, x: Tensor) -> Tensor:
    channels = x.shape[1]
    return net.conv(x, channels * net.choose([1, 2] if channels <= 12 else [1]), 3, padding=1, groups=channels)


def conv_transpose(net: Grown, x: Tensor) -> Tensor:
    out = net.choose(WIDTHS)
    groups = net.choose(divisors(math.gcd(x.shape[1], out)))
    stride = net.choose([1, 2] if x.shape[-1] <= 4 else [1])
    return net.layer(lambda: nn.ConvTranspose2d(x.shape[1], out, stride, stride=stride, groups=groups))(x)  # type: ignore[no-any-return]


def image_norm(net: Grown, x: Tensor) -> Tensor:
    channels = x.shape[1]
    kind = net.choose(["batch", "group", "instance", "layer", "rms"])
    if kind == "batch":
        return net.layer(lambda: nn.BatchNorm2d(channels))(x)  # type: ignore[no-any-return]
    if kind == "instance" and min(x.shape[-2:]) > 1:
        return net.layer(lambda: nn.InstanceNorm2d(channels, eps=0.1, affine=True))(x)  # type: ignore[no-any-return]
    if kind in ("group", "instance"):
        groups = net.choose(divisors(channels))
        return net.layer(lambda: nn.GroupNorm(groups, channels, eps=0.1))(x)  # type: ignore[no-any-return]
    made = nn.LayerNorm if kind == "layer" else nn.RMSNorm
    return net.layer(lambda: made(channels, eps=0.1))(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def squeeze_excite(net: Grown, x: Tensor) -> Tensor:
    y = net.choose([lambda z: z.mean((2, 3), keepdim=True), lambda z: F.adaptive_avg_pool2d(z, 1)])(x)
    return x * net.conv(activated(net, net.conv(y, net.choose(WIDTHS))), x.shape[1]).sigmoid()


def pixel_shuffled(net: Grown, x: Tensor) -> Tensor:
    if min(x.shape[-2:]) >= 4 and x.shape[-2] % 2 == x.shape[-1] % 2 == 0:
        return _limited(net, F.pixel_unshuffle(x, 2))
    return F.pixel_shuffle(x if x.shape[1] % 4 == 0 else net.conv(x, 12), 2)


def _even(x: Tensor) -> Tensor:
    """Images of even height and width."""
    return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))


def space_to_depth(net: Grown, x: Tensor) -> Tensor:
    """Pixel unshuffle in single steps; blocks come before or after the channels."""
    x = _even(x)
    n, c, h, w = x.shape
    order = net.choose([(0, 1, 3, 5, 2, 4), (0, 3, 5, 1, 2, 4)])
    return _limited(net, x.reshape(n, c, h // 2, 2, w // 2, 2).permute(order).reshape(n, 4 * c, h // 2, w // 2))


def patches_merged(net: Grown, x: Tensor) -> Tensor:
    """Every second row and column, joined as channels."""
    x = _even(x)
    parts = [x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return _limited(net, torch.cat(parts, 1))


def pooled(net: Grown, x: Tensor) -> Tensor:
    if min(x.shape[-2:]) < 2:
        return F.max_pool2d(x, 1)
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: F.max_pool2d(y, 2),
        lambda y: F.avg_pool2d(y, 2, 1),
        lambda y: F.adaptive_avg_pool2d(y, 2),
        lambda y: F.adaptive_max_pool2d(y, 2),
    ]
    return net.choose(kinds)(x)


def resized(net: Grown, x: Tensor) -> Tensor:
    """Twice as large, or as large as a branch that it is then added to."""
    if min(x.shape[-2:]) > 4:
        return F.interpolate(F.max_pool2d(x, 2), size=x.shape[-2:], mode="nearest") + x
    mode = net.choose(["nearest", "bilinear", "bicubic"])
    return F.interpolate(x, scale_factor=2, mode=mode)


def windows(net: Grown, x: Tensor) -> Tensor:
    """Windows of half the height and width, one linear layer in each, and back."""
    x = _even(x)
    n, c, h, w = x.shape
    y = x.permute(0, 2, 3, 1).reshape(n, 2, h // 2, 2, w // 2, c).permute(0, 1, 3, 2, 4, 5)
    y = net.linear(y.reshape(-1, h * w // 4, c), net.choose(WIDTHS))
    y = y.view(n, 2, 2, h // 2, w // 2, -1).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(n, -1, h, w)


def rolled(net: Grown, x: Tensor) -> Tensor:
    return net.choose([lambda y: y.roll(1, 2), lambda y: y.flip(-1), lambda y: y.roll(2, 1), lambda y: y.flip(1)])(x)  # type: ignore[no-any-return]


def to_tokens(net: Grown, x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x.unflatten(1, (net.choose(divisors(x.shape[1])), -1))
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.flatten(2).transpose(1, 2),
        lambda y: y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, y.shape[1]),
        lambda y: y.flatten(2),
    ]
    y = x if min(x.shape[-2:]) <= 4 else F.max_pool2d(x, 2)
    return net.choose(kinds)(y)


def to_vector(net: Grown, x: Tensor) -> Tensor:
    if x.dim() == 3:
        kinds: list[Callable[[Tensor], Tensor]] = [
            *(lambda y: y.mean(1), lambda y: y[:, 0], lambda y: y.amax(1), lambda y: y.flatten(1), lambda y: y.sum(2)),
            *(lambda y: y.max(1)[0], lambda y: y[:, -1] + y[:, 0], lambda y: y.reshape(y.shape[0], -1)),
        ]
        return net.choose(kinds)(x)
    flat: list[Callable[[Tensor], Tensor]] = [
        *(lambda y: y.mean((2, 3)), lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1), lambda y: y.amax((-1, -2))),
        *([lambda y: y.flatten(1), lambda y: y.reshape(y.shape[0], -1)] if x[0].numel() <= 200 else []),
    ]
    return net.choose(flat)(x)


# ---------------------------------------------------------------------- tokens
def token_norm(net: Grown, x: Tensor) -> Tensor:
    width = x.shape[-1]
    kind = net.choose(["layer", "rms", "batch", "group", "both"])
    if kind == "batch":
        return net.layer(lambda: nn.BatchNorm1d(width))(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
    if kind == "group":
        groups = net.choose(divisors(width))
        return net.layer(lambda: nn.GroupNorm(groups, width, eps=0.1))(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
    shape = tuple(x.shape[1:]) if kind == "both" else (width,)
    made = nn.RMSNorm if kind == "rms" else nn.LayerNorm
    return net.layer(lambda: made(shape, eps=0.1))(x)  # type: ignore[no-any-return]


def attention(net: Grown, x: Tensor) -> Tensor:
    """Self-attention in one of its many spellings."""
    n, t, width = x.shape
    heads, size = net.choose([2, 3]), net.choose([2, 4])
    kind = net.choose(["unbind", "chunk", "index", "separate", "grouped"])
    if kind in ("unbind", "index"):
        qkv = net.linear(x, 3 * heads * size).reshape(n, t, 3, heads, size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if kind == "unbind" else (qkv[0], qkv[1], qkv[2])
    else:
        if kind == "chunk":
            flat = list(net.linear(x, 3 * heads * size).chunk(3, -1))
        else:
            more = 2 if kind == "grouped" else 1
            value = net.choose([size, size + 1])
            flat = [net.linear(x, heads * more * size), net.linear(x, heads * size), net.linear(x, heads * value)]
        q, k, v = (
            y.view(n, t, -1, y.shape[-1] // h).transpose(1, 2) for y, h in zip(flat, _counts(kind, heads), strict=True)
        )
    if net.choose([True, False]):
        q, k = _turned(net, q, k)
    if net.choose([True, False]):
        norm = net.layer(lambda: nn.RMSNorm(size, eps=0.1))
        q, k = norm(q), norm(k)
    options: dict[str, Any] = {}
    if kind == "grouped":
        how = net.choose(["interleave", "expand", "option"])
        if how == "option":
            options["enable_gqa"] = True
        else:
            k, v = (_repeated(y, how) for y in (k, v))
    bias = net.parameter(q.shape[1], t, t) if net.choose([True, False]) else None
    if options or net.choose([True, False]):
        causal = bias is None and net.choose([True, False])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, **options)
    else:
        scores = q @ k.transpose(-2, -1) * net.choose([size**-0.5, 0.3])
        y = (scores if bias is None else scores + bias).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(n, t, -1) if net.choose([True, False]) else y.transpose(1, 2).flatten(2)
    return x + net.linear(y, width)


def _counts(kind: str, heads: int) -> tuple[int, int, int]:
    return (2 * heads if kind == "grouped" else heads, heads, heads)


def _turned(net: Grown, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions: the halves of each head are turned against each other, or its pairs."""
    t, size = q.shape[-2:]
    angle = torch.arange(t).float()[:, None] * (0.5 ** torch.arange(size // 2).float())[None, :]
    if net.choose([True, False]):
        both = torch.cat([angle, angle], -1)

        def half(y: Tensor) -> Tensor:
            return torch.cat([-y[..., size // 2 :], y[..., : size // 2]], -1)

        return q * both.cos() + half(q) * both.sin(), k * both.cos() + half(k) * both.sin()

    def pairs(y: Tensor) -> Tensor:
        a, b = y[..., 0::2], y[..., 1::2]
        turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return turned.flatten(-2)

    return pairs(q), pairs(k)


def _repeated(y: Tensor, how: str) -> Tensor:
    """Each key head twice."""
    if how == "interleave":
        return y.repeat_interleave(2, 1)
    n, heads, t, size = y.shape
    return y[:, :, None].expand(n, heads, 2, t, size).reshape(n, 2 * heads, t, size)


def channel_attention(net: Grown, x: Tensor) -> Tensor:
    """Attention between the channels of each head instead of between tokens."""
    n, t, width = x.shape
    heads, size = net.choose([1, 2]), net.choose([2, 3])
    q, k, v = net.linear(x, 3 * heads * size).view(n, t, 3, heads, size).permute(2, 0, 3, 4, 1).unbind(0)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * net.parameter(heads, 1, 1)
    return x + net.linear((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(n, t, -1), width)


def multihead(net: Grown, x: Tensor) -> Tensor:
    """torch's own attention layer, or its encoder layer."""
    width, heads = x.shape[-1], net.choose(divisors(x.shape[-1]))
    if net.choose([True, False]):
        layer = net.layer(lambda: nn.MultiheadAttention(width, heads, batch_first=True))
        return x + layer(x, x, x, need_weights=net.choose([False, True]))[0]  # type: ignore[no-any-return]
    first = net.choose([True, False])
    return net.layer(lambda: nn.TransformerEncoderLayer(width, heads, 6, 0.0, batch_first=True, norm_first=first))(x)  # type: ignore[no-any-return]


def queried(net: Grown, x: Tensor) -> Tensor:
    """Learned queries look at the tokens."""
    queries, width = net.choose([1, 3]), net.choose(WIDTHS)
    q = net.parameter(queries, width)
    k, v = net.linear(x, 2 * width).chunk(2, -1)
    q = q.expand(x.shape[0], -1, -1) if net.choose([True, False]) else q
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def class_token(net: Grown, x: Tensor) -> Tensor:
    n, _, width = x.shape
    token = net.parameter(1, 1, width)
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.expand(n, -1, -1),
        lambda y: y.repeat(n, 1, 1),
        lambda y: y + torch.zeros(n, 1, width),
    ]
    return torch.cat([net.choose(kinds)(token), x], 1)


def einsum(net: Grown, x: Tensor) -> Tensor:
    out = net.choose(WIDTHS)
    kind = net.choose(["btc,oc->bto", "heads", "...c,...c->...c"])
    if kind == "heads":
        heads = net.choose(divisors(x.shape[-1]))
        y = torch.einsum("bthd,hde->bthe", x.unflatten(-1, (heads, -1)), net.parameter(heads, x.shape[-1] // heads, 3))
        return y.flatten(2)
    return torch.einsum(kind, x, net.parameter(out, x.shape[-1]) if "o" in kind else net.parameter(x.shape[-1]))


def mixed(net: Grown, x: Tensor) -> Tensor:
    """Linear layers along the tokens, as MLP-Mixer has them."""
    y = activated(net, net.linear(x.transpose(1, 2), net.choose(WIDTHS)))
    return x + net.linear(y, x.shape[1]).transpose(1, 2)


def scanned(net: Grown, x: Tensor) -> Tensor:
    """What depends on the order of tokens or channels."""
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.cumsum(1),
        lambda y: y.roll(1, 1),
        lambda y: y.flip(1),
        lambda y: y.sort(1)[0],
        lambda y: y.cumsum(-1).tanh(),
        lambda y: y.topk(2, -1)[0] if y.shape[-1] > 2 else y,
    ]
    return net.choose(kinds)(x)


def conv_1d(net: Grown, x: Tensor) -> Tensor:
    out = net.choose(WIDTHS)
    groups = net.choose(divisors(math.gcd(x.shape[-1], out)))
    return net.conv(x.transpose(1, 2), out, 3, padding=1, groups=groups).transpose(1, 2)


def picked(net: Grown, x: Tensor) -> Tensor:
    """Some tokens, by slice or by index."""
    if x.shape[1] < 2:
        return x
    kinds: list[Callable[[Tensor], Tensor]] = [
        *(lambda y: y[:, 1:], lambda y: y[:, :-1], lambda y: y[:, ::2]),
        *(lambda y: y[:, torch.tensor([0, 1])], lambda y: y.index_select(1, torch.tensor([1, 0]))),
    ]
    return net.choose(kinds)(x)


def recurrent(net: Grown, x: Tensor) -> Tensor:
    """A recurrent layer along the tokens: its outputs, or its last states."""
    kind, width = net.choose([nn.LSTM, nn.GRU, nn.RNN]), net.choose([3, 4, 5])
    options = {"num_layers": net.choose([1, 2]), "bidirectional": net.choose([False, True]), "batch_first": True}
    y, state = net.layer(lambda: kind(x.shape[-1], width, **options))(x)
    if net.choose([True, True, False]):
        return y  # type: ignore[no-any-return]
    state = state[0] if isinstance(state, tuple) else state
    return state.transpose(0, 1)  # type: ignore[no-any-return]


def to_image(net: Grown, x: Tensor) -> Tensor:
    if x.dim() == 2:
        return net.linear(x, net.choose(WIDTHS) * 4).view(x.shape[0], -1, 2, 2)
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        return x.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 2)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)


def further_products(net: Grown, x: Tensor) -> Tensor:
    """Products that are no linear layer by name."""
    width, out = x.shape[-1], net.choose(WIDTHS)
    kinds: list[Callable[[], Tensor]] = [
        lambda: torch.tensordot(x, net.parameter(width, out), 1),
        lambda: torch.inner(x, net.parameter(out, width)),
        lambda: (
            torch.linalg.multi_dot([net.parameter(3, width), x[0].T, x[0], net.parameter(width, out)])[None]
            + 0 * x[..., :1].sum(1, True)
        ),
        lambda: torch.cdist(x, net.parameter(1, out, width).expand(x.shape[0], -1, -1)),
        lambda: F.conv1d(x.transpose(1, 2), net.parameter(out, width, 1)).transpose(1, 2),
        lambda: x * F.cosine_similarity(x, net.parameter(width), -1, 0.1).unsqueeze(-1),
        lambda: net.layer(lambda: nn.Bilinear(width, width, out))(x, activated(net, x)),
        lambda: x * torch.linalg.vecdot(x, net.parameter(width)).unsqueeze(-1).tanh(),
    ]
    return net.choose(kinds)()


# ---------------------------------------------------------------------- vectors
def loss_scaled(net: Grown, x: Tensor) -> Tensor:
    """Scaled by how far the rows are from a target, in one of the losses, row by row or over all."""
    target = net.parameter(1, x.shape[1]).expand_as(x)
    kinds: list[Callable[[], Tensor]] = [
        lambda: F.mse_loss(x, target, reduction="none"),
        lambda: F.smooth_l1_loss(x, target),
        lambda: F.binary_cross_entropy_with_logits(x, target.sigmoid(), reduction="none"),
        lambda: F.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.long), reduction="none").unsqueeze(1),
        lambda: F.kl_div(x.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True),
    ]
    return x * net.choose(kinds)().tanh()


def vector_norm(net: Grown, x: Tensor) -> Tensor:
    width = x.shape[1]
    groups = net.choose(divisors(width))
    kinds = [nn.BatchNorm1d, lambda n: nn.LayerNorm(n, eps=0.1), lambda n: nn.GroupNorm(groups, n, eps=0.1), nn.PReLU]
    kind = net.choose(kinds)
    return net.layer(lambda: kind(width))(x)  # type: ignore[no-any-return]


def outer(net: Grown, x: Tensor) -> Tensor:
    other = net.linear(x, net.choose([2, 3]))
    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.unsqueeze(2) @ other.unsqueeze(1),
        lambda y: y[:, :, None] * other[:, None, :],
        lambda y: torch.einsum("bi,bj->bij", y, other),
        lambda y: torch.bmm(y.unsqueeze(2), other.unsqueeze(1)),
    ]
    y = net.choose(kinds)(x).flatten(1)
    return y if y.shape[1] <= 48 else net.linear(y, 8)


def experts(net: Grown, x: Tensor) -> Tensor:
    """A router chooses one or two of a few experts for each row."""
    number, top, width = net.choose([3, 4]), net.choose([1, 2]), net.choose([4, 5])
    scores = net.linear(x, number).softmax(-1)
    best, chosen = scores.topk(top, -1)
    if net.choose([True, False]):  # rows sorted by expert, a product for each run of them
        numbers, order = torch.sort(chosen.reshape(-1), stable=True)
        ends = torch.histc(numbers.float(), number, 0, number - 1).cumsum(0, dtype=torch.int32)
        y = GROUPED(x[order // top], net.parameter(number, x.shape[1], width), ends).tanh()
        y = GROUPED(y, net.parameter(number, width, x.shape[1]), ends) * best.reshape(-1)[order].unsqueeze(-1)
        return x + y[torch.argsort(order)].view(x.shape[0], top, -1).sum(1)
    kinds: list[Callable[[], Tensor]] = [
        lambda: (F.one_hot(chosen, number) * best.unsqueeze(-1)).sum(1),
        lambda: torch.zeros_like(scores).scatter(1, chosen, best),
        lambda: torch.zeros(x.shape[0], number).scatter_add(1, chosen, best),
    ]
    y = torch.einsum("bi,eio->beo", x, net.parameter(number, x.shape[1], width)).tanh()
    return torch.einsum("beo,be->bo", y, net.choose(kinds)())


def weight_normed(net: Grown, x: Tensor) -> Tensor:
    out, dim = net.choose(WIDTHS), net.choose([0, 1])
    return net.layer(lambda: weight_norm(nn.Linear(x.shape[1], out), dim=dim))(x)  # type: ignore[no-any-return]


ANY: list[Step] = [
    *(projection, activation, residual, glu, gated, joined, split, sliced, padded, written, reduced, position_table),
    *(shuffled, tied, heads_scaled, stacked, ordered, spectral, side_by_side),
]
IMAGE: list[Step] = [
    *(conv, depthwise, conv_transpose, image_norm, squeeze_excite, pixel_shuffled, patches_merged, pooled, resized),
    *(sampled, unpooled, space_to_depth, windows, rolled, to_tokens, to_vector, conv, image_norm),
]
TOKENS: list[Step] = [
    *(channel_attention, queried, multihead, recurrent, recurrent, further_products, further_products),
    *(
        token_norm,
        attention,
        class_token,
        einsum,
        mixed,
        scanned,
        conv_1d,
        picked,
        to_image,
        to_vector,
        attention,
        einsum,
    ),
]
VECTOR: list[Step] = [
    vector_norm,
    outer,
    to_image,
    to_tokens,
    experts,
    experts,
    weight_normed,
    loss_scaled,
    loss_scaled,
]
STEPS = {step.__name__ for step in [*ANY, *IMAGE, *TOKENS, *VECTOR]}


def _grow(net: Grown, x: Tensor) -> Tensor:
    x = projected(net, x)
    for _ in range(net.choose([2, 3, 4, 5, 6, 7, 8])):
        own = {4: IMAGE, 3: TOKENS, 2: VECTOR}[x.dim()]
        step = net.choose(net.choose([own, ANY, own]))
        if net.draw is not None:
            net.steps.append(step.__name__)
        x = step(net, x)
        if x.shape[_channels(x)] < 2 or x[0].numel() > 600:
            x = projected(net, x if x.dim() != 4 or min(x.shape[-2:]) < 4 else F.max_pool2d(x, 2))
    return projected(net, x, 3)


@st.composite
def networks(draw: st.DrawFn) -> tuple[Grown, Callable[[int], tuple[Tensor, ...]], int]:
    """A network, its inputs by batch size, and a seed."""
    shape = draw(st.sampled_from([(4, 4, 4), (6, 4, 4), (4, 6), (9, 4), (5, 8), (6,), (8,)]))
    seed = draw(st.integers(0, 2**16))

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed + batch)),)

    torch.manual_seed(seed)
    net = Grown(draw)
    with torch.no_grad():
        net(*inputs(3))
    net.draw = None
    randomise(net, seed)
    return net.eval(), inputs, seed


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work with one thread: the models are so small that a second one only gets in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(
    max_examples=EXAMPLES,
    derandomize="FXPRUNE_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # drawing a network is running it
)
@given(networks())
def test_random_networks(case: tuple[Grown, Callable[[int], tuple[Tensor, ...]], int]) -> None:
    net, inputs, seed = case
    analysis, groups = checks.analysed(net, inputs(3))
    assert not analysis.unknown
    assert analysis.captured.symbols, analysis.captured.notes
    event(f"{min(len(groups), 10)} groups")
    checks.check_captured(net, analysis, inputs(3))
    checks.check_permutation(analysis, groups, inputs(3), seed)
    for i in range(2):
        checks.check_emitted(net, analysis, checks.random_kept(groups, seed + i), inputs(2), tolerance=1e-2)
    REACHED.update(set(net.steps))
    REACHED.update({_family(n.target) for n in analysis.captured.graph.nodes if rule_of(n.target) is not None})
    REACHED.update(["with groups"] * bool(groups))


def _family(target: Any) -> str:
    rule = rule_of(target)
    assert rule is not None
    return f"rules.{rule.infer.__module__.rpartition('.')[2]}"


def test_random_networks_reached_everything() -> None:
    """Runs after the test above, in the same process: each kind of step, and each family of rules, has been met."""
    if EXAMPLES < 300 or not REACHED:
        pytest.skip("too few random networks, or none in this process")
    expected = STEPS | {f"rules.{family}" for family in FAMILIES}
    assert expected <= set(REACHED), f"never reached: {sorted(expected - set(REACHED))}"
    assert REACHED["with groups"] > 0.8 * EXAMPLES, "too many random networks have nothing that can be cut"
