"""A byte-level GPT on the sources of Python's standard library: heads and MLPs go while the dense model teaches.

python -m examples.decoder
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.common import Block, Draw, Result, finished, train
from fxprune import Pruner

BYTES = 256


class GPT(nn.Module):
    """A decoder over bytes with learned places; the logits at a position are those of the byte that follows."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for table in (self.bytes, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes, int64 of shape (N, positions), to logits (N, positions, 256)."""
        places = self.places(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.bytes(x) + places)))
        return logits


def sources(files: int) -> tuple[Tensor, Tensor]:
    """Return the bytes of some of the standard library's files, and of every tenth, which is held out."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    parts = [b"".join(p.read_bytes() for i, p in enumerate(paths) if (i % 10 == 5) == held) for held in (False, True)]
    training, held_out = (torch.frombuffer(bytearray(p), dtype=torch.uint8).long() for p in parts)
    return training, held_out


def windows(stream: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the bytes from each start and those that follow each: int64 of shape (starts, length)."""
    found = stream[starts.unsqueeze(1) + torch.arange(length + 1)]
    return found[:, :-1], found[:, 1:]


def main(
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    context: int = 128,
    steps: int = 1500,
    batch: int = 16,
    files: int = 200,
    rounds: int = 30,
    seed: int = 0,
) -> Result:
    """Train the dense model, train on while it shrinks under its own teaching, and compare.

    Args:
        width, depth, heads, context: of the GPT.
        steps: of training, and as many again while it is pruned.
        batch: windows of a step.
        files: of the standard library that are read.
        rounds: of timing.
    """
    torch.manual_seed(seed)
    training, held_out = sources(files)
    model = GPT(width, depth, heads, context)
    test, follow = windows(held_out, torch.linspace(0, len(held_out) - context - 1, 64).long(), context)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def bits(one: nn.Module) -> float:
        with torch.no_grad():
            return float(loss(one(test), follow)) / math.log(2)

    def draw(seed: int) -> Draw:
        generator = torch.Generator().manual_seed(seed)

        def some(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
            starts = torch.randint(len(training) - context, (batch,), generator=generator)
            inputs, labels = windows(training, starts, context)
            return (inputs,), labels

        return some

    train(model, draw(seed), loss, steps, 2e-3)
    dense = bits(model)
    pruning = {
        "method": "sensitivity",
        "pattern": ["head", "ffn"],
        "target": {"sparsity": 0.5},
        "max_sparsity": 0.8,
        "schedule": {"start": steps // 10, "end": 2 * steps // 3},
    }
    # Logits, and the stream behind each block; padding there is none.
    teaching = {"alpha": 0.5, "temperature": 1.0, "hidden": "blocks", "hidden_weight": 0.1}
    pruner = Pruner(model, test[:batch], pruning, steps=steps, distillation=teaching, backend="torch")
    train(model, draw(seed + 1), loss, steps, 1e-3, pruner, distil=True)
    return finished("GPT, standard library", "bits per byte", dense, pruner.finish(), bits, rounds=rounds)


if __name__ == "__main__":
    main()
