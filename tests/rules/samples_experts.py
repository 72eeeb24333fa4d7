"""Samples for mixtures of experts: a router chooses, experts run on what they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations import moe  # noqa: F401  (it defines the operator)

from rules import Net, aten, sample

FALLBACK = torch.ops.transformers.grouped_mm_fallback.default
EXPERTS, WIDTH, TOP = 4, 8, 2


def _routed(net: Net, x: Tensor, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    """Weights and indices of the best experts of each row."""
    scores = net.linear(x, experts).softmax(-1)
    weights, chosen = aten.topk.default(scores, TOP)
    return weights / weights.sum(-1, keepdim=True), chosen


def _sorted(product: Any) -> Any:
    """Rows sorted by expert, a grouped product up and one down, then back into their order."""

    def function(net: Net, x: Tensor) -> Tensor:
        h = net.linear(x, WIDTH).tanh()
        weights, chosen = _routed(net, h)
        numbers, order = torch.sort(chosen.reshape(-1))
        counts = aten.histc.default(numbers.float(), EXPERTS, 0, EXPERTS - 1)
        ends = aten.cumsum.default(counts, 0, dtype=torch.int32)
        y = product(h[order // TOP], net.parameter(EXPERTS, WIDTH, 12), ends)
        y = y + net.parameter(EXPERTS, 12)[numbers]
        y = product(y.relu(), net.parameter(EXPERTS, WIDTH, 12).transpose(1, 2), ends)
        y = (y * weights.reshape(-1)[order].unsqueeze(-1))[torch.argsort(order)]
        return net.linear(y.view(-1, TOP, WIDTH).sum(1), 3)

    return function


def _dense(net: Net, x: Tensor, weights: Tensor) -> Tensor:
    """Every expert runs on every row; weights (rows, experts) say how much of it is taken."""
    h = torch.einsum("bi,eih->beh", x, net.parameter(EXPERTS, x.shape[1], 6)).tanh()
    return net.linear(torch.einsum("beh,eho,be->bo", h, net.parameter(EXPERTS, 6, 7), weights), 3)


def _one_hot(net: Net, x: Tensor) -> Tensor:
    weights, chosen = _routed(net, x)
    return _dense(net, x, (aten.one_hot.default(chosen, EXPERTS) * weights.unsqueeze(-1)).sum(1))


def _scattered(net: Net, x: Tensor) -> Tensor:
    weights, chosen = _routed(net, x)
    return _dense(net, x, aten.scatter.src(torch.zeros(x.shape[0], EXPERTS), 1, chosen, weights))


def _switch(net: Net, x: Tensor) -> Tensor:
    """One expert for each row, its matrix looked up."""
    chosen = aten.argmax.default(net.linear(x, EXPERTS), -1)
    up = net.parameter(EXPERTS, 5, 6)[chosen]
    return net.linear((x.unsqueeze(1) @ up).squeeze(1), 3)


def _best(net: Net, x: Tensor) -> Tensor:
    best, chosen = aten.max.dim(net.linear(x, EXPERTS), -1)
    return net.linear(net.layer(lambda: torch.nn.Embedding(EXPERTS, 6))(chosen) * best.unsqueeze(-1), 3)


def _used_as_numbers(net: Net, x: Tensor) -> Tensor:
    """The index itself is computed with: its axis stays whole."""
    _, chosen = aten.topk.default(net.linear(x, EXPERTS), TOP)
    return net.linear(chosen.float() * 0.1, 3)


SAMPLES = [
    sample([FALLBACK, aten.histc.default], _sorted(FALLBACK), groups=[4, 8, 8, 12]),
    sample([aten.topk.default, aten.one_hot.default], _one_hot, groups=[4, 6, 7], note="routing"),
    sample(aten.scatter.src, _scattered, groups=[4, 6, 7], note="routing"),
    sample(aten.argmax.default, _switch, groups=[4, 6], note="routing"),
    sample(aten.max.dim, _best, groups=[4, 6], note="routing"),
    sample(aten.topk.default, _used_as_numbers, groups=[], note="used as numbers"),
]


class _Half(torch.nn.Module):
    """One layer of experts, in the precision that torch's own grouped product takes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(16, EXPERTS)
        self.up = torch.nn.Parameter(torch.randn(EXPERTS, 16, 8) / 4)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        numbers, order = torch.sort(chosen)
        ends = torch.histc(numbers.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        y = aten._grouped_mm.default(x[order], self.up, ends) * weights[order].unsqueeze(-1)
        result: Tensor = self.head(y[torch.argsort(order)])
        return result


def experts_in_half_precision() -> torch.nn.Module:
    """Return a model of 4 experts in bfloat16, its weights the same each time."""
    torch.manual_seed(0)
    return _Half().to(torch.bfloat16)
