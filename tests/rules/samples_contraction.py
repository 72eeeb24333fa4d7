"""Samples for matrix products, einsum and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rules import Net, Sample, aten, sample


def _convolution(rank: int, options: dict[str, Any], groups: list[int], note: str, inner: int = 8) -> Sample:
    """Two convolutions; the second has the options."""

    def function(net: Net, x: Tensor) -> Tensor:
        return net.conv(net.conv(net.conv(x, inner), 8, 3, **options).relu(), 3)

    padded = isinstance(options.get("padding"), str)
    target = getattr(getattr(aten, f"conv{rank}d"), "padding" if padded else "default")
    return sample(target, function, 3, *(5, 4, 3)[:rank], groups=groups, note=note)


def _transposed(rank: int, options: dict[str, Any], groups: list[int], note: str) -> Sample:
    target = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[rank - 1]

    def function(net: Net, x: Tensor) -> Tensor:
        weight = net.parameter(8, 12 // options.get("groups", 1), *(3,) * rank)
        arguments = {"stride": [2] * rank, "padding": [1] * rank, "output_padding": [1] * rank} | options
        return net.conv(target(net.conv(x, 8), weight, net.parameter(12), **arguments).relu(), 3)

    return sample(target, function, 3, *(5, 4, 3)[:rank], groups=groups, note=note)


def _hidden(net: Net, x: Tensor, out: int = 8) -> Tensor:
    return net.linear(x, out).tanh()


def _vector(net: Net, x: Tensor) -> Tensor:
    """One vector for all of the batch."""
    return net.linear(x.mean(0), 8).tanh()


Function = Callable[[Net, Tensor], Tensor]


def _einsum(equation: str, function: Function, groups: list[int], *shape: int) -> Sample:
    return sample(aten.einsum.default, function, *shape, groups=groups, note=equation)


def _position_bias(net: Net, x: Tensor) -> Tensor:
    """A small network on a table of coordinates scales the channels: weights times weights."""
    scale = net.linear(net.linear(net.parameter(8, 4), 6).relu(), 1)
    return net.linear(net.linear(x, 8).sin() * scale.squeeze(1), 3)


def _plain(groups: int, transposed: bool) -> Any:
    """The operator that convolutions are made of."""

    def function(net: Net, x: Tensor) -> Tensor:
        h = net.conv(x, 8)
        weight = net.parameter(8, 12 // groups, 3, 3) if transposed else net.parameter(12, 8 // groups, 3, 3)
        once = [1, 1]
        y = aten.convolution.default(h, weight, net.parameter(12), once, once, once, transposed, [0, 0], groups)
        return net.conv(y.sin(), 3)

    note = ("transposed " if transposed else "") + f"{groups} groups"
    return sample(aten.convolution.default, function, 2, 5, 4, groups=[8, 12] if groups == 1 else [2, 4, 6], note=note)


SAMPLES = [
    sample(aten.linear.default, _position_bias, groups=[4, 6, 8], note="of weights"),
    sample(aten.linear.default, lambda net, x: net.linear(_hidden(net, x), 3), groups=[8]),
    sample(aten.linear.default, lambda net, x: net.linear(net.linear(x, 8, False), 3), groups=[8], note="no bias"),
    sample(
        aten.linear.default,
        lambda net, x: net.linear(_hidden(net, x).unsqueeze(1), 3),
        groups=[8],
        note="rank 3",
    ),
    sample(
        aten.linear.default,
        lambda net, x: aten.linear.default(_hidden(net, x), net.parameter(8)).exp(),
        groups=[8],
        note="vector",
    ),
    sample(
        aten.linear.default,
        lambda net, x: net.linear(aten.linear.default(_hidden(net, x, 6), (w := net.parameter(6, 6)), w[0]), 3),
        groups=[],
        note="square weight",
    ),
    sample(aten.matmul.default, lambda net, x: _hidden(net, x) @ net.parameter(8, 3), groups=[8]),
    sample(
        aten.matmul.default,
        lambda net, x: net.linear((_hidden(net, x).unsqueeze(2) @ net.parameter(4, 8, 6)).tanh(), 3),
        *(4, 5),
        groups=[8, 6],
        note="batched",
    ),
    sample(
        aten.matmul.default,
        lambda net, x: net.linear((net.parameter(4, 7, 8) @ _hidden(net, x).unsqueeze(-1)).squeeze(-1).tanh(), 3),
        *(4, 5),
        groups=[8, 7],
        note="broadcast",
    ),
    sample(aten.matmul.default, lambda net, x: _hidden(net, x) @ net.parameter(8), groups=[8], note="vector"),
    sample(
        aten.matmul.default,
        lambda net, x: net.linear(net.parameter(8).sin() @ _hidden(net, x.transpose(1, 2)).transpose(1, 2), 3),
        *(5, 6),
        groups=[8],
        note="left vector",
    ),
    sample(
        aten.bmm.default,
        lambda net, x: aten.bmm.default(_hidden(net, x), net.linear(x, 8).transpose(1, 2)).softmax(-1),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten.bmm.default,
        lambda net, x: net.linear(aten.bmm.default(_hidden(net, x).transpose(1, 2), net.linear(x, 6)).sin(), 3).mean(1),
        *(4, 5),
        groups=[8, 6],
        note="outer",
    ),
    sample(
        aten.mm.default,
        lambda net, x: net.linear(aten.mm.default(_hidden(net, x), net.parameter(8, 6)).sin(), 3),
        groups=[8, 6],
    ),
    sample(aten.mv.default, lambda net, x: aten.mv.default(_hidden(net, x), net.parameter(8)), groups=[8]),
    sample(aten.dot.default, lambda net, x: aten.dot.default(_vector(net, x), net.parameter(8)) + x, groups=[8]),
    sample(
        aten.addmm.default,
        lambda net, x: net.linear(aten.addmm.default(net.parameter(6), _hidden(net, x), net.parameter(8, 6)).sin(), 3),
        groups=[8, 6],
    ),
    sample(
        aten.addmm.default,
        lambda net, x: net.linear(
            aten.addmm.default(net.linear(x, 6), _hidden(net, x), net.parameter(8, 6), beta=0.3, alpha=2).sin(), 3
        ),
        groups=[8, 6],
        note="factors",
    ),
    sample(
        aten.baddbmm.default,
        lambda net, x: net.linear(
            aten.baddbmm.default(net.parameter(8, 1), _hidden(net, x).transpose(1, 2), net.linear(x, 6)).sin(), 3
        ).amax(1),
        *(4, 5),
        groups=[8, 6],
    ),
    sample(
        aten.addbmm.default,
        lambda net, x: (
            (
                aten.addbmm.default(net.parameter(8, 6), _hidden(net, x).transpose(1, 2), net.linear(x, 6)).sin()
                @ net.parameter(6, 3)
            ).amax(0)
            + x[:, :, :3]
        ),
        *(4, 5),
        groups=[8, 6],
    ),
    sample(
        aten.addmv.default,
        lambda net, x: (
            net.linear(aten.addmv.default(net.parameter(6), net.parameter(6, 8), _vector(net, x)).sin(), 3) + x[:, :3]
        ),
        groups=[6, 8],
    ),
    sample(
        aten.outer.default,
        lambda net, x: (
            (net.parameter(3, 8) @ aten.outer.default(_vector(net, x), net.linear(x.mean(0), 6)).sin())
            @ net.parameter(6, 5)
            + x.mean()
        ),
        groups=[8, 6],
    ),
    _einsum("bi,oi->bo", lambda net, x: aten.einsum.default("bi,oi->bo", [_hidden(net, x), net.parameter(3, 8)]), [8]),
    _einsum(
        "implicit",
        lambda net, x: net.linear(aten.einsum.default("...i, ih", [_hidden(net, x), net.parameter(8, 6)]).sin(), 3),
        [8, 6],
    ),
    _einsum(
        "bqhd,bkhd->bhqk",
        lambda net, x: aten.einsum.default(
            "bqhd,bkhd,hm->bqkm",
            [net.linear(x, 24).view(-1, 4, 6, 4), net.linear(x, 24).view(-1, 4, 6, 4), net.parameter(6, 3)],
        ),
        [6, 4],
        *(4, 5),
    ),
    _einsum(
        "ellipsis",
        lambda net, x: net.linear(
            aten.einsum.default("...tc,...c,ch->...th", [_hidden(net, x), net.parameter(8), net.parameter(8, 6)]).sin(),
            3,
        ),
        [8, 6],
        *(4, 5),
    ),
    _einsum(
        "stretched",
        lambda net, x: net.linear(aten.einsum.default("bc,bc->bc", [_hidden(net, x), net.linear(x, 1)]), 3),
        [8],
    ),
    *[_plain(groups, transposed) for groups in (1, 2) for transposed in (False, True)],
    *[_convolution(rank, {}, [8, 8], "plain") for rank in (1, 2, 3)],
    *[_convolution(rank, {"padding": "same"}, [8, 8], "same") for rank in (1, 2, 3)],
    *[_convolution(rank, {"stride": 2, "padding": 1}, [8, 8], "stride") for rank in (1, 2, 3)],
    _convolution(2, {"groups": 8, "padding": 1}, [8], "depthwise"),
    _convolution(2, {"groups": 2, "padding": 1}, [2, 3, 4], "groups", inner=6),
    _convolution(1, {"groups": 4, "padding": "same"}, [4, 2, 3], "groups same", inner=12),
    _convolution(2, {"groups": 4, "padding": 1}, [4, 2], "multiplier", inner=4),
    _convolution(2, {"groups": 2, "bias": False, "dilation": 2, "padding": 2}, [2, 4, 4], "dilation"),
    *[_transposed(rank, {}, [8, 12], "plain") for rank in (1, 2, 3)],
    *[_transposed(rank, {"groups": 4}, [4, 2, 3], "groups") for rank in (1, 2, 3)],
    sample(
        aten.conv_transpose2d.input,
        lambda net, x: net.conv(net.layer(_layer)(net.conv(x, 8)), 3),
        *(3, 4, 4),
        groups=[4, 2, 3],
        note="layer",
    ),
]


def _layer() -> Any:
    from torch import nn

    return nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=4)
