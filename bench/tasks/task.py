"""What a task is: a trained model, data to prune it with, and a score on data that neither has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
"""What a model takes, by position."""

Labelled = tuple[Inputs, Tensor | None]
"""The inputs of a batch and what the loss compares its output with."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """The training split once, in batches that are made as they are asked for.

    Attributes:
        steps: how many batches there are.
        make: -> the batches.
    """

    steps: int
    make: Callable[[], Iterator[Labelled]]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Labelled]:
        return self.make()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and inference mode, and leave its mode as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True, slots=True)
class Task:
    """A model, its data and what it is judged by. Seeded: the same calls give the same model, data and score.

    Attributes:
        name: as `bench.tasks.TASKS` lists it.
        unit: what the score is, as a column's heading says it.
        better: the score in a sentence: its range, what it is measured on; higher is always better.
        build: -> the trained model in eval mode, from the cache where it is there.
        inputs: -> the batch that latencies are measured on.
        batches: (samples, seed) -> batches of distinct samples (the last may be smaller) from the training split.
        loss: (the model's output, a batch's labels) -> a scalar, what the model was trained with.
        figures: every figure on the held-out split, by name; the first is the score. The model is in eval mode.
        baseline: -> the score of what has no network (naming the most frequent class, an n-gram model), if any.
        dynamic: which sizes differ from batch to batch, as `fxprune.compile` takes it; None: the batch alone.
        epochs: (rows of a batch, generator) -> an epoch of the training split, in an order that the generator draws.
    """

    name: str
    unit: str
    better: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    batches: Callable[[int, int], list[Labelled]]
    loss: Callable[[Tensor, Tensor | None], Tensor]
    figures: Callable[[nn.Module], dict[str, float]]
    baseline: Callable[[], float] | None = None
    dynamic: dict[str, dict[int, str]] | None = None
    epochs: Callable[[int, torch.Generator], Epoch] | None = None

    def model(self) -> nn.Module:
        """Return a fresh copy of the trained model, in eval mode; the first call on a machine trains it."""
        return self.build()

    @property
    def example(self) -> Inputs:
        """The batch that latencies are measured on; from the training split."""
        return self.inputs()

    def calibration(self, samples: int, seed: int = 0) -> list[Labelled]:
        """Return batches of (inputs, labels), `samples` rows in all, drawn from the training split only.

        Raises ValueError where the training split has fewer.
        """
        return self.batches(samples, seed)

    def training(self, batch: int, number: int, seed: int = 0) -> Epoch:
        """Return an epoch of the training split in batches of about `batch` rows; another order for each number.

        Raises ValueError where the task has no data to train on.
        """
        if self.epochs is None:
            raise ValueError(f"the task '{self.name}' has no epochs to train on")
        return self.epochs(batch, torch.Generator().manual_seed(1_000_003 * seed + number))

    def measures(self, model: nn.Module) -> dict[str, float]:
        """Return every figure of a model on the held-out split; the first is the score."""
        with evaluating(model):
            return self.figures(model)

    def score(self, model: nn.Module) -> float:
        """Return how good a model is on the held-out split; higher is better. Its mode is left as it was."""
        return next(iter(self.measures(model).values()))


def cross_entropy(output: Tensor, labels: Tensor | None) -> Tensor:
    """Return the mean cross entropy, in nats, of logits (..., classes) to class numbers (...)."""
    if labels is None:
        raise ValueError("cross entropy needs labels")
    return nn.functional.cross_entropy(output.flatten(0, -2), labels.flatten())


def drawn(available: int, samples: int, seed: int) -> Tensor:
    """Return `samples` distinct row numbers below `available`, in random order: int64 of shape (samples,).

    A larger number with the same seed begins with the smaller one's rows. Raises ValueError where there are fewer.
    """
    if samples > available:
        raise ValueError(f"{samples} samples asked for, the training split has {available}")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
