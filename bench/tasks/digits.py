"""Handwritten digits (scikit-learn's 1,797 scans of 8x8 pixels) and a small ResNet that learns them within a minute.

A task small enough to train, prune and fine-tune while someone watches, on a laptop's processor. The images come with
scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.tasks import cache
from bench.tasks.task import Epoch, Inputs, Labelled, Task, cross_entropy, drawn
from bench.tasks.training import Progress, rate

CLASSES = 10
SIZE = 16
"""Height and width of an image: the scans are enlarged twice, so that three stages have something to look at."""

_SHIFT = 2  # pixels of the enlarged image, one of the scan
_TESTED = 0.25  # share of the images held out
_BATCH = 64  # images that latencies are measured on


@dataclass(frozen=True, slots=True)
class Digits:
    """The images, float32 of shape (N, 1, 16, 16) with values from -1 to 1, and their digits, int64 of shape (N,).

    `train_rows` and `test_rows` say which of scikit-learn's images they are.
    """

    train_images: Tensor
    train_labels: Tensor
    train_rows: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_rows: Tensor


@functools.cache
def digits(seed: int = 0) -> Digits:
    """Split the images, one quarter of every digit's for testing; the same split for the same seed."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    raw = load_digits()
    scans = torch.from_numpy(raw.images).float().unsqueeze(1) / 8 - 1  # 17 grey levels, 0 to 16
    images = functional.interpolate(scans, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = [], []
    for digit in range(CLASSES):
        rows = order[labels[order] == digit]
        held_out = round(len(rows) * _TESTED)
        test.append(rows[:held_out])
        train.append(rows[held_out:])
    test_rows, train_rows = torch.cat(test), torch.cat(train)
    return Digits(images[train_rows], labels[train_rows], train_rows, images[test_rows], labels[test_rows], test_rows)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, https://arxiv.org/abs/1512.03385, figure 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of two blocks each, and a classifier on the mean over the image."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        inputs = widths[0]
        for number, width in enumerate(widths):
            stride = 1 if number == 0 else 2
            self.stages.append(nn.Sequential(Block(inputs, width, stride), Block(width, width, 1)))
            inputs = width
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 16, 16) to logits (N, 10)."""
        x = functional.relu(self.bn(self.stem(x)))
        x = self.stages(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def resnet(seed: int = 0, widths: tuple[int, int, int] = (32, 64, 128)) -> ResNet:
    """Return an untrained ResNet in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(widths).eval()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image of (N, 1, H, W) by up to two pixels down and across, filling with background."""
    number, _, height, width = images.shape
    padded = functional.pad(images, (_SHIFT,) * 4, value=-1.0)
    down, across = torch.randint(0, 2 * _SHIFT + 1, (2, number, 1), generator=generator)
    rows = (down + torch.arange(height)).unsqueeze(2)
    columns = (across + torch.arange(width)).unsqueeze(1)
    return padded[torch.arange(number).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def train(
    model: nn.Module,
    epochs: int = 8,
    lr: float = 0.1,
    *,
    batch: int = 64,
    seed: int = 0,
    data: Digits | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train a model from (N, 1, 16, 16) images to (N, 10) logits in place and return each epoch's mean loss.

    Stochastic gradient descent with momentum, or the optimizer given, whose rate counts and not `lr`; the rate rises
    over the first tenth of the steps and falls to zero along a cosine. The model is left in eval mode, the global
    random state as it was.
    """
    data = data or digits()
    generator = torch.Generator().manual_seed(seed)
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    full = [group["lr"] for group in optimizer.param_groups]
    steps_each = math.ceil(len(data.train_labels) / batch)
    steps = epochs * steps_each
    losses: list[float] = []
    done = 0
    model.train()
    for _ in range(epochs):
        total = 0.0
        # Batches of equal size: a last batch of one image would leave batch norm with nothing to normalise over.
        for rows in torch.randperm(len(data.train_labels), generator=generator).tensor_split(steps_each):
            for group, top in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = top * rate(done, steps)
            logits = model(shifted(data.train_images[rows], generator))
            loss = functional.cross_entropy(logits, data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            done += 1
            total += float(loss.detach()) * len(rows)
            if progress is not None:
                progress(done, steps, float(loss.detach()))
        losses.append(total / len(data.train_labels))
    model.eval()
    return losses


def finetune(
    model: nn.Module,
    epochs: int = 3,
    lr: float = 0.02,
    *,
    batch: int = 64,
    seed: int = 1,
    data: Digits | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train a pruned model on: `train` with a rate that a trained model bears and another order of the images."""
    return train(model, epochs, lr, batch=batch, seed=seed, data=data, progress=progress)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Digits | None = None) -> float:
    """Return the share of test images, from 0 to 1, that the model names rightly; its mode is left as it was."""
    data = data or digits()
    training = model.training
    model.eval()
    batches = (data.test_images[start : start + 128] for start in range(0, len(data.test_labels), 128))
    try:
        named = torch.cat([model(images).argmax(dim=1) for images in batches])
    finally:
        model.train(training)
    return float((named == data.test_labels).double().mean())


# ---------------------------------------------------------------------- the tasks
@dataclass(frozen=True, slots=True)
class Settings:
    """All that the trained ResNet's weights depend on."""

    widths: tuple[int, int, int] = (32, 64, 128)
    epochs: int = 8
    lr: float = 0.1
    batch: int = 64
    seed: int = 0


def _batches(samples: int, seed: int) -> list[Labelled]:
    data = digits()
    rows = drawn(len(data.train_labels), samples, seed)
    return [((data.train_images[some],), data.train_labels[some]) for some in torch.split(rows, _BATCH)]


def _epoch(batch: int, generator: torch.Generator) -> Epoch:
    data = digits()
    steps = math.ceil(len(data.train_labels) / batch)

    def batches() -> Iterator[Labelled]:
        # Of equal size: a last batch of one image would leave batch norm with nothing to normalise over.
        for rows in torch.randperm(len(data.train_labels), generator=generator).tensor_split(steps):
            yield (shifted(data.train_images[rows], generator),), data.train_labels[rows]

    return Epoch(steps, batches)


def _example() -> Inputs:
    return (digits().train_images[drawn(len(digits().train_labels), _BATCH, seed=0)],)


def _baseline() -> float:
    """Return the accuracy of always naming the digit that is most frequent in training."""
    data = digits()
    return float((data.test_labels == data.train_labels.mode().values).double().mean())


def as_task(name: str, build: Callable[[], nn.Module]) -> Task:
    """Return what a model of (N, 1, 16, 16) images does on digits as a task; `build` gives it trained."""
    return Task(
        name=name,
        unit="accuracy",
        better="the share of the held-out images named rightly, 0 to 1; higher is better",
        build=build,
        inputs=_example,
        batches=_batches,
        loss=cross_entropy,
        figures=lambda model: {"accuracy": accuracy(model)},
        baseline=_baseline,
        epochs=_epoch,
    )


def task(settings: Settings | None = None) -> Task:
    """Return the ResNet on digits as a task."""
    chosen = settings or Settings()

    def learn(model: nn.Module, progress: Progress) -> None:
        train(model, chosen.epochs, chosen.lr, batch=chosen.batch, seed=chosen.seed, progress=progress)

    name = "digits_resnet"
    return as_task(name, lambda: cache.trained(name, asdict(chosen), resnet(chosen.seed, chosen.widths), learn))
