"""Samples for joining and cutting by name, grids, blocks and diagonals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rules import Net, Sample, aten, sample


def _h(net: Net, x: Tensor, out: int = 8) -> Tensor:
    return net.linear(x, out).tanh()


def _matrix(net: Net, x: Tensor) -> Tensor:
    """(N, 8, 8): the products of two sets of features."""
    return _h(net, x).unsqueeze(-1) * _h(net, x).unsqueeze(-2)


def _square(net: Net, x: Tensor) -> Tensor:
    """(N, 8, 8), of one set of features: rows and columns are the same units."""
    h = _h(net, x)
    return h.unsqueeze(-1) * h.sin().unsqueeze(-2)


def _flipped(target: Any, dim: int, note: str = "") -> Sample:
    """Positions are turned round, features pass; or the other way round."""

    def function(net: Net, x: Tensor) -> Tensor:
        h = _h(net, x)
        h = h if dim == 2 else h.transpose(1, 2)
        return net.linear(target(h).transpose(1, 2) if dim == 1 else target(h), 3)

    return sample(target, function, 4, 5, groups=[8] if dim == 2 else [], note=note)


SAMPLES = [
    sample(
        aten.hstack.default,
        lambda net, x: net.linear(aten.hstack.default([_h(net, x), x, _h(net, x, 6)]), 3),
        groups=[8, 6],
    ),
    sample(
        aten.hstack.default,
        lambda net, x: (
            net.linear(x, 14) * aten.hstack.default([net.parameter(8), net.parameter(6)]) @ net.parameter(14, 3)
        ),
        groups=[8, 6],
        note="vectors",
    ),
    *[
        sample(
            t,
            lambda net, x, t=t: (
                net.linear(x, 8) @ t([net.parameter(8), net.parameter(4, 8)]).T.sin() @ net.parameter(5, 3)
            ),
            groups=[8, 4],
        )
        for t in (aten.vstack.default, aten.row_stack.default)
    ],
    sample(
        aten.dstack.default,
        lambda net, x: net.linear(aten.dstack.default([_h(net, x), _h(net, x, 6)]), 3),
        *(4, 5),
        groups=[8, 6],
    ),
    sample(
        aten.column_stack.default,
        lambda net, x: net.linear(_h(net, x) @ aten.column_stack.default([net.parameter(8), net.parameter(8, 5)]), 3),
        groups=[8, 5],
    ),
    sample(
        aten.block_diag.default,
        lambda net, x: net.linear(
            _h(net, x, 14) @ aten.block_diag.default([net.parameter(8, 6), net.parameter(6, 4)]).sin(), 3
        ),
        groups=[8, 6, 6, 4],
    ),
    sample(
        aten.broadcast_tensors.default,
        lambda net, x: net.linear(
            torch.stack(aten.broadcast_tensors.default([_h(net, x), net.parameter(8), net.linear(x, 1)])).prod(0), 3
        ),
        groups=[8],
    ),
    *[
        sample(
            t,
            lambda net, x, t=t, k=k: net.linear(_met(net, x, t, k), 3),
            groups=[8, 6],
            note=str(k.get("indexing", "")),
        )
        for t, k in (
            (aten.meshgrid.default, {}),
            (aten.meshgrid.indexing, {"indexing": "ij"}),
            (aten.meshgrid.indexing, {"indexing": "xy"}),
        )
    ],
    sample(
        aten.cartesian_prod.default,
        lambda net, x: net.linear(
            net.linear(x, 12).tanh() * aten.cartesian_prod.default([net.parameter(3), net.parameter(4)]).sum(1), 3
        ),
        groups=[3, 4],
    ),
    # ------------------------------------------------------------------ cutting
    sample(
        aten.hsplit.int,
        lambda net, x: net.linear((p := aten.hsplit.int(_h(net, x), 2))[0] * p[1], 3),
        groups=[4],
    ),
    sample(
        aten.hsplit.array,
        lambda net, x: net.linear((p := aten.hsplit.array(_h(net, x), [3, 5]))[0], 3) + net.linear(p[2].sin(), 3),
        groups=[3, 2, 3],
    ),
    sample(
        aten.vsplit.int,
        lambda net, x: net.linear(x, 4) @ ((p := aten.vsplit.int(net.parameter(8, 3), 2))[0] * p[1]),
        groups=[4],
    ),
    sample(
        aten.vsplit.array,
        lambda net, x: net.linear(x, 3) @ aten.vsplit.array(net.parameter(8, 4), [3])[0],
        groups=[3, 5],
    ),
    sample(
        aten.dsplit.int,
        lambda net, x: net.linear((p := aten.dsplit.int(_h(net, x), 2))[0] * p[1], 3),
        *(4, 5),
        groups=[4],
    ),
    sample(
        aten.dsplit.array,
        lambda net, x: net.linear((p := aten.dsplit.array(_h(net, x), [6]))[0], 3) * net.linear(p[1], 3),
        *(4, 5),
        groups=[6, 2],
    ),
    sample(
        aten.tensor_split.indices,
        lambda net, x: net.linear(aten.tensor_split.indices(_h(net, x), [6, 2], 1)[2], 3),
        groups=[],
        note="overlapping",
    ),
    sample(
        aten.narrow_copy.default,
        lambda net, x: net.linear(aten.narrow_copy.default(h := _h(net, x), 1, 2, 5), 3) + net.linear(h, 3),
        groups=[2, 5],
    ),
    sample(
        aten.as_strided.default,
        lambda net, x: net.linear(_h(net, x) * aten.as_strided.default(net.parameter(4, 6), [8], [2]), 3),
        groups=[],
    ),
    # ------------------------------------------------------------------ order of indices
    _flipped(aten.fliplr.default, 2),
    _flipped(aten.fliplr.default, 1, "channels"),
    sample(
        aten.flipud.default,
        lambda net, x: net.linear(x, 4) @ aten.flipud.default(net.parameter(4, 6)) @ net.parameter(6, 3),
        groups=[6],
    ),
    sample(
        aten.rot90.default,
        lambda net, x: net.conv(aten.rot90.default(net.conv(x, 8).sin(), 1, [2, 3]), 3),
        *(2, 4, 3),
        groups=[8],
    ),
    sample(
        aten.rot90.default,
        lambda net, x: net.conv(aten.rot90.default(net.conv(x, 8).sin(), 2, [1, 3]), 3),
        *(2, 4, 3),
        groups=[],
        note="channels",
    ),
    # ------------------------------------------------------------------ diagonals
    sample(
        aten.diagonal.default,
        lambda net, x: net.linear(aten.diagonal.default(_matrix(net, x), 0, 1, 2).sin(), 3),
        groups=[8],
    ),
    sample(
        aten.diagonal.default,
        lambda net, x: net.linear(aten.diagonal.default(_matrix(net, x), 1, 1, 2).sin(), 3),
        groups=[],
        note="next to the main one",
    ),
    sample(
        aten.linalg_diagonal.default,
        lambda net, x: net.linear(aten.linalg_diagonal.default(_matrix(net, x)).sin(), 3),
        groups=[8],
    ),
    sample(
        aten.diagonal_scatter.default,
        lambda net, x: net.linear(aten.diagonal_scatter.default(_matrix(net, x), net.linear(x, 8), 0, 1, 2), 3).sum(1),
        groups=[8],
    ),
    sample(
        aten.diagonal_scatter.default,
        lambda net, x: net.linear(aten.diagonal_scatter.default(_matrix(net, x), net.linear(x, 7), 1, 1, 2), 3).sum(1),
        groups=[],
        note="next to the main one",
    ),
    sample(
        aten.diag_embed.default,
        lambda net, x: (net.parameter(4, 8) @ aten.diag_embed.default(_h(net, x)) @ net.parameter(8, 3)).flatten(1),
        groups=[8],
    ),
    sample(
        aten.diag_embed.default,
        lambda net, x: net.linear(aten.diag_embed.default(_h(net, x), 1), 3).sum(1),
        groups=[],
        note="next to the main one",
    ),
    sample(
        aten.diag.default,
        lambda net, x: net.linear(x, 8) @ aten.diag.default(net.parameter(8)) @ net.parameter(8, 3),
        groups=[8],
    ),
    sample(
        aten.diag.default,
        lambda net, x: net.linear(net.linear(x, 8) * aten.diag.default(net.parameter(8, 8)), 3),
        groups=[8],
        note="of a matrix",
    ),
    sample(
        aten.trace.default,
        lambda net, x: net.linear(x, 3) * aten.trace.default(net.parameter(5, 8).sin() @ net.parameter(8, 5).cos()),
        groups=[5, 8],
    ),
]


def _met(net: Net, x: Tensor, target: Any, options: dict[str, str]) -> Tensor:
    """A table over two parameters, each of which gives one dimension of it."""
    rows, columns = target([net.parameter(8), net.parameter(6)], **options)
    table = (rows * columns.sin()).T if options.get("indexing") == "xy" else rows * columns.sin()
    return net.linear(x, 8) @ table
