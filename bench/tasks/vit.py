"""A small vision transformer that learns handwritten digits in a few minutes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bench.tasks import cache, digits, transformer
from bench.tasks.task import Task
from bench.tasks.training import Progress


class ViT(nn.Module):
    """Patches, a learned vector for each place, blocks, and a classifier on the mean over the patches.

    Dosovitskiy et al. 2020 (https://arxiv.org/abs/2010.11929), without their class token.
    """

    def __init__(self, depth: int = 6, width: int = 128, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.places = nn.Parameter(torch.randn(1, (digits.SIZE // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(transformer.Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, digits.CLASSES)
        transformer.initialise(self, depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 16, 16) to logits (N, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return logits


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the trained weights depend on."""

    depth: int = 6
    width: int = 128
    heads: int = 4
    patch: int = 4
    epochs: int = 60
    lr: float = 1e-3
    decay: float = 0.1
    batch: int = 32
    seed: int = 0


def vit(settings: Settings | None = None) -> ViT:
    """Return an untrained ViT in eval mode; the global random state is left as it was."""
    chosen = settings or Settings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        return ViT(chosen.depth, chosen.width, chosen.heads, chosen.patch).eval()


def task(settings: Settings | None = None) -> Task:
    """Return the ViT on digits as a task."""
    chosen = settings or Settings()

    def train(model: nn.Module, progress: Progress) -> None:
        digits.train(
            model,
            chosen.epochs,
            batch=chosen.batch,
            seed=chosen.seed,
            optimizer=transformer.optimizer(model, chosen.lr, chosen.decay),
            progress=progress,
        )

    name = "digits_vit"
    return digits.as_task(name, lambda: cache.trained(name, asdict(chosen), vit(chosen), train))
