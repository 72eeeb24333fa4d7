"""Samples for operators that make tensors out of sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rules import Net, aten, sample


def _added(target: Any, *args: Any, weight: float = 1.0, **kwargs: Any) -> Any:
    """What the operator makes is added to eight channels; it has a batch dimension, or it would be folded away."""

    def function(net: Net, x: Tensor) -> Tensor:
        made = target([x.shape[0], 8], *args, **kwargs)
        return net.linear(net.linear(x, 8).tanh() + made * weight, 3)

    return function


def _new(target: Any, *args: Any) -> Any:
    """The same for operators that take dtype and device from a tensor."""

    def function(net: Net, x: Tensor) -> Tensor:
        made = target(x, [x.shape[0], 8], *args)
        return net.linear(net.linear(x, 8).tanh() + (made.fill_(0.5) if "empty" in str(target) else made), 3)

    return function


def _caught(net: Net, x: Tensor) -> Tensor:
    """A buffer of zeros is filled piece by piece."""
    made = aten.zeros.default([x.shape[0], 12])
    made[:, :8] = net.linear(x, 8)
    made[:, 8:] = net.linear(x, 4).sin()
    return net.linear(made, 3)


SAMPLES = [
    sample(aten.zeros.default, _added(aten.zeros.default), groups=[8]),
    sample(aten.zeros.default, _caught, groups=[8, 4], note="filled by slices"),
    sample(aten.ones.default, _added(aten.ones.default), groups=[8]),
    sample(aten.full.default, _added(aten.full.default, 0.3), groups=[8]),
    sample(
        aten.zeros.default,
        lambda net, x: net.linear(torch.cat([net.linear(x, 8).tanh(), torch.zeros(x.shape[0], 4)], 1), 3),
        groups=[8, 4],
        note="joined",
    ),
    sample(
        aten.ones.default,
        lambda net, x: net.linear(torch.ones(x.shape[0], 8) @ net.parameter(8, 6), 3) + x[:, :3],
        groups=[8, 6],
        note="multiplied",
    ),
    sample(
        aten.empty.memory_format,
        lambda net, x: net.linear(net.linear(x, 8).tanh() + aten.empty.memory_format([x.shape[0], 8]).fill_(0.5), 3),
        groups=[8],
    ),
    sample(aten.rand.default, _added(aten.rand.default, weight=0.0), groups=[8]),
    sample(aten.randn.default, _added(aten.randn.default, weight=0.0), groups=[8]),
    sample(aten.rand.generator, _added(aten.rand.generator, weight=0.0, generator=None), groups=[8]),
    sample(aten.randn.generator, _added(aten.randn.generator, weight=0.0, generator=None), groups=[8]),
    sample(
        aten.randint.default,
        lambda net, x: net.linear(net.linear(x, 8).tanh() + aten.randint.default(5, [x.shape[0], 8]) * 0.0, 3),
        groups=[8],
    ),
    sample(
        aten.randint.low,
        lambda net, x: net.linear(net.linear(x, 8).tanh() + aten.randint.low(2, 5, [x.shape[0], 8]) * 0.0, 3),
        groups=[8],
    ),
    *[
        sample(
            t,
            lambda net, x, t=t, rest=rest: net.linear(
                net.linear(x, 8).tanh() * (1 + t(x.shape[0], *rest).to(torch.float32).abs().sum()), 3
            ),
            groups=[8],
        )
        for t, rest in (
            (aten.hann_window.default, ()),
            (aten.hann_window.periodic, (False,)),
            (aten.hamming_window.default, ()),
            (aten.randperm.default, ()),
        )
    ],
    sample(
        aten.logspace.default,
        lambda net, x: net.linear(net.linear(x, 8).tanh() * aten.logspace.default(0, 1, x.shape[0]).unsqueeze(-1), 3),
        groups=[8],
    ),
    sample(
        aten.empty_strided.default,
        lambda net, x: net.linear(net.linear(x, 8) * aten.empty_strided.default([x.shape[0], 1], [1, 1]).fill_(2.0), 3),
        groups=[8],
    ),
    sample(aten.new_zeros.default, _new(aten.new_zeros.default), groups=[8]),
    sample(aten.new_ones.default, _new(aten.new_ones.default), groups=[8]),
    sample(aten.new_full.default, _new(aten.new_full.default, 0.3), groups=[8]),
    sample(aten.new_empty.default, _new(aten.new_empty.default), groups=[8]),
    # What depends on the position is kept whole where it is computed when the model runs: from the batch size here.
    sample(
        aten.arange.default,
        lambda net, x: net.linear(net.linear(x, 8).tanh() * aten.arange.default(x.shape[0]).unsqueeze(-1), 3),
        groups=[8],
    ),
    sample(
        aten.arange.start,
        lambda net, x: net.linear(net.linear(x, 8).tanh() * aten.arange.start(1, x.shape[0] + 1).unsqueeze(-1), 3),
        groups=[8],
    ),
    sample(
        aten.arange.start_step,
        lambda net, x: net.linear(
            net.linear(x, 8).tanh() * aten.arange.start_step(0, 2 * x.shape[0], 2).unsqueeze(-1), 3
        ),
        groups=[8],
    ),
    sample(
        aten.linspace.default,
        lambda net, x: net.linear(net.linear(x, 8).tanh() * aten.linspace.default(0, 1, x.shape[0]).unsqueeze(-1), 3),
        groups=[8],
    ),
    sample(
        aten.eye.default,
        lambda net, x: net.linear(
            (net.linear(x, 8).unsqueeze(0) * aten.eye.default(x.shape[0]).unsqueeze(-1)).sum(0), 3
        ),
        groups=[8],
    ),
    # Elsewhere it is a constant by the time the rules are applied, and cut like any other.
    sample([], lambda net, x: net.linear(net.linear(x, 8) * torch.arange(8).float(), 3), groups=[8], note="folded"),
    sample(
        aten.scalar_tensor.default,
        lambda net, x: net.linear(net.linear(x, 8).tanh() * aten.scalar_tensor.default(x.shape[0]), 3),
        groups=[8],
    ),
]
