"""A byte-level GPT on the sources of Python's standard library: bits per byte of files it has not seen.

A few million parameters and some minutes of training: no model to write programs with, but one that has to know what
it reads, and a loss that answers to every weight that goes.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.tasks import cache, stdlib, transformer
from bench.tasks.task import Epoch, Inputs, Labelled, Task, cross_entropy
from bench.tasks.training import Progress, fit

BYTES = 256
_HELD_OUT = 0.1  # share of the files
# Tables of codecs and of the manual's text: not programs.
_NO_PROGRAMS = ("encodings/", "pydoc_data/")
_NEAR = 4  # bytes that the convolution sees
_BATCH = 4  # windows that latencies are measured on


class GPT(nn.Module):
    """A decoder over bytes; the logits at a position are those of the byte that follows.

    One byte says little: what goes into the blocks at a position is its byte and a convolution of it and the three
    before it. Without that the first minutes of training go into finding out that neighbours matter.
    """

    def __init__(self, depth: int = 6, width: int = 256, heads: int = 8, context: int = 256) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.near = nn.Conv1d(width, width, _NEAR)
        self.blocks = nn.Sequential(*(transformer.Block(width, heads, context) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        transformer.initialise(self, depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes, int64 of shape (N, positions), to logits (N, positions, 256)."""
        said = self.bytes(x)
        near = self.near(functional.pad(said.transpose(1, 2), (_NEAR - 1, 0))).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(said + near)))
        return logits


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the trained weights depend on, and how many windows of `context` bytes they are judged on."""

    depth: int = 6
    width: int = 256
    heads: int = 8
    context: int = 256
    steps: int = 3000
    lr: float = 2e-3
    decay: float = 0.1
    batch: int = 4
    seed: int = 0
    windows: int = 256


def programs(seed: int = 0) -> tuple[list[bytes], list[bytes]]:
    """Return the training files and those held out; none is in both, and none is there twice."""
    found = dict.fromkeys(content for path, content in stdlib.files() if not path.startswith(_NO_PROGRAMS))
    held_out, training = stdlib.split([content for content in found if content], _HELD_OUT, seed)
    return training, held_out


@functools.cache
def text(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the bytes of the training files and of those held out, uint8 of shape (bytes,)."""
    training, held_out = (torch.frombuffer(bytearray(b"".join(some)), dtype=torch.uint8) for some in programs(seed))
    return training, held_out


