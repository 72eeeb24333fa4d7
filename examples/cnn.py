"""A small ResNet on handwritten digits: network slimming, until half of the channels inside blocks are gone.

python -m examples.cnn
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.common import Digits, Result, finished, train
from fxprune import Pruner


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    """Return a stem, three stages of two blocks, and a classifier on the mean over the image."""
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    stages: list[nn.Module] = []
    for i in range(3):
        inputs = width * 2 ** max(i - 1, 0)
        stages += [Residual(inputs, width * 2**i, 1 + (i > 0)), Residual(width * 2**i, width * 2**i, 1)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def main(width: int = 32, steps: int = 600, batch: int = 64, rounds: int = 30, seed: int = 0) -> Result:
    """Train the dense model, train on with a penalty on the norms' scales while channels go, and compare.

    Args:
        width: of the first stage; the others have two and four times as many channels.
        steps: of training, and as many again while it is pruned.
        batch: images of a step.
        rounds: of timing.
    """
    torch.manual_seed(seed)
    digits = Digits.load(seed)
    model = resnet(width)
    train(model, digits.draw(batch, seed), functional.cross_entropy, steps, 2e-3)
    dense = digits.accuracy(model)
    # Channels inside blocks go whose batch norm has a small scale; what shortcuts add to stays as wide as it is.
    pruning = {
        "method": {"name": "slimming", "reg": 1e-4},
        "pattern": "channel",
        "target": {"sparsity": 0.5},
        "schedule": {"end": 2 * steps // 3},
    }
    pruner = Pruner(model, digits.test_images[:batch], pruning, steps=steps, backend="torch")
    train(model, digits.draw(batch, seed + 1), functional.cross_entropy, steps, 1e-3, pruner)
    return finished("ResNet, digits", "accuracy", dense, pruner.finish(), digits.accuracy, rounds=rounds)


if __name__ == "__main__":
    main()
