"""MiniLM trained on to say which of the standard library's modules a docstring comes from."""

from __future__ import annotations

import collections
import functools
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from torch import Tensor, nn

from bench.tasks import cache, minilm, stdlib
from bench.tasks.similarity import LENGTH
from bench.tasks.task import Epoch, Inputs, Labelled, Task, cross_entropy, drawn
from bench.tasks.training import Progress, fit

Said = tuple[str, int]
"""A docstring and the number of the module it is from."""

_EXAMPLE = 8  # docstrings that latencies are measured on
_BATCH = 32  # docstrings of a calibration batch and of a step of scoring


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and one linear layer."""

    def __init__(self, bert: nn.Module, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(minilm.WIDTH, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map token numbers and their mask, both int64 of shape (N, tokens), to logits (N, classes)."""
        tokens: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        logits: Tensor = self.head(minilm.pool(tokens, attention_mask))
        return logits


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the trained weights depend on.

    Attributes:
        modules: with the most docstrings; the others' are left out.
        tested: held-out docstrings.
        trained: training docstrings that are used, or None: all.
        length: tokens that a docstring is padded or cut to.
        short: tokens that it is cut to in training, which saves half of the time.
        lr, head_lr: the full rates of the encoder and of the linear layer.
    """

    modules: int = 24
    tested: int = 512
    trained: int | None = None
    length: int = LENGTH
    short: int = 64
    epochs: int = 2
    batch: int = 16
    lr: float = 1e-4
    head_lr: float = 1e-2
    decay: float = 0.01
    seed: int = 0


@functools.cache
def docstrings(modules: int, tested: int, seed: int = 0) -> tuple[tuple[str, ...], tuple[Said, ...], tuple[Said, ...]]:
    """Return the modules' names, the training docstrings and the `tested` held-out ones.

    Each text is there once; what stands in two modules is left out.
    """
    found: dict[str, str] = {}
    for said in stdlib.docstrings():
        if stdlib.says_something(said.text):
            same = found.setdefault(said.text, said.module) == said.module
            found[said.text] = said.module if same else ""
    found = {text: module for text, module in found.items() if module}
    names = tuple(module for module, _ in collections.Counter(found.values()).most_common(modules))
    known = [(text, names.index(module)) for text, module in found.items() if module in names]
    held_out, training = stdlib.split(known, tested / len(known), seed)
    return names, tuple(training), tuple(held_out)


def classifier(settings: Settings | None = None) -> Classifier:
    """Return the pretrained encoder with an untrained head, in eval mode; the global random state stays as it was."""
    chosen = settings or Settings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        return Classifier(minilm.encoder().bert, chosen.modules).eval()


def _epoch(settings: Settings, batch: int, generator: torch.Generator) -> Epoch:
    """Return an epoch whose batches are of docstrings that are about equally long, so that little is padding."""
    training = docstrings(settings.modules, settings.tested, settings.seed)[1][: settings.trained]
    noise = 0.3  # of a docstring's length: who shares a batch changes from epoch to epoch
    lengths = torch.tensor([min(len(text), 5 * settings.short) for text, _ in training])

    def made() -> Iterator[tuple[Inputs, Tensor]]:
        mixed = lengths * (1 + noise * torch.rand(len(training), generator=generator))
        batches = torch.split(mixed.argsort(), batch)
        for number in torch.randperm(len(batches), generator=generator).tolist():
            some = [training[row] for row in batches[number].tolist()]
            inputs = minilm.tokenize([text for text, _ in some], settings.short, fill=False)
            yield inputs, torch.tensor([module for _, module in some])

    return Epoch(-(-len(training) // batch), made)


def epochs(settings: Settings, number: int, order: int) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield the batches of so many epochs.

    Args:
        order: seed of the order that they come in.
    """
    generator = torch.Generator().manual_seed(order)
    for _ in range(number):
        for inputs, labels in _epoch(settings, settings.batch, generator):
            assert labels is not None
            yield inputs, labels


def steps_each(settings: Settings) -> int:
    """Return how many batches an epoch has."""
    count = len(docstrings(settings.modules, settings.tested, settings.seed)[1][: settings.trained])
    return -(-count // settings.batch)


def train(model: nn.Module, settings: Settings, progress: Progress | None = None) -> list[float]:
    """Train encoder and head in place and return each step's loss; without dropout, which few epochs do not need."""
    head = [value for name, value in model.named_parameters() if name.startswith("head.")]
    encoder = [value for name, value in model.named_parameters() if not name.startswith("head.")]
    groups = [{"params": encoder, "lr": settings.lr}, {"params": head, "lr": settings.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.decay, fused=True)
    batches = epochs(settings, settings.epochs, settings.seed)
    return fit(model, batches, settings.epochs * steps_each(settings), optimizer, cross_entropy, progress)


def task(settings: Settings | None = None) -> Task:
    """Return MiniLM trained to tell modules apart as a task."""
    chosen = settings or Settings()
    name = "minilm_modules"

    def data() -> tuple[tuple[str, ...], tuple[Said, ...], tuple[Said, ...]]:
        return docstrings(chosen.modules, chosen.tested, chosen.seed)

    def build() -> nn.Module:
        versions = {"python": platform.python_version(), minilm.PACKAGE: metadata.version(minilm.PACKAGE)}
        return cache.trained(
            name,
            {**asdict(chosen), **versions},
            classifier(chosen),
            lambda model, progress: train(model, chosen, progress),
        )

    def batches(said: list[Said]) -> list[tuple[Inputs, Tensor]]:
        inputs = minilm.batches([text for text, _ in said], _BATCH, chosen.length, fill=True)
        labels = torch.split(torch.tensor([module for _, module in said]), _BATCH)
        return list(zip(inputs, labels, strict=True))

    def calibration(samples: int, seed: int) -> list[Labelled]:
        training = data()[1]
        said = [training[row] for row in drawn(len(training), samples, seed).tolist()]
        found, order = minilm.sorted_batches([text for text, _ in said], _BATCH, chosen.length)
        labels = torch.split(torch.tensor([said[row][1] for row in order]), _BATCH)
        return list(zip(found, labels, strict=True))

    def accuracy(model: nn.Module) -> dict[str, float]:
        right = [model(*inputs).argmax(dim=1) == labels for inputs, labels in batches(list(data()[2]))]
        return {"accuracy": float(torch.cat(right).double().mean())}

    def baseline() -> float:
        """Return the accuracy of always naming the module with the most training docstrings."""
        _, training, held_out = data()
        most = collections.Counter(module for _, module in training).most_common(1)[0][0]
        return sum(module == most for _, module in held_out) / len(held_out)

    return Task(
        name=name,
        unit="accuracy",
        better="the share of held-out docstrings whose module is named rightly, 0 to 1; higher is better",
        build=build,
        inputs=lambda: minilm.tokenize([text for text, _ in data()[1][:_EXAMPLE]], chosen.length),
        batches=calibration,
        loss=cross_entropy,
        figures=accuracy,
        baseline=baseline,
        dynamic=minilm.DYNAMIC,
        epochs=lambda batch, generator: _epoch(chosen, batch, generator),
    )
