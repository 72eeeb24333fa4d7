"""Small networks and loops for tests of training-time pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.training.pruner import Pruner

WIDTH, HEADS, CLASSES = 16, 4, 8


class Attention(nn.Module):
    """A residual branch of attention."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, tokens, width) to the same."""
        n, t, width = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(n, t, self.heads, width // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(z.transpose(1, 2).reshape(n, t, width))


class Mlp(nn.Module):
    """A residual branch of two linear layers."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, tokens, width) to the same."""
        return x + self.down(self.up(self.norm(x)).relu())


def cnn() -> nn.Module:
    """Two convolutions with batch norm, two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
    )


def transformer() -> nn.Module:
    """Two blocks of attention and MLP."""
    torch.manual_seed(0)
    blocks = (Attention(), Mlp(), Attention(), Mlp())
    return nn.Sequential(nn.Linear(3, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (cnn, (3, 8, 8)),
    "transformer": (transformer, (5, 3)),
}


def batch(kind: str, number: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of a step, the same for the same number."""
    generator = torch.Generator().manual_seed(1000 + number)
    shape = NETS[kind][1]
    x = torch.randn(size, *shape, generator=generator)
    labels = (size,) if kind == "cnn" else (size, shape[0])
    return x, torch.randint(CLASSES, labels, generator=generator)


def loss(model: nn.Module, kind: str, number: int) -> Tensor:
    """Return the cross entropy of a step's batch."""
    x, y = batch(kind, number)
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def train(
    kind: str, pruning: Any, steps: int = 12, lr: float = 0.01, model: nn.Module | None = None, **options: Any
) -> Pruner:
    """Return a Pruner after so many attached steps."""
    model = model or NETS[kind][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    pruner = Pruner(model, batch(kind, -1, 2)[0], pruning, steps=steps + 1, **options).attach(optimizer)
    go_on(pruner, optimizer, kind, 0, steps)
    return pruner


def go_on(pruner: Pruner, optimizer: torch.optim.Optimizer, kind: str, first: int, last: int) -> None:
    """Train from a step to another."""
    for number in range(first, last):
        optimizer.zero_grad()
        loss(pruner.model, kind, number).backward()
        optimizer.step()


def finished(pruner: Pruner, kind: str) -> tuple[fxprune.Pruned, float]:
    """Return the result, and by how much its outputs differ from the masked model's."""
    x = batch(kind, -2)[0]
    before = pruner.model.eval()(x).detach()
    result = pruner.finish()
    after = result.module.eval()(x).detach()
    return result, float((before - after).abs().max())
