"""The pretrained MiniLM as it is: do a pruned encoder's embeddings still say the same, and still find things?

Every docstring with more than one sentence is a pair: its first sentence, and the rest. The score is the mean cosine
of a model's embeddings to the dense encoder's, over both halves of the held-out pairs; retrieval looks for each rest by
its first sentence among all of these rests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.tasks import minilm, stdlib
from bench.tasks.task import Epoch, Inputs, Labelled, Task, drawn, evaluating

Pair = tuple[str, str]
"""The first sentence of a docstring, and the rest of it."""

LENGTH = 128
"""Tokens that every sentence is padded or cut to."""

_EXAMPLE = 8  # sentences that latencies are measured on
_BATCH = 32  # sentences of a calibration batch and of a step of scoring
_SCALE = 20.0  # of the cosines in the loss, that which the encoder was trained with


@dataclass(frozen=True, slots=True)
class Settings:
    """What the encoder is judged on.

    Attributes:
        tested: held-out pairs.
        length: tokens that a sentence is padded or cut to.
        seed: of the split.
    """

    tested: int = 256
    length: int = LENGTH
    seed: int = 0


@functools.cache
def pairs(tested: int, seed: int = 0) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Return the training pairs and the `tested` held-out ones; no sentence and no rest is in two pairs."""
    found: list[Pair] = []
    seen: set[str] = set()
    for said in stdlib.docstrings():
        halves = said.halves()
        if seen.isdisjoint(halves) and all(map(stdlib.says_something, halves)):
            found.append(halves)
            seen.update(halves)
    held_out, training = stdlib.split(found, tested / len(found), seed)
    return tuple(training), tuple(held_out)


def embedded(model: nn.Module, texts: Sequence[str], length: int) -> Tensor:
    """Return the embeddings of texts, each padded to `length` tokens: (texts, 384)."""
    return torch.cat([model(*batch) for batch in minilm.batches(texts, _BATCH, length, fill=True)])


@functools.cache
def _dense(texts: tuple[str, ...], length: int) -> Tensor:
    """Return the dense encoder's embeddings."""
    model = minilm.encoder()
    with evaluating(model):
        return embedded(model, texts, length).clone()


def recall(asked: Tensor, found: Tensor, first: int) -> float:
    """Return the share of rows of `asked` whose own row of `found` is among the `first` nearest by cosine.

    >>> recall(torch.eye(3), torch.eye(3)[[0, 2, 1]], 1)  # doctest: +ELLIPSIS
    0.333...
    """
    alike = nn.functional.normalize(asked, dim=-1) @ nn.functional.normalize(found, dim=-1).T
    better = (alike > alike.diagonal().unsqueeze(1)).sum(dim=1)
    return float((better < first).double().mean())


def figures(model: nn.Module, settings: Settings) -> dict[str, float]:
    """Return the mean cosine to the dense embeddings and the retrieval's recall at 1 and at 10, on held-out pairs."""
    asked, wanted = zip(*pairs(settings.tested, settings.seed)[1], strict=True)
    mine = embedded(model, [*asked, *wanted], settings.length)
    alike = nn.functional.cosine_similarity(mine, _dense((*asked, *wanted), settings.length), dim=-1)
    questions, answers = mine.chunk(2)
    return {
        "mean cosine": float(alike.double().mean()),
        "recall@1": recall(questions, answers, 1),
        "recall@10": recall(questions, answers, 10),
    }


def contrast(output: Tensor, labels: Tensor | None) -> Tensor:
    """Return the loss that sentence encoders are trained with: which of the batch's labels belongs to which row?

    `output` are embeddings (N, 384), `labels` the dense embeddings of the other halves of the same docstrings. The
    distance to the dense embedding of the same text would be no loss to prune by: it has no slope at the dense model.
    """
    if labels is None:
        raise ValueError("the contrastive loss needs the embeddings of the other halves")
    alike = nn.functional.normalize(output, dim=-1) @ nn.functional.normalize(labels, dim=-1).T
    return nn.functional.cross_entropy(_SCALE * alike, torch.arange(len(output), device=output.device))


def task(settings: Settings | None = None) -> Task:
    """Return the pretrained encoder's fidelity as a task; nothing is trained."""
    chosen = settings or Settings()

    def calibration(samples: int, seed: int) -> list[Labelled]:
        training = pairs(chosen.tested, chosen.seed)[0]
        # Alternately a first sentence and a rest, with the other half's embedding as its label.
        rows = drawn(len(training), samples, seed).tolist()
        texts = [training[row][place % 2] for place, row in enumerate(rows)]
        others = tuple(training[row][1 - place % 2] for place, row in enumerate(rows))
        batches, order = minilm.sorted_batches(texts, _BATCH, chosen.length)
        labels = torch.split(_dense(others, chosen.length)[order], _BATCH)
        return [(inputs, wanted.clone()) for inputs, wanted in zip(batches, labels, strict=True)]

    def epoch(batch: int, generator: torch.Generator) -> Epoch:
        training = pairs(chosen.tested, chosen.seed)[0]

        def batches() -> Iterator[Labelled]:
            dense = minilm.encoder()
            for rows in torch.split(torch.randperm(len(training), generator=generator), batch):
                sides = torch.randint(0, 2, (len(rows),), generator=generator).tolist()
                some = [(training[row], side) for row, side in zip(rows.tolist(), sides, strict=True)]
                with evaluating(dense):
                    others = dense(*minilm.tokenize([pair[1 - side] for pair, side in some], chosen.length, fill=False))
                yield minilm.tokenize([pair[side] for pair, side in some], chosen.length, fill=False), others.clone()

        return Epoch(-(-len(training) // batch), batches)

    def example() -> Inputs:
        return minilm.tokenize([first for first, _ in pairs(chosen.tested, chosen.seed)[0][:_EXAMPLE]], chosen.length)

    return Task(
        name="minilm_similarity",
        unit="mean cosine",
        better="the mean cosine to the dense encoder's embeddings on held-out texts, -1 to 1; higher is better",
        build=minilm.encoder,
        inputs=example,
        batches=calibration,
        loss=contrast,
        figures=lambda model: figures(model, chosen),
        dynamic=minilm.DYNAMIC,
        epochs=epoch,
    )