def windows(stream: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the `length` bytes from each start and the bytes that follow each: int64 of shape (starts, length)."""
    found = stream[starts.unsqueeze(1) + torch.arange(length + 1)].long()
    return found[:, :-1], found[:, 1:]


def held_out(settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the windows that the score is measured on, spread evenly over the held-out files, and what follows."""
    stream = text(settings.seed)[1]
    starts = torch.linspace(0, len(stream) - settings.context - 1, settings.windows).long()
    return windows(stream, starts, settings.context)


def bits(model: nn.Module, settings: Settings) -> float:
    """Return the mean bits that a model needs for a byte of the held-out windows."""
    total = 0.0
    inputs, labels = held_out(settings)
    for some, follow in zip(torch.split(inputs, _BATCH), torch.split(labels, _BATCH), strict=True):
        total += float(functional.cross_entropy(model(some).flatten(0, 1), follow.flatten(), reduction="sum"))
    return total / labels.numel() / math.log(2)


def ngram_bits(read: Tensor, inputs: Tensor, labels: Tensor, longest: int = 6) -> float:
    """Return the bits a byte of the best n-gram model with contexts of at most `longest` bytes (up to 7).

    Interpolated as Witten and Bell (1991) do: the fewer different bytes have followed a context, the more it counts.

    Args:
        read: what it counts in, uint8 of shape (bytes,).
        inputs, labels: what it is judged on, each (windows, length), as `windows` gives them.
        longest: bytes that it looks back at most, and never to before a window.
    """
    stream = read.numpy().astype(np.uint64)
    seen = torch.cat((inputs, labels[:, -1:]), dim=1).numpy().astype(np.uint64)
    chance = np.full(labels.shape, 1 / BYTES)
    found = []
    for order in range(longest + 1):
        counted = np.sort(_codes(stream, order + 1))
        different = counted[np.append(True, counted[1:] != counted[:-1])]
        # The first byte of a window is no label; the first labels have too few bytes before them for a long context.
        codes, place = _codes(seen[:, 1:] if order == 0 else seen, order + 1), max(0, order - 1)
        first, last = codes & ~np.uint64(BYTES - 1), codes | np.uint64(BYTES - 1)
        context, kinds = _between(counted, first, last), _between(different, first, last)
        lower = chance[:, place:]
        both = (_between(counted, codes, codes) + kinds * lower) / np.maximum(context + kinds, 1)
        chance[:, place:] = np.where(context > 0, both, lower)
        found.append(float(-np.log2(chance).mean()))
    return min(found)


def _codes(stream: np.ndarray, length: int) -> np.ndarray:
    """Return every run of `length` bytes along the last dimension as one number, the last byte its lowest."""
    count = stream.shape[-1] - length + 1
    codes = np.zeros((*stream.shape[:-1], count), np.uint64)
    for place in range(length):
        codes = codes * np.uint64(BYTES) + stream[..., place : place + count]
    return codes


def _between(ordered: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return how many of the sorted numbers are from `first` to `last`, both inclusive."""
    return np.searchsorted(ordered, last, "right") - np.searchsorted(ordered, first, "left")


def gpt(settings: Settings | None = None) -> GPT:
    """Return an untrained GPT in eval mode; the global random state is left as it was."""
    chosen = settings or Settings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        return GPT(chosen.depth, chosen.width, chosen.heads, chosen.context).eval()


def _random(settings: Settings, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` windows from anywhere in the training files and what follows each."""
    stream = text(settings.seed)[0]
    starts = torch.randint(len(stream) - settings.context, (count,), generator=generator)
    return windows(stream, starts, settings.context)


def task(settings: Settings | None = None) -> Task:
    """Return the GPT on the standard library's sources as a task."""
    chosen = settings or Settings()
    name = "stdlib_gpt"

    def train(model: nn.Module, progress: Progress) -> None:
        generator = torch.Generator().manual_seed(chosen.seed)

        def batches() -> Iterator[tuple[tuple[Tensor], Tensor]]:
            for _ in range(chosen.steps):
                inputs, labels = _random(chosen, chosen.batch, generator)
                yield (inputs,), labels

        optimizer = transformer.optimizer(model, chosen.lr, chosen.decay)
        fit(model, batches(), chosen.steps, optimizer, cross_entropy, progress)

    def build() -> nn.Module:
        settings = {**asdict(chosen), "python": platform.python_version()}
        del settings["windows"]
        return cache.trained(name, settings, gpt(chosen), train)

    def calibration(samples: int, seed: int) -> list[Labelled]:
        inputs, labels = _random(chosen, samples, torch.Generator().manual_seed(seed))
        return [
            ((some,), follow)
            for some, follow in zip(torch.split(inputs, _BATCH), torch.split(labels, _BATCH), strict=True)
        ]

    def epoch(batch: int, generator: torch.Generator) -> Epoch:
        steps = max(1, len(text(chosen.seed)[0]) // (chosen.context * batch))

        def batches() -> Iterator[Labelled]:
            for _ in range(steps):
                inputs, labels = _random(chosen, batch, generator)
                yield (inputs,), labels

        return Epoch(steps, batches)

    def example() -> Inputs:
        return calibration(_BATCH, seed=0)[0][0]

    return Task(
        name=name,
        unit="-bits/byte",
        better="minus the bits that a byte of held-out source files takes, below 0; higher is better",
        build=build,
        inputs=example,
        batches=calibration,
        loss=cross_entropy,
        figures=lambda model: {"-bits/byte": -bits(model, chosen)},
        baseline=lambda: -ngram_bits(text(chosen.seed)[0], *held_out(chosen)),
        epochs=epoch,
    )
