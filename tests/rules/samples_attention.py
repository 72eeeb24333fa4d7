"""Samples for scaled dot product attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rules import Net, aten, sample

ATTENTION = aten.scaled_dot_product_attention.default


def _heads(net: Net, x: Tensor, heads: int, width: int) -> Tensor:
    return net.linear(x, heads * width).view(x.shape[0], x.shape[1], heads, width).transpose(1, 2)


def _merge(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def _separate(net: Net, x: Tensor, **options: Any) -> Tensor:
    q, k, v = _heads(net, x, 4, 3), _heads(net, x, 4, 3), _heads(net, x, 4, 5)
    return net.linear(_merge(ATTENTION(q, k, v, **options)), 3)


def _fused(net: Net, x: Tensor) -> Tensor:
    q, k, v = net.linear(x, 24).reshape(x.shape[0], x.shape[1], 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return net.linear(_merge(ATTENTION(q, k, v)), 3)


def _grouped(net: Net, x: Tensor) -> Tensor:
    """Six query heads for two key heads: three query heads go with one key head."""
    q, k, v = _heads(net, x, 6, 3), _heads(net, x, 2, 3), _heads(net, x, 2, 5)
    return net.linear(_merge(ATTENTION(q, k, v, enable_gqa=True)), 3)


def _viewed(net: Net, x: Tensor) -> Tensor:
    """Heads of another width for values than for keys are laid out otherwise."""
    q, k, v = (_heads(net, x, 2, 8) for _ in range(3))
    return net.linear(ATTENTION(q, k, v).permute(0, 2, 1, 3).view(x.shape[0], 6, 16), 3)


def _masked(net: Net, x: Tensor) -> Tensor:
    """A bias for each head and each pair of positions."""
    return _separate(net, x, attn_mask=net.parameter(4, 6, 6))


def _one_head(net: Net, x: Tensor) -> Tensor:
    return net.linear(ATTENTION(net.linear(x, 4), net.linear(x, 4), net.linear(x, 7)), 3)


def _layer(net: Net, x: Tensor, weights: bool) -> Tensor:
    """torch's own layer, which merges batch and heads into one dimension on its way."""
    y = net.linear(x, 8)
    return net.linear(
        net.layer(lambda: nn.MultiheadAttention(8, 4, batch_first=True))(y, y, y, need_weights=weights)[0], 3
    )


SAMPLES = [
    sample(ATTENTION, _separate, 6, 5, groups=[4, 3, 5], note="separate"),
    sample(ATTENTION, lambda net, x: _separate(net, x, is_causal=True), 6, 5, groups=[4, 3, 5], note="causal"),
    sample(ATTENTION, lambda net, x: _separate(net, x, scale=0.3), 6, 5, groups=[4, 3, 5], note="scale"),
    sample(
        ATTENTION,
        lambda net, x: _separate(net, x, attn_mask=(torch.ones(6, 6) > 0).tril()),
        *(6, 5),
        groups=[4, 3, 5],
        note="mask",
    ),
    sample(ATTENTION, _masked, 6, 5, groups=[4, 3, 5], note="bias"),
    sample(ATTENTION, _fused, 6, 5, groups=[4, 2], note="fused"),
    sample(ATTENTION, _grouped, 6, 5, groups=[2, 3, 5], note="grouped"),
    sample(ATTENTION, lambda net, x: _layer(net, x, False), 6, 5, groups=[8, 4, 2, 8], note="layer"),
    sample([], lambda net, x: _layer(net, x, True), 6, 5, groups=[8, 4, 2, 8], note="layer with weights"),
    sample(ATTENTION, _one_head, 6, 5, groups=[4, 7], note="one head"),
    sample(aten.view.default, _viewed, 6, 5, groups=[2, 8, 8], note="of what fused attention lays out its way"),
]
