"""Samples for operators that pick entries by index."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rules import Net, aten, sample


def _integers(high: int, *shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randint(0, high, (batch, *shape), generator=generator),)

    return make


@functools.cache
def _held(values: str) -> Tensor:
    return torch.tensor(ast.literal_eval(values))


def _at(values: list[Any]) -> Tensor:
    """One and the same tensor each time, as a model keeps an index in an attribute that is no buffer."""
    return _held(repr(values))


def _hidden(net: Net, x: Tensor, out: int = 8) -> Tensor:
    return net.linear(x, out).tanh()


def _fused(net: Net, x: Tensor) -> Tensor:
    q, k, v = aten.unbind.int(net.linear(x, 24).view(-1, 3, 8), 1)
    return net.linear(q * k.sigmoid() + v.sin(), 3)


def _put(net: Net, x: Tensor, *values: int) -> Tensor:
    h = _hidden(net, x.unsqueeze(-1))
    return net.linear(aten.index_put.default(h, [None, _at([0, 2])], net.parameter(*values)), 3)


def _written(net: Net, x: Tensor, target: Any, *rest: Any) -> Tensor:
    """Rows 2 and 0 are written to."""
    h = _hidden(net, x)
    source = rest or (net.linear(x[:, :2], 8),)
    index = _at([2, 0]) if target not in _SCATTERS else _at([2, 0]).view(1, 2, 1).expand(x.shape[0], 2, h.shape[2])
    return net.linear(target(h, 1, index, *source), 3)


def _rows_at(x: Tensor, width: int) -> Tensor:
    return _at([2, 0]).view(1, 2, 1).expand(x.shape[0], 2, width)


def _scattered(net: Net, x: Tensor, target: Any, how: str) -> Tensor:
    """Rows 2 and 0 are combined with others."""
    source = net.linear(x[:, :2], 8)
    h, rows = _hidden(net, x), _rows_at(x, 8)
    if target is aten.scatter_reduce.two:
        return aten.scatter_reduce.two(h, 1, rows, source, how)  # type: ignore[no-any-return]
    return target(h, 1, rows, source, reduce=how)  # type: ignore[no-any-return]


def _bags(net: Net, x: Tensor, mode: int) -> Any:
    """One bag for each row."""
    offsets = torch.arange(x.shape[0]) * x.shape[1]
    return aten.embedding_bag.default(net.parameter(9, 8), x.flatten(), offsets, False, mode)


_SCATTERS = (aten.scatter.src, aten.scatter.value, aten.scatter_add.default)

SAMPLES = [
    *[
        sample(t, lambda net, x, t=t: _written(net, x, t), 4, 5, groups=[8])
        for t in (aten.scatter.src, aten.scatter_add.default, aten.index_add.default, aten.index_copy.default)
    ],
    sample(aten.scatter.value, lambda net, x: _written(net, x, aten.scatter.value, 0.5), 4, 5, groups=[8]),
    sample(
        aten.embedding.default,
        lambda net, x: net.linear(aten.embedding.default(net.parameter(9, 8), x).tanh(), 3),
        inputs=_integers(9, 4),
        groups=[8],
    ),
    sample(
        aten.embedding.default,
        lambda net, x: net.linear(net.layer(lambda: torch.nn.Embedding(9, 8))(x).tanh(), 3),
        inputs=_integers(9, 4),
        groups=[8],
        note="layer",
    ),
    sample(aten.select.int, lambda net, x: net.linear(_hidden(net, x)[:, 1], 3), 4, 5, groups=[8]),
    sample(
        aten.select.int,
        lambda net, x: net.linear((y := net.linear(x, 24).view(-1, 3, 8))[:, 0] * y[:, -1].sin() + y[:, 1], 3),
        groups=[8],
        note="fused",
    ),
    sample(
        aten.select.int,
        lambda net, x: net.linear(_hidden(net, x), 3) * _hidden(net, x)[:, 2].unsqueeze(-1),
        groups=[8],
        note="one channel",
    ),
    sample(aten.unbind.int, _fused, groups=[8]),
    sample(
        aten.select_scatter.default,
        lambda net, x: net.linear(aten.select_scatter.default(_hidden(net, x), net.linear(x[:, 0], 8), 1, 2), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten.index_select.default,
        lambda net, x: net.linear(aten.index_select.default(_hidden(net, x), 1, _at([2, 0, 2])), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten.index_select.default,
        lambda net, x: net.linear(aten.index_select.default(_hidden(net, x), -1, _at([5, 0, 5])), 3),
        groups=[3],  # of the index itself
        note="channels",
    ),
    sample(
        aten.index_select.default,
        lambda net, x: net.linear(aten.index_select.default(_hidden(net, x), 1, torch.tensor([2, 0, 2])), 3),
        *(4, 5),
        groups=[8],
        note="made in forward",
    ),
    sample(
        aten.gather.default,
        lambda net, x: net.linear(aten.gather.default(h := _hidden(net, x), 1, h.argmax(1, keepdim=True)), 3),
        *(4, 5),
        groups=[8],
        note="same",
    ),
    sample(
        aten.gather.default,
        lambda net, x: net.linear(aten.gather.default(_hidden(net, x), -1, (x > 0).to(torch.int64)), 3),
        groups=[],
    ),
    sample(
        aten.index.Tensor,
        lambda net, x: net.linear(aten.index.Tensor(_hidden(net, x), [None, _at([1, 0, 3])]), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten.index.Tensor,
        lambda net, x: net.linear(
            aten.index.Tensor(_hidden(net, x).transpose(1, 2), [_at([0, 1]), None, _at([[1], [2]])]), 3
        ),
        *(4, 5),
        groups=[8],
        note="apart",
    ),
    sample(
        aten.index.Tensor,
        lambda net, x: net.linear(net.parameter(4, 8)[x], 3),
        inputs=_integers(4, 3),
        groups=[8],
        note="table",
    ),
    sample(
        aten.index.Tensor,
        lambda net, x: net.linear(net.parameter(9, 4)[_offsets().view(-1)].view(3, 3, 4) * _hidden(net, x, 4), 3),
        *(3, 3, 5),
        groups=[4],
        note="relative positions",
    ),
    sample(aten.index_put.default, lambda net, x: _put(net, x, 2, 8), groups=None),
    sample(aten.index_put.default, lambda net, x: _put(net, x), groups=[8], note="one value"),
    *[
        sample(t, lambda net, x, t=t, how=how: net.linear(_scattered(net, x, t, how), 3), 4, 5, groups=[8])
        for t, how in ((aten.scatter.reduce, "add"), (aten.scatter_reduce.two, "amax"))
    ],
    sample(
        aten.scatter.value_reduce,
        lambda net, x: net.linear(
            aten.scatter.value_reduce(_hidden(net, x), 1, _rows_at(x, 8), 0.5, reduce="multiply"), 3
        ),
        *(4, 5),
        groups=[8],
    ),
    *[
        sample(
            aten.index_reduce.default,
            lambda net, x, how=how: net.linear(
                aten.index_reduce.default(_hidden(net, x), 1, _at([2, 0]), _hidden(net, x[:, :2]), how), 3
            ),
            *(4, 5),
            groups=[8],
            note=how,
        )
        for how in ("mean", "amax")
    ],
    sample(
        aten.index_fill.int_Scalar,
        lambda net, x: net.linear(aten.index_fill.int_Scalar(_hidden(net, x), 1, _at([2, 0]), 0.5), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten.index_fill.int_Scalar,
        lambda net, x: net.linear(aten.index_fill.int_Scalar(_hidden(net, x), 2, _at([2, 0]), 0.5), 3),
        *(4, 5),
        groups=[],
        note="channels",
    ),
    sample(
        aten.index_fill.int_Tensor,
        lambda net, x: net.linear(aten.index_fill.int_Tensor(_hidden(net, x), 1, _at([2, 0]), net.parameter()), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten.take_along_dim.default,
        lambda net, x: net.linear(aten.take_along_dim.default(_hidden(net, x), x[..., :1].argsort(1), 1), 3),
        *(4, 5),
        groups=[8],
    ),
    sample(
        aten.take_along_dim.default,
        lambda net, x: net.linear(aten.take_along_dim.default(_hidden(net, x), x[..., :1].argsort(2), 2), 3),
        *(4, 5),
        groups=[],
        note="channels",
    ),
    sample(
        aten.take_along_dim.default,
        lambda net, x: (
            net.linear(_hidden(net, x), 3) * aten.take_along_dim.default(net.parameter(4, 6), _at([1, 3, 20]))
        ),
        groups=[8],
        note="all",
    ),
    sample(
        aten.take.default,
        lambda net, x: net.linear(_hidden(net, x) * aten.take.default(net.parameter(4, 6), _at([7])), 3),
        groups=[8],
    ),
    sample(
        aten.put.default,
        lambda net, x: net.linear(_hidden(net, x, 6), 8) @ aten.put.default(net.parameter(8, 3), _at([7]), _at([0.5])),
        groups=[6],
    ),
    sample(
        aten.masked_scatter.default,
        lambda net, x: (h := net.linear(_hidden(net, x, 6), 3)) + aten.masked_scatter.default(h, x[:, :3] > 0, h.sin()),
        groups=[6],
    ),
    *[
        sample(
            aten.embedding_bag.padding_idx,
            lambda net, x, how=how: net.linear(net.layer(lambda: torch.nn.EmbeddingBag(9, 8, mode=how))(x).tanh(), 3),
            inputs=_integers(9, 4),
            groups=[8],
            note=how,
        )
        for how in ("sum", "mean", "max")
    ],
    sample(
        aten.embedding_bag.default,
        lambda net, x: net.linear(_bags(net, x, 0)[0].tanh(), 3),
        inputs=_integers(9, 4),
        groups=[8],
    ),
    sample(
        aten.embedding_bag.default,
        lambda net, x: net.linear((bags := _bags(net, x, 2))[0], 3) + bags[3][:, :3].to(torch.float32),
        inputs=_integers(9, 4),
        groups=[],
        note="how it was made",
    ),
    sample(
        aten.embedding_renorm.default,
        lambda net, x: net.linear(
            net.linear(aten.embedding.default(aten.embedding_renorm.default(net.parameter(9, 6), x, 0.5, 2.0), x), 8), 3
        ),
        inputs=_integers(9, 4),
        groups=[8],
    ),
    sample(
        aten.one_hot.default,
        lambda net, x: net.linear(net.linear(aten.one_hot.default(x, 5).to(torch.float32), 8).tanh(), 3),
        inputs=_integers(5, 4),
        groups=[8],
    ),
]


def _offsets() -> Tensor:
    place = torch.arange(3)
    return place[:, None] - place[None, :] + 2
