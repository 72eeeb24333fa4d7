"""Samples for operators that move elements: reshapes, transpositions, copies, joins, cuts, padding and shuffles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rules import Net, Sample, aten, sample


def _hidden(net: Net, x: Tensor, out: int = 8) -> Tensor:
    return net.linear(x, out).tanh()


def _simple(
    target: Any, step: Any, *shape: int, out: int = 8, groups: list[int] | None = None, note: str = ""
) -> Sample:
    """One step between two linear layers: from `out` features to whatever `step` makes of them."""
    return sample(
        target,
        lambda net, x: net.linear(step(_hidden(net, x, out)), 3),
        *shape,
        groups=[8] if groups is None else groups,
        note=note,
    )


def _image(target: Any, step: Any, *, out: int = 8, groups: list[int] | None = None, note: str = "") -> Sample:
    """One step between two convolutions."""
    function = lambda net, x: net.conv(step(net.conv(x, out).tanh()), 3)  # noqa: E731
    return sample(target, function, 2, 4, 4, groups=[8] if groups is None else groups, note=note)


def _heads(net: Net, x: Tensor) -> Tensor:
    """12 features as 3 heads of 4, each head scaled by its own weights, and back."""
    y = aten.view.default(_hidden(net, x, 12), [x.shape[0], 3, 4]) * net.parameter(3, 4)
    return net.linear(aten.reshape.default(y, [-1, 12]), 3)


def _shuffle(net: Net, x: Tensor) -> Tensor:
    """ShuffleNet's view, transpose, view."""
    y = net.conv(x, 8).tanh()
    y = y.view(x.shape[0], 2, 4, 4, 4).transpose(1, 2).reshape(x.shape[0], 8, 4, 4)
    return net.conv(y, 3)


