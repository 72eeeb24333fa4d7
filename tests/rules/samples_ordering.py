"""Samples for medians, quantiles, running extremes and places in an order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rules import Net, Sample, aten, sample

Step = Callable[[Tensor], Any]


def _h(net: Net, x: Tensor, out: int = 8) -> Tensor:
    return net.linear(x, out).tanh()


def _merged(y: Any) -> Tensor:
    parts = y if isinstance(y, tuple | list) else [y]
    return sum(p.to(torch.float32) for p in parts)  # type: ignore[return-value]


def _ranked(target: Any, rows: Step, channels: Step) -> list[Sample]:
    """Positions are ranked and features pass; features are ranked and stay whole."""
    return [
        sample(
            target,
            lambda net, x: net.linear(_merged(rows(_h(net, x))) * net.parameter(8), 3),
            *(4, 5),
            groups=[8],
            note="rows",
        ),
        sample(
            target,
            lambda net, x: (h := _h(net, net.linear(x, 6).sin())).sum(-1) + _merged(channels(h)),
            *(4, 5),
            groups=[6],
            note="channels",
        ),
    ]


def _one(target: Any, *before: Any) -> list[Sample]:
    """An operator that takes a dimension, and keeps it as one number where asked."""
    return _ranked(target, lambda h: target(h, *before, 1), lambda h: [p[..., 0] for p in target(h, *before, -1, True)])


def _placed(net: Net, x: Tensor, target: Any, *args: Any) -> Tensor:
    """What is looked for has eight features; it stands where an argument is None."""
    h = _h(net, x)
    return net.linear(h * _merged(target(*[h if a is None else a for a in args])), 3)


def _borders(x: Tensor) -> Tensor:
    return torch.tensor([-0.5, 0.0, 0.5]).to(x)


def _places(h: Tensor) -> Tensor:
    return torch.tensor([0.0, 1.0, 3.0, 4.0]).to(h)


SAMPLES = [
    *[
        s
        for t in (aten.cummax.default, aten.cummin.default)
        for s in _ranked(t, lambda h, t=t: t(h, 1), lambda h, t=t: t(h, -1)[0][..., 2])
    ],
    sample(
        aten.msort.default,
        lambda net, x: net.linear(x, 4) @ aten.msort.default(net.parameter(4, 8)) @ net.parameter(8, 3),
        groups=[8],
    ),
    *[
        sample(t, lambda net, x, t=t: net.linear(x, 3) * t(net.parameter(6, 8) @ net.parameter(8, 5)), groups=[8])
        for t in (aten.median.default, aten.nanmedian.default)
    ],
    *_one(aten.median.dim),
    *_one(aten.nanmedian.dim),
    *_one(aten.mode.default),
    *_one(aten.kthvalue.default, 2),
    *[
        s
        for t in (aten.quantile.scalar, aten.nanquantile.scalar)
        for s in _ranked(t, lambda h, t=t: t(h, 0.3, 1), lambda h, t=t: t(h, 0.3, -1))
    ],
    *[
        s
        for t in (aten.quantile.default, aten.nanquantile.default)
        for s in _ranked(
            t,
            lambda h, t=t: t(h, torch.tensor([0.2, 0.7]).to(h), 1).sum(0),
            lambda h, t=t: t(h, torch.tensor([0.2, 0.7]).to(h), -1).sum(0),
        )
    ],
    sample(
        aten.quantile.scalar,
        lambda net, x: net.linear(x, 3) * aten.quantile.scalar(net.parameter(6, 8) @ net.parameter(8, 5), 0.3),
        groups=[8],
        note="all",
    ),
    # ------------------------------------------------------------------ places in an order
    sample(
        aten.searchsorted.Tensor,
        lambda net, x: _placed(net, x, aten.searchsorted.Tensor, _borders(x), None),
        groups=[8],
    ),
    sample(
        aten.searchsorted.Tensor,
        lambda net, x: net.linear(
            x * _merged(aten.searchsorted.Tensor(net.linear(_h(net, x, 6), 4).sort(-1)[0], x)), 3
        ),
        groups=[6],
        note="rows of borders",
    ),
    sample(
        aten.searchsorted.Scalar,
        lambda net, x: (
            net.linear(x, 3)
            * _merged(aten.searchsorted.Scalar((net.parameter(8, 6) @ net.parameter(6)).sort()[0], 0.1))
        ),
        groups=[6],
    ),
    sample(
        aten.bucketize.Tensor,
        lambda net, x: _placed(net, x, aten.bucketize.Tensor, None, _borders(x)),
        groups=[8],
    ),
    sample(
        aten.bucketize.Scalar,
        lambda net, x: (
            net.linear(x, 3) * _merged(aten.bucketize.Scalar(0.1, (net.parameter(8, 6) @ net.parameter(6)).sort()[0]))
        ),
        groups=[6],
    ),
    sample(
        aten.isin.Tensor_Tensor,
        lambda net, x: net.linear(
            (h := _h(net, x)) + _merged(aten.isin.Tensor_Tensor((h * 2).round(), torch.tensor([0.0, 1.0]).to(x))), 3
        ),
        groups=[8],
    ),
    sample(
        aten.isin.Tensor_Scalar,
        lambda net, x: net.linear((h := _h(net, x)) + _merged(aten.isin.Tensor_Scalar((h * 2).round(), 1.0)), 3),
        groups=[8],
    ),
    sample(
        aten.isin.Scalar_Tensor,
        lambda net, x: (
            net.linear(_h(net, x), 3) + _merged(aten.isin.Scalar_Tensor(0.0, (net.parameter(6) * 0.1).round()))
        ),
        groups=[8],
    ),
    # ------------------------------------------------------------------ neighbours
    *[
        s
        for t in (aten.trapezoid.dx, aten.trapz.dx)
        for s in _ranked(t, lambda h, t=t: t(h, dim=1), lambda h, t=t: t(h, dx=0.5))
    ],
    *[
        s
        for t in (aten.trapezoid.x, aten.trapz.x)
        for s in _ranked(t, lambda h, t=t: t(h, _places(h), dim=1), lambda h, t=t: t(h, torch.arange(8).to(h) * 0.3))
    ],
    *_ranked(
        aten.cumulative_trapezoid.dx,
        lambda h: aten.cumulative_trapezoid.dx(h, dim=1).sum(1),
        lambda h: aten.cumulative_trapezoid.dx(h).sum(-1),
    ),
    *_ranked(
        aten.cumulative_trapezoid.x,
        lambda h: aten.cumulative_trapezoid.x(h, _places(h), dim=1).sum(1),
        lambda h: aten.cumulative_trapezoid.x(h, torch.arange(8).to(h) * 0.3).sum(-1),
    ),
    *_ranked(
        aten.gradient.scalarint,
        lambda h: [g.sin().sum(1) for g in aten.gradient.scalarint(h, dim=1)],
        lambda h: [g.sin().sum(-1) for g in aten.gradient.scalarint(h, dim=-1)],
    ),
    *_ranked(
        aten.gradient.array,
        lambda h: [g.sin().sum(1) for g in aten.gradient.array(h, dim=[1])],
        lambda h: [g.sin().sum(-1) for g in aten.gradient.array(h, dim=[1, 2])],
    ),
    sample(
        aten.multinomial.default,
        lambda net, x: (
            (p := net.linear(_h(net, x, 6), 4).softmax(-1)) + 0 * _merged(aten.multinomial.default(p, 2))[:, :1]
        ),
        groups=[6],
    ),
]
