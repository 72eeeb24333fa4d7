"""A small vision transformer on handwritten digits: heads and inner widths of MLPs go by movement pruning.

python -m examples.vit
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.common import Block, Digits, Result, finished, train
from fxprune import Pruner


class ViT(nn.Module):
    """Patches of 2x2 pixels, a learned vector for each place, blocks, and a classifier on the mean."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, 10)."""
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.places)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def main(
    width: int = 96,
    depth: int = 4,
    heads: int = 6,
    steps: int = 800,
    batch: int = 64,
    lr: float = 1e-3,
    rounds: int = 30,
    seed: int = 0,
) -> Result:
    """Train the dense model, train on while heads and MLPs shrink under its own teaching, and compare.

    Args:
        width, depth, heads: of the transformer.
        steps: of training, and as many again while it is pruned.
        batch: images of a step.
        lr: the first learning rate.
        rounds: of timing.
    """
    torch.manual_seed(seed)
    digits = Digits.load(seed)
    model = ViT(width, depth, heads)
    train(model, digits.draw(batch, seed), functional.cross_entropy, steps, lr)
    dense = digits.accuracy(model)
    pruning = {
        "method": {"name": "movement", "initial": "magnitude"},
        "pattern": ["head", "ffn"],
        "target": {"sparsity": 0.5},
        "max_sparsity": 0.8,
        "schedule": {"end": 2 * steps // 3},
    }
    pruner = Pruner(
        model, digits.test_images[:batch], pruning, steps=steps, distillation={"alpha": 0.5}, backend="torch"
    )
    train(model, digits.draw(batch, seed + 1), functional.cross_entropy, steps, lr, pruner, distil=True)
    return finished("ViT, digits", "accuracy", dense, pruner.finish(), digits.accuracy, rounds=rounds)


if __name__ == "__main__":
    main()
