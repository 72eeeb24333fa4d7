"""What the examples share: a training loop, a transformer block, the handwritten digits, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from fxprune import Pruned, Pruner

#: Step -> the model's inputs, and what the loss is computed with.
Draw = Callable[[int], tuple[tuple[Tensor, ...], Tensor]]


def train(
    model: nn.Module,
    draw: Draw,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    lr: float,
    pruner: Pruner | None = None,
    distil: bool = False,
) -> None:
    """Train a model in place with AdamW, the rate falling linearly to zero; with a Pruner, prune it meanwhile.

    That is all there is to do in a loop of one's own: `attach`, and `distill` where there is a teacher.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    if pruner is not None:
        pruner.attach(optimizer)
    model.train()
    for step in range(steps):
        inputs, labels = draw(step)
        value = loss(model(*inputs), labels)
        if pruner is not None and distil:
            value = pruner.distill(value)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


class Attention(nn.Module):
    """Self-attention of several heads; `causal`: a position sees itself and those before it."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.size, self.causal = width // heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        query, key, value = (
            f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        mixed: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and an MLP of four times the width, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


@dataclass(frozen=True, slots=True)
class Digits:
    """Scikit-learn's handwritten digits, (N, 1, 8, 8) from -1 to 1, and which each is; a quarter is for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        """Split the images."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = torch.from_numpy(raw.images).float().unsqueeze(1) / 8 - 1
        labels = torch.from_numpy(raw.target).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        test, rest = order[: len(order) // 4], order[len(order) // 4 :]
        return cls(images[rest], labels[rest], images[test], labels[test])

    def draw(self, batch: int, seed: int) -> Draw:
        """Return what draws batches, each image shifted by a pixel or not."""
        generator = torch.Generator().manual_seed(seed)

        def some(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
            rows = torch.randint(len(self.labels), (batch,), generator=generator)
            down, right = (int(torch.randint(-1, 2, (1,), generator=generator)) for _ in range(2))
            return (self.images[rows].roll((down, right), (2, 3)),), self.labels[rows]

        return some

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of the test images that are named rightly."""
        with torch.no_grad():
            return float((model(self.test_images).argmax(1) == self.test_labels).float().mean())


@dataclass(frozen=True, slots=True)
class Result:
    """What an example comes to.

    Attributes:
        name: of the score.
        dense, small: the score of the dense model and of the smaller one.
        pruned: the smaller model, with proof and report.
    """

    name: str
    dense: float
    small: float
    pruned: Pruned


def finished(
    title: str, name: str, dense: float, pruned: Pruned, score: Callable[[nn.Module], float], **timing: Any
) -> Result:
    """Score and time the smaller model, print the table, and return all of it.

    Args:
        title: of the table.
        name: of the score.
        dense: the dense model's score.
        score: of a model.
        timing: as `Pruned.measure` takes it.
    """
    result = Result(name, dense, score(pruned.module), pruned)
    report, latency = pruned.report, pruned.measure(**timing)
    table = Table("", name, "parameters", "MACs", "ms", title=title)
    for row, value, kind in (("dense", dense, "dense"), ("pruned", result.small, "pruned")):
        params, macs = getattr(report.params, kind), getattr(report.macs, kind)
        table.add_row(
            row, f"{value:.3f}", f"{params:,.0f}", f"{macs:,.0f}", f"{getattr(latency.milliseconds, kind):.2f}"
        )
    console = Console()
    console.print(table)
    low, high = latency.interval
    console.print(
        f"{latency.speedup:.2f}x as fast ({low:.2f} to {high:.2f}; {latency.backend}, batch {latency.batch}, "
        f"{latency.threads} threads); pruned equals masked within {report.proof.error:.1e}",
        highlight=False,
    )
    return result
