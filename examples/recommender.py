"""A recommender on generated click logs, built like DLRM: tables, an MLP for numbers, dot products, an MLP on top.

    python -m examples.recommender

Widths of both MLPs go, dot products that nothing needs, and dimensions of the embeddings: one axis through all tables
and the MLP for numbers ("head_dim": what dot products sum over). Rows of tables, inputs and the output stay.
Naumov et al., "Deep Learning Recommendation Model" (2019).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from examples.common import Result, finished, train
from fxprune import Pruner

NUMBERS = 6
"""Features that are numbers."""


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Recommender(nn.Module):
    """One embedding table for each feature that is a number of something."""

    def __init__(self, sizes: Sequence[int], width: int, hidden: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]
        self.bottom = mlp(NUMBERS, hidden, width)
        pairs = torch.triu_indices(len(sizes) + 1, len(sizes) + 1, 1)
        self.register_buffer("pairs", pairs[0] * (len(sizes) + 1) + pairs[1])
        self.top = mlp(width + pairs.shape[1], 2 * hidden, hidden, 1)

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        """Map (N, numbers) and int64 (N, tables) to the logit of a click, (N,)."""
        bottom = self.bottom(numbers)
        vectors = torch.stack([bottom, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.matmul(vectors, vectors.transpose(1, 2)).flatten(1)[:, self.get_buffer("pairs")]
        logits: Tensor = self.top(torch.cat([bottom, products], 1)).squeeze(1)
        return logits


@dataclass(frozen=True, slots=True)
class Clicks:
    """Who saw what, and whether it was clicked."""

    numbers: Tensor
    ids: Tensor
    labels: Tensor

    @classmethod
    def generated(cls, count: int, sizes: Sequence[int], seed: int) -> Clicks:
        """Draw clicks whose chance is a product of hidden tastes, and a little of the numbers."""
        generator = torch.Generator().manual_seed(seed)
        tastes = [torch.randn(size, 3, generator=generator) for size in sizes]
        numbers = torch.randn(count, NUMBERS, generator=generator)
        ids = torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], 1)
        first, second, *rest = (taste[ids[:, i]] for i, taste in enumerate(tastes))
        logit = 1.5 * (first * second).sum(1) + sum(r[:, 0] for r in rest) + numbers[:, 0] * numbers[:, 1]
        return cls(numbers, ids, (torch.rand(count, generator=generator) < torch.sigmoid(logit)).float())


def main(
    users: int = 400,
    items: int = 200,
    width: int = 32,
    hidden: int = 128,
    logs: int = 60_000,
    steps: int = 1500,
    batch: int = 256,
    rounds: int = 30,
    seed: int = 0,
) -> Result:
    """Train the dense model, train on while widths go, and compare.

    Args:
        users, items: rows of the first two tables.
        width: of embeddings.
        hidden: of the MLPs.
        logs: clicks and passes; a tenth is for testing.
        steps: of training, and as many again while it is pruned.
        batch: rows of a step.
        rounds: of timing.
    """
    from sklearn.metrics import roc_auc_score

    torch.manual_seed(seed)
    sizes = (users, items, 24, 7)
    data = Clicks.generated(logs, sizes, seed)
    cut = logs // 10
    model = Recommender(sizes, width, hidden)
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        rows = torch.randint(cut, logs, (batch,), generator=generator)
        return (data.numbers[rows], data.ids[rows]), data.labels[rows]

    def auc(one: nn.Module) -> float:
        with torch.no_grad():
            return float(roc_auc_score(data.labels[:cut].numpy(), one(data.numbers[:cut], data.ids[:cut]).numpy()))

    train(model, draw, functional.binary_cross_entropy_with_logits, steps, 3e-3)
    dense = auc(model)
    pruning = {
        "method": "snip_momentum",
        "pattern": ("channel", "head_dim"),
        "target": {"sparsity": 0.5},
        "scope": "local",  # of each width half: with all of them in one ranking, only the MLP on top would shrink
        "max_sparsity": 0.75,
        "schedule": {"end": 2 * steps // 3},
    }
    inputs = data.numbers[:batch], data.ids[:batch]
    pruner = Pruner(model, inputs, pruning, steps=steps, backend="torch")
    train(model, draw, functional.binary_cross_entropy_with_logits, steps, 1e-3, pruner)
    pruned = pruner.finish()
    result = finished("Recommender, generated clicks", "AUC", dense, pruned, auc, rounds=rounds)
    console = Console()
    for group in pruned.plan.groups:
        console.print(f"{group.name}: {group.kept} of {group.size}", highlight=False)
    console.print("whole: " + "; ".join(f"{n}: {why}" for n, why in pruned.report.whole.items()), highlight=False)
    return result


if __name__ == "__main__":
    main()