def _windows(net: Net, x: Tensor) -> Tensor:
    """Swin's windows: 4 x 4 positions as four windows of 2 x 2, then linear, then back."""
    y = net.linear(x.permute(0, 2, 3, 1), 8).tanh()
    y = y.view(-1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
    y = net.linear(y, 6).sin()
    return net.linear(y.view(-1, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 6), 3)


def _merging(net: Net, x: Tensor) -> Tensor:
    """Swin's patch merging: every second row and column, joined."""
    y = net.conv(x, 8).tanh()
    y = torch.cat([y[:, :, 0::2, 0::2], y[:, :, 1::2, 0::2], y[:, :, 0::2, 1::2], y[:, :, 1::2, 1::2]], 1)
    return net.conv(y, 3)


def _straddle(net: Net, x: Tensor) -> Tensor:
    """(6, 4) seen as (8, 3): nothing of it can be cut."""
    y = net.linear(x, 24).view(-1, 6, 4) * net.parameter(6, 1)
    return net.linear(aten.view.default(y, [-1, 8, 3]), 3)


def _rope(net: Net, x: Tensor) -> Tensor:
    """Rotated halves: the second half, negated, comes before the first."""
    y = _hidden(net, x)
    first, second = aten.chunk.default(y, 2, -1)
    angle = net.parameter(4)
    turned = torch.cat([-second, first], -1)
    both = torch.cat([angle, angle])
    return net.linear(y * both.cos() + turned * both.sin(), 3)


def _stretched(net: Net, x: Tensor) -> Tensor:
    """Two key heads serve six query heads, by stretching."""
    keys = net.linear(x, 8).view(-1, 2, 1, 4)
    return net.linear(aten.expand.default(keys, [-1, 2, 3, 4]).reshape(-1, 24) * _hidden(net, x, 24), 3)


def _class_token(net: Net, x: Tensor) -> Tensor:
    token = aten.expand.default(net.parameter(1, 1, 8), [x.shape[0], -1, -1])
    return net.linear(aten.cat.default([token, _hidden(net, x)], 1) + net.parameter(1, 5, 8), 3)


def _twice(net: Net, x: Tensor) -> Tensor:
    y = _hidden(net, x)
    return net.linear(aten.cat.default([y, net.linear(x, 4), y], -1).sin(), 3)


def _parts(target: Any, *arguments: Any, groups: list[int], out: int = 12, note: str = "") -> Sample:
    """The features are split, each part is treated differently, and all are used."""

    def function(net: Net, x: Tensor) -> Tensor:
        parts = target(_hidden(net, x, out), *arguments)
        return sum(net.linear(p.sin() * (i + 1), 3) for i, p in enumerate(parts))  # type: ignore[return-value]

    return sample(target, function, groups=groups, note=note)


def _written(net: Net, x: Tensor) -> Tensor:
    """A slice of features is written in place."""
    y = _hidden(net, x)
    y[:, 2:5] = net.linear(x, 3)
    return net.linear(y.sin(), 3)


def _unequal(net: Net, x: Tensor) -> Tensor:
    """Whole rows and a part of a row of (4, 2) are cut off: 8 = 5 + 3 cuts inside an element of the outer factor."""
    y = net.linear(x, 8).view(-1, 4, 2) * net.parameter(4, 2)
    first, second = aten.split.sizes(y.flatten(1), [5, 3], 1)
    return net.linear(first.sin(), 3) * net.linear(second, 3)


def _untied(net: Net, x: Tensor) -> Tensor:
    """One weight used as it is and transposed."""
    weight = net.parameter(8, 5)
    return aten.t.default(weight)[:, :3].sum() + torch.nn.functional.linear(
        torch.nn.functional.linear(x, weight).tanh(), aten.t.default(weight)
    )


VIEWS = [
    _simple(aten.view.default, lambda h: aten.view.default(h, [-1, 4, 8]), 4, 5, note="same"),
    sample([aten.view.default, aten.reshape.default], _heads, groups=[3, 4], note="heads"),
    sample(aten.view.default, _shuffle, 2, 4, 4, groups=[2, 4], note="channel shuffle"),
    sample(aten.view.default, _windows, 2, 4, 4, groups=[8, 6], note="windows"),
    sample(aten.view.default, _straddle, groups=[], note="straddle"),
    _simple(aten._unsafe_view.default, lambda h: aten._unsafe_view.default(h, [-1, 8]), 4, 5),
    _simple(aten.reshape.default, lambda h: aten.reshape.default(h, [h.shape[0] * 4, 8]), 4, 5),
    _simple(aten.reshape.default, lambda h: aten.reshape.default(h, [h.shape[0], 32]), 4, 5, note="flat"),
    _simple(aten.flatten.using_ints, lambda h: aten.flatten.using_ints(h, 1), 4, 5),
    _simple(
        aten.flatten.using_ints, lambda h: aten.flatten.using_ints(h.transpose(1, 2), 1), 4, 5, note="channels first"
    ),
    _simple(aten.squeeze.default, lambda h: aten.squeeze.default(h.unsqueeze(1))),
    _simple(aten.squeeze.dim, lambda h: aten.squeeze.dim(h.unsqueeze(1), 1)),
    _simple(aten.squeeze.dims, lambda h: aten.squeeze.dims(h.unsqueeze(1).unsqueeze(1), [1, 2])),
    _simple(aten.unsqueeze.default, lambda h: aten.unsqueeze.default(h, 1)),
    sample(
        aten.ravel.default,
        lambda net, x: net.linear(_hidden(net, x) * aten.ravel.default(net.parameter(8, 1)), 3),
        groups=[8],
    ),
    sample(
        aten.ravel.default,
        lambda net, x: aten.ravel.default(net.parameter(2, 8)) @ net.parameter(16, 3) + x[:, :3],
        groups=[2, 8],
        note="merged",
    ),
    sample(
        [aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default],
        lambda net, x: net.linear(
            aten.atleast_3d.default(_hidden(net, x)).squeeze(-1)
            * aten.atleast_2d.default(net.parameter(8))
            * aten.atleast_1d.default(net.parameter(8)),
            3,
        ),
        groups=[8],
    ),
    sample(
        aten.view_as.default,
        lambda net, x: net.linear(aten.view_as.default(_hidden(net, x).unsqueeze(1), net.linear(x, 8)), 3),
        groups=[8],
    ),
    sample(
        aten.reshape_as.default,
        lambda net, x: net.linear(
            aten.reshape_as.default(_hidden(net, x), y := net.linear(x, 8).view(-1, 2, 4)).flatten(1) * y.flatten(1), 3
        ),
        groups=[2, 4],
    ),
    _simple(aten.unflatten.int, lambda h: aten.unflatten.int(h, -1, [2, -1]).transpose(1, 2).flatten(1), groups=[2, 4]),
    _simple(aten.unflatten.int, lambda h: aten.unflatten.int(h, 1, [2, 4]).sin().flatten(1), groups=[2, 4], note="all"),
]

TRANSPOSITIONS = [
    _image(aten.permute.default, lambda h: aten.permute.default(h, [0, 1, 3, 2])),
    _simple(aten.permute.default, lambda h: aten.permute.default(h, [0, -1, 1]).transpose(1, 2), 4, 5, note="negative"),
    _simple(
        [aten.transpose.int, aten.swapaxes.default, aten.swapdims.default],
        lambda h: aten.swapdims.default(aten.swapaxes.default(aten.transpose.int(h, 1, -1), 0, 1), 0, 2).transpose(
            0, 1
        ),
        *(4, 5),
    ),
    sample(aten.t.default, lambda net, x: _hidden(net, x) @ aten.t.default(net.parameter(3, 8)), groups=[8]),
    sample(aten.t.default, _untied, groups=[3, 5], note="tied"),
    sample(
        aten.numpy_T.default, lambda net, x: _hidden(net, x) @ aten.numpy_T.default(net.parameter(3, 8)), groups=[8]
    ),
    sample(
        aten.numpy_T.default,
        lambda net, x: net.linear(_hidden(net, x) * aten.numpy_T.default(net.parameter(8, 4, 1)), 3),
        *(4, 5),
        groups=[8],
        note="rank 3",
    ),
    sample(
        aten.mT.default, lambda net, x: _hidden(net, x) @ aten.mT.default(net.parameter(4, 3, 8)), 4, 6, 5, groups=[8]
    ),
    sample(
        aten.mH.default, lambda net, x: _hidden(net, x) @ aten.mH.default(net.parameter(4, 3, 8)), 4, 6, 5, groups=[8]
    ),
    sample(
        aten.adjoint.default, lambda net, x: _hidden(net, x) @ aten.adjoint.default(net.parameter(3, 8)), groups=[8]
    ),
    _simple(aten.movedim.int, lambda h: aten.movedim.int(aten.movedim.int(h, -1, 0), 0, 3), 4, 6, 5),
    _simple(
        aten.movedim.intlist,
        lambda h: aten.movedim.intlist(aten.movedim.intlist(h, [0, -1], [2, 1]), [1, 2], [-1, 0]),
        *(4, 6, 5),
    ),
]

COPIES = [
    sample(aten.expand.default, _stretched, groups=[2, 3, 4]),
    sample(aten.expand.default, _class_token, 4, 5, groups=[8], note="class token"),
    sample(
        aten.broadcast_to.default,
        lambda net, x: net.linear(_hidden(net, x) * aten.broadcast_to.default(net.linear(x, 1), [x.shape[0], 8]), 3),
        groups=[8],
    ),
    sample(
        aten.expand_as.default,
        lambda net, x: net.linear((h := _hidden(net, x)) * aten.expand_as.default(net.parameter(1, 8), h), 3),
        groups=[8],
    ),
    sample(
        aten.expand_as.default,
        lambda net, x: net.linear((h := _hidden(net, x)) * aten.expand_as.default(net.linear(x, 1), h), 3),
        groups=[8],
        note="stretched",
    ),
    _simple(aten.repeat.default, lambda h: aten.repeat.default(h, [1, 3])),
    _simple(aten.repeat.default, lambda h: aten.repeat.default(h, [2, 1, 1]), note="new dimension"),
    sample(
        aten.repeat.default,
        lambda net, x: net.linear(
            torch.cat([aten.repeat.default(net.parameter(1, 1, 8), [x.shape[0], 1, 1]), _hidden(net, x)], 1), 3
        ),
        *(4, 5),
        groups=[8],
        note="class token",
    ),
    _simple(aten.tile.default, lambda h: aten.tile.default(h, [2])),
    _simple(aten.repeat_interleave.self_int, lambda h: aten.repeat_interleave.self_int(h, 3, 1)),
    _simple(aten.repeat_interleave.self_int, lambda h: aten.repeat_interleave.self_int(h, 3, -1), note="negative"),
    _simple(
        aten.repeat_interleave.self_int,
        lambda h: aten.repeat_interleave.self_int(h, 3, 1, output_size=3 * h.shape[1]),
        note="size given",
    ),
    sample(
        aten.repeat_interleave.self_int,
        lambda net, x: net.linear(_hidden(net, x, 24) * aten.repeat_interleave.self_int(net.parameter(8), 3), 3),
        groups=[8],
        note="flat",
    ),
]

JOINS = [
    sample(aten.cat.default, _twice, groups=[8, 4], note="twice"),
    _simple(aten.cat.default, lambda h: aten.cat.default([h, h.sin()], 1), 4, 5, note="rows"),
    sample(
        aten.cat.default,
        lambda net, x: net.linear(aten.cat.default([_hidden(net, x), x, net.linear(x, 4)], 1), 3),
        groups=[8, 4],
        note="with an input",
    ),
    sample(
        aten.concat.default,
        lambda net, x: net.linear(aten.concat.default([_hidden(net, x), net.linear(x, 4)], -1), 3),
        groups=[8, 4],
    ),
    sample(
        aten.concatenate.default,
        lambda net, x: net.linear(aten.concatenate.default([_hidden(net, x), net.linear(x, 4)], 1), 3),
        groups=[8, 4],
    ),
    sample(
        aten.stack.default,
        lambda net, x: net.linear(aten.stack.default([_hidden(net, x), net.linear(x, 8)], 1).flatten(1), 3),
        groups=[8],
    ),
    sample(
        aten.stack.default,
        lambda net, x: net.linear(aten.stack.default([_hidden(net, x), net.linear(x, 8)], -1).flatten(1), 3),
        groups=[8],
        note="last",
    ),
]

CUTS = [
    _parts(aten.split.Tensor, 5, 1, groups=[5, 5, 2]),
    _parts(aten.split.Tensor, 4, -1, groups=[4, 4, 4], note="equal"),
    _parts(aten.split.sizes, [2, 7, 3], 1, groups=[2, 7, 3]),
    _parts(aten.split_with_sizes.default, [2, 7, 3], -1, groups=[2, 7, 3]),
    _parts(aten.chunk.default, 3, -1, groups=[4, 4, 4]),
    _parts(aten.chunk.default, 5, 1, groups=[3, 3, 3, 3], note="uneven"),
    _parts(aten.tensor_split.sections, 5, 1, groups=[3, 3, 2, 2, 2]),
    _parts(aten.tensor_split.indices, [2, 9], 1, groups=[2, 7, 3]),
    _parts(aten.tensor_split.indices, [-5], -1, groups=[7, 5], note="from the end"),
    _parts(aten.unsafe_split.Tensor, 5, 1, groups=[5, 5, 2]),
    _parts(aten.unsafe_chunk.default, 3, 1, groups=[4, 4, 4]),
    _simple(aten.split.Tensor, lambda h: aten.split.Tensor(h, 2, 1)[1], 4, 5, note="rows"),
    sample(aten.split.sizes, _unequal, groups=[2], note="across"),
    sample(aten.chunk.default, _rope, groups=[4], note="rotated halves"),
    _parts(aten.chunk.default, 1, -1, groups=[8], out=8, note="one"),
    sample(
        aten.slice.Tensor,
        lambda net, x: net.linear((h := _hidden(net, x))[:, :3].sin(), 3) + net.linear(h[:, 2:-1], 3),
        groups=[2, 4],
    ),
    sample(
        aten.slice.Tensor,
        lambda net, x: net.linear((h := _hidden(net, x))[:, 5:], 3) + net.linear(h, 3),
        groups=[5, 3],
        note="open",
    ),
    _simple(aten.slice.Tensor, lambda h: h[:, 1:], 4, 5, note="rows"),
    _simple(aten.slice.Tensor, lambda h: h[1:], 4, 5, note="batch"),
    _simple(aten.slice.Tensor, lambda h: h[:, 1::2], groups=[4], note="step"),
    _simple(aten.slice.Tensor, lambda h: h[:, 1:7:3], groups=[], note="uneven step"),
    sample(aten.slice.Tensor, _merging, 2, 4, 4, groups=[8], note="patch merging"),
    sample(aten.slice.Tensor, _untied, groups=[3, 5], note="of a weight"),
    sample(
        aten.narrow.default,
        lambda net, x: net.linear(aten.narrow.default(h := _hidden(net, x), 1, 2, 5).sin(), 3) + net.linear(h, 3),
        groups=[2, 5],
        note="middle",
    ),
    _simple(aten.narrow.default, lambda h: aten.narrow.default(h, 1, 1, 2), 4, 5, note="rows"),
    sample(aten.slice_scatter.default, _written, groups=[2, 3, 3]),
    sample(
        aten.slice_scatter.default,
        lambda net, x: net.linear(aten.slice_scatter.default(_hidden(net, x), net.linear(x, 2), 1, 0, -6), 3),
        groups=[2, 6],
        note="first",
    ),
    sample(
        aten.slice_scatter.default,
        lambda net, x: net.linear(aten.slice_scatter.default(_hidden(net, x), net.linear(x[:, :2], 8), 1, 1, 3), 3),
        *(4, 5),
        groups=[8],
        note="rows",
    ),
    sample(
        aten.slice_scatter.default,
        lambda net, x: net.linear(aten.slice_scatter.default(_hidden(net, x), net.linear(x, 4), 1, 0, 8, 2), 3),
        groups=[],
        note="step",
    ),
]

PADDING = [
    _image(aten.pad.default, lambda h: aten.pad.default(h, [1, 1, 1, 1])),
    _image(aten.pad.default, lambda h: aten.pad.default(h, [1, 1, 1, 1], "reflect"), note="reflect"),
    _simple(aten.pad.default, lambda h: aten.pad.default(h, [2, 1], value=0.5), note="channels"),
    _simple(aten.pad.default, lambda h: aten.pad.default(h, [-2, -1]), groups=[2, 5], note="channels cut"),
    _simple(aten.pad.default, lambda h: aten.pad.default(h, [-2, 3]), groups=[2, 6], note="cut and padded"),
    _simple(
        aten.constant_pad_nd.default, lambda h: aten.constant_pad_nd.default(h, [1, -3]), groups=[5, 3], note="cut"
    ),
    _simple(aten.pad.default, lambda h: aten.pad.default(h, [0, 0, 1, 2]), 4, 5, note="rows"),
    _simple(
        aten.pad.default, lambda h: aten.pad.default(h.unsqueeze(1), [2, 1], "circular"), groups=[], note="circular"
    ),
    _simple(aten.constant_pad_nd.default, lambda h: aten.constant_pad_nd.default(h, [0, 4], 0.3)),
]

ORDERS = [
    _simple(aten.roll.default, lambda h: aten.roll.default(h, [1], [1]), 4, 5, note="rows"),
    _simple(aten.roll.default, lambda h: aten.roll.default(h, [3], [-1]), groups=[], note="channels"),
    _simple(aten.roll.default, lambda h: aten.roll.default(h, [3]), groups=[], note="all"),
    _simple(aten.flip.default, lambda h: aten.flip.default(h, [1]), 4, 5, note="rows"),
    _simple(aten.flip.default, lambda h: aten.flip.default(h, [-1]), groups=[], note="channels"),
    _simple(
        [aten.tril.default, aten.triu.default],
        lambda h: (aten.tril.default(h.transpose(1, 2)) + aten.triu.default(h.transpose(1, 2), 2)).transpose(1, 2),
        *(4, 5),
        groups=[],
    ),
    sample(
        aten.tril.default,
        lambda net, x: net.linear(
            aten.tril.default(_hidden(net, x).transpose(1, 2).unsqueeze(2).expand(-1, -1, 4, -1))
            .sum(-1)
            .transpose(1, 2),
            3,
        ),
        *(4, 5),
        groups=[8],
        note="rows",
    ),
]

SHUFFLES = [
    _image(aten.pixel_shuffle.default, lambda h: aten.pixel_shuffle.default(h, 2), out=24, groups=[6]),
    _image(aten.pixel_unshuffle.default, lambda h: aten.pixel_unshuffle.default(h, 2)),
    _image(aten.channel_shuffle.default, lambda h: aten.channel_shuffle.default(h, 2), groups=[4]),
    _image(aten.native_channel_shuffle.default, lambda h: aten.native_channel_shuffle.default(h, 4), groups=[2]),
    _simple(aten.unfold.default, lambda h: aten.unfold.default(h, 1, 2, 1).transpose(2, 3), 4, 5),
    _simple(aten.unfold.default, lambda h: aten.unfold.default(h, -1, 4, 2), groups=[], note="channels"),
    sample(
        aten.im2col.default,
        lambda net, x: net.linear(
            aten.im2col.default(net.conv(x, 8).tanh(), [2, 2], [1, 1], [0, 0], [2, 2]).transpose(1, 2), 3
        ),
        *(2, 4, 4),
        groups=[8],
    ),
    sample(
        aten.col2im.default,
        lambda net, x: net.conv(
            aten.col2im.default(net.linear(x, 32).transpose(1, 2), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]).tanh(), 3
        ),
        *(4, 5),
        groups=[8],
    ),
]

SAMPLES = [*VIEWS, *TRANSPOSITIONS, *COPIES, *JOINS, *CUTS, *PADDING, *ORDERS, *SHUFFLES]
