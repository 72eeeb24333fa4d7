"""Samples for operators that reduce, scan or rank a dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rules import Net, Sample, aten, sample

Step = Callable[[Tensor], Any]


def _channels(target: Any, step: Step, groups: list[int] | None = None, *, note: str = "", xfail: str = "") -> Sample:
    """The channels of (N, 4, 8) are reduced, and what they are reduced to is used beside them."""

    def function(net: Net, x: Tensor) -> Tensor:
        h = net.linear(x, 8).sin()
        return net.linear(h, 3) + _merged(step(h))

    return sample(
        target, function, 4, 5, groups=[8] if groups is None else groups, note=note or "channels", xfail=xfail
    )


def _rows(target: Any, step: Step, groups: list[int] | None = None, note: str = "") -> Sample:
    """Positions are reduced, the channels pass."""
    return sample(
        target,
        lambda net, x: net.linear(_merged(step(net.linear(x, 8).sin())) * net.parameter(8), 3),
        *(4, 5),
        groups=[8] if groups is None else groups,
        note=note or "rows",
    )


def _merged(y: Any) -> Tensor:
    parts = y if isinstance(y, tuple | list) else [y]
    return sum(p if p.is_floating_point() else p.to(torch.float32) for p in parts)  # type: ignore[return-value]


def _both(target: Any, **keyword: Any) -> list[Sample]:
    """A reduction of one dimension, of the channels and of the positions."""
    return [
        _channels(target, lambda h: target(h, [-1], True, **keyword)),
        _rows(target, lambda h: target(h, [1], **keyword)),
    ]


def _one(target: Any, *, keepdim: bool = True, of: Callable[[Tensor], Tensor] = lambda h: h) -> list[Sample]:
    """The same for operators that take one number for the dimension."""
    return [
        _channels(target, lambda h: target(of(h), -1, keepdim)),
        _rows(target, lambda h: target(of(h), 1)),
    ]


def _all(target: Any, of: Callable[[Tensor], Tensor] = lambda h: h) -> Sample:
    """A reduction to one number."""
    return _channels(target, lambda h: target(of(h)), note="all")


def _positive(h: Tensor) -> Tensor:
    return h.abs() + 0.5


def _flags(h: Tensor) -> Tensor:
    return h > -0.4


def _few(h: Tensor) -> Tensor:
    return h > 0.8


def _gated(net: Net, x: Tensor) -> Tensor:
    """Squeeze and excite."""
    y = net.conv(x, 8)
    gate = net.conv(net.conv(y.mean((2, 3), keepdim=True), 4).relu(), 8).sigmoid()
    return net.conv(y * gate, 3)


def _written_out(net: Net, x: Tensor) -> Tensor:
    """Layer normalisation in single steps."""
    y = net.linear(x, 8)
    centred = y - y.mean(-1, keepdim=True)
    return net.linear(centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * net.parameter(8), 3)


REDUCTIONS = [
    *_both(aten.sum.dim_IntList),
    *_both(aten.mean.dim),
    *_both(aten.amax.default),
    *_both(aten.amin.default),
    *_both(aten.logsumexp.default),
    *_both(aten.nansum.default),
    _all(aten.sum.default),
    _all(aten.mean.default),
    _channels(aten.amax.default, lambda h: aten.amax.default(h), note="all"),
    _channels(aten.amin.default, lambda h: aten.amin.default(h), note="all"),
    _channels(aten.mean.dim, lambda h: aten.mean.dim(h, [1, 2], True), note="two dimensions"),
    _all(aten.max.default),
    _all(aten.min.default),
    _all(aten.prod.default, _positive),
    *_one(aten.prod.dim_int, of=_positive),
    *_one(aten.any.dim, of=_few),
    *_one(aten.all.dim, of=_flags),
    _all(aten.any.default, _few),
    _all(aten.all.default, _flags),
    _channels(aten.any.dims, lambda h: aten.any.dims(_few(h), [-1], True)),
    _channels(aten.all.dims, lambda h: aten.all.dims(_flags(h), [-1], True)),
    _all(aten.count_nonzero.default, _few),
    _channels(aten.count_nonzero.dim_IntList, lambda h: aten.count_nonzero.dim_IntList(_few(h), [-1]).unsqueeze(-1)),
    _rows(aten.count_nonzero.dim_IntList, lambda h: aten.count_nonzero.dim_IntList(_few(h), [1])),
    *[
        _channels(
            aten.linalg_vector_norm.default,
            lambda h, n=n: aten.linalg_vector_norm.default(h, n, [-1], True),
            note=f"{n}",
        )
        for n in (2, 1, 3.5, float("inf"), -float("inf"), 0)
    ],
    _rows(aten.linalg_vector_norm.default, lambda h: aten.linalg_vector_norm.default(h, 2, [1])),
    _all(aten.linalg_vector_norm.default),
    _channels(aten.norm.ScalarOpt_dim, lambda h: aten.norm.ScalarOpt_dim(h, 2, [-1], True)),
    _channels(aten.norm.ScalarOpt_dim, lambda h: aten.norm.ScalarOpt_dim(h, -1, [-1], True), note="-1"),
    _channels(aten.norm.Scalar, lambda h: aten.norm.Scalar(h, 2), note="all"),
    *[
        _channels(t, lambda h, t=t: t(h, [-1], correction=1, keepdim=True))
        for t in (aten.var.correction, aten.std.correction)
    ],
    *[_rows(t, lambda h, t=t: t(h, [1], correction=0)) for t in (aten.var.correction, aten.std.correction)],
    *[_channels(t, lambda h, t=t: t(h, [-1], False, True)) for t in (aten.var.dim, aten.std.dim)],
    *[_rows(t, lambda h, t=t: t(h, [1])) for t in (aten.var.dim, aten.std.dim)],
    _channels(aten.var_mean.correction, lambda h: aten.var_mean.correction(h, [-1], correction=0, keepdim=True)),
    _channels(aten.var_mean.correction, lambda h: aten.var_mean.correction(h, [-1, 1], keepdim=True), note="default"),
    _rows(aten.var_mean.correction, lambda h: aten.var_mean.correction(h, [1])),
    *[_channels(t, lambda h, t=t: t(h, [-1], True, True)) for t in (aten.var_mean.dim, aten.std_mean.dim)],
    *[_rows(t, lambda h, t=t: t(h, [1], False)) for t in (aten.var_mean.dim, aten.std_mean.dim)],
    _channels(aten.std_mean.correction, lambda h: aten.std_mean.correction(h, [-1], correction=0, keepdim=True)),
    _rows(aten.std_mean.correction, lambda h: aten.std_mean.correction(h, [1])),
    *[
        _channels(t, lambda h, t=t: t(h), note="all")
        for t in (aten.var.default, aten.std.default, aten.var_mean.default, aten.std_mean.default)
    ],
    *_both(aten.nanmean.default),
    _all(aten.nanmean.default),
    _channels(aten.aminmax.default, lambda h: aten.aminmax.default(h, dim=-1, keepdim=True)),
    _channels(aten.aminmax.default, lambda h: aten.aminmax.default(h), note="all"),
    _rows(aten.aminmax.default, lambda h: aten.aminmax.default(h, dim=1)),
    *_both(aten.frobenius_norm.dim),
    _channels(
        aten.norm.ScalarOpt_dim_dtype,
        lambda h: aten.norm.ScalarOpt_dim_dtype(h, 3, [-1], True, dtype=torch.float32),
    ),
    _channels(aten.norm.ScalarOpt_dtype, lambda h: aten.norm.ScalarOpt_dtype(h, 1, dtype=torch.float32), note="all"),
    _channels(aten.linalg_norm.default, lambda h: aten.linalg_norm.default(h), note="all"),
    _channels(aten.linalg_norm.default, lambda h: aten.linalg_norm.default(h, 3, [-1], True), note="vector"),
    _channels(aten.linalg_norm.default, lambda h: aten.linalg_norm.default(h, -1, [-1], True), [], note="smallest"),
    _channels(aten.linalg_norm.ord_str, lambda h: aten.linalg_norm.ord_str(h, "nuc", [-2, -1], True)),
    *[
        _channels(
            aten.linalg_matrix_norm.default,
            lambda h, n=n: aten.linalg_matrix_norm.default(h, n, [-2, -1], True),
            [] if n < 0 else [8],
            note=str(n),
        )
        for n in (1, 2, float("inf"), -1)
    ],
    _channels(aten.linalg_matrix_norm.str_ord, lambda h: aten.linalg_matrix_norm.str_ord(h, "fro", [-2, -1], True)),
    _rows(aten.renorm.default, lambda h: aten.renorm.default(h, 2, 1, 0.4).sum(1)),
    sample(
        aten.renorm.default,
        lambda net, x: net.linear(aten.renorm.default(net.linear(x, 8), 2, 1, 0.4), 3),
        groups=[8],
        note="channels",
    ),
    *[
        sample(
            t,
            lambda net, x, t=t: net.linear(t(net.linear(x, 8), net.linear(x, 8).sin(), dim=1), 3),
            *(3, 5),
            groups=[8],
        )
        for t in (aten.cross.default, aten.linalg_cross.default)
    ],
    sample(
        aten.cross.default,
        lambda net, x: net.linear(aten.cross.default(net.linear(x, 8), net.linear(x, 8).sin()), 3),
        *(3, 5),
        groups=[8],
        note="first of three",
    ),
    sample(aten.mean.dim, _gated, 2, 4, 4, groups=[8, 4], note="squeeze and excite"),
    sample(aten.mean.dim, _written_out, 4, 5, groups=[8], note="written out"),
]


def _softmax(target: Any) -> list[Sample]:
    tail = (False,) if target._schema.name in ("aten::_softmax", "aten::_log_softmax") else ()
    return [
        sample(
            target,
            lambda net, x, dim=dim: net.linear(target(net.linear(x, 8), dim, *tail), 3),
            *(4, 5),
            groups=[8],
            note=f"{dim}",
        )
        for dim in (-1, 1)
    ]


def _frozen(target: Any, step: Step, note: str) -> Sample:
    """The rule keeps the channels whole."""
    return sample(
        target, lambda net, x: net.linear(_merged(step(net.linear(x, 8).sin())), 3), 4, 5, groups=[], note=note
    )


def _ranked(target: Any, take: Step) -> list[Sample]:
    """Ranking the positions lets the channels pass; ranking the channels does not."""
    return [
        sample(
            target,
            lambda net, x: net.linear(take(_call(target, net.linear(x, 8).sin(), 1)) * net.parameter(8), 3),
            *(4, 5),
            groups=[8],
            note="rows",
        ),
        _frozen(target, lambda h: take(_call(target, h, -1)), "channels"),
    ]


def _call(target: Any, h: Tensor, dim: int) -> Any:
    return target(h, stable=True, dim=dim) if target is aten.sort.stable else target(h, dim)


def _first(y: Any) -> Tensor:
    return _merged(y[0] if isinstance(y, tuple) else y)


SCANS = [
    *[
        s
        for target in (aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default)
        for s in (_rows(target, lambda h, t=target: t(h, 1)), _frozen(target, lambda h, t=target: t(h, -1), "channels"))
    ],
    _rows(aten.diff.default, lambda h: aten.diff.default(h, 1, 1)),
    _frozen(aten.diff.default, lambda h: aten.diff.default(h), "channels"),
    *[
        s
        for target in (aten.argmax.default, aten.argmin.default)
        for s in (
            _rows(target, lambda h, t=target: t(h, 1)),
            _channels(target, lambda h, t=target: t(h, -1, True), []),
            _channels(target, lambda h, t=target: t(h), [], note="all"),
        )
    ],
    *[
        s
        for target in (aten.max.dim, aten.min.dim)
        for s in (
            _rows(target, lambda h, t=target: t(h, 1)),
            _channels(target, lambda h, t=target: t(h, -1, True), []),
        )
    ],
    *[s for t in (aten.sort.default, aten.sort.stable, aten.argsort.default) for s in _ranked(t, _first)],
    _rows(aten.topk.default, lambda h: aten.topk.default(h, 3, 1)[0]),
    _channels(aten.topk.default, lambda h: aten.topk.default(h, 3)[0], [8], note="channels"),
]

GATES = [
    sample(
        aten.glu.default, lambda net, x: net.linear(aten.glu.default(net.linear(x, 12)), 3), groups=[6], note="channels"
    ),
    sample(
        aten.glu.default,
        lambda net, x: net.conv(aten.glu.default(net.conv(x, 12), 1), 3),
        *(2, 4, 4),
        groups=[6],
        note="images",
    ),
    sample(
        aten.glu.default,
        lambda net, x: net.linear(aten.glu.default(net.linear(x, 8), 1), 3),
        4,
        5,
        groups=[8],
        note="rows",
    ),
]


def _registers(net: Net, x: Tensor) -> Tensor:
    """Learned positions in front of those of the input, under attention that is written out."""
    h = torch.cat([net.parameter(1, 4, 8).expand(len(x), -1, -1), net.linear(x, 8)], 1)
    scores = aten.softmax.int(net.linear(h, 6) @ net.linear(h, 6).transpose(1, 2), -1)
    return net.linear(scores @ h, 3)[:, 4:]


SAMPLES = [
    *REDUCTIONS,
    sample(aten.softmax.int, _registers, 4, 5, groups=[6, 8], note="registers"),
    *_softmax(aten.softmax.int),
    *_softmax(aten._softmax.default),
    *_softmax(aten._safe_softmax.default),
    *_softmax(aten.special_softmax.default),
    *_softmax(aten.special_log_softmax.default),
    *_softmax(aten.log_softmax.int),
    *_softmax(aten._log_softmax.default),
    *SCANS,
    *GATES,
]
