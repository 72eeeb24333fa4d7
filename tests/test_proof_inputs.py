"""The proof on models that do not run on every input: the example's own are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Loss(nn.Module):
    """Returns a loss that takes shares from 0 to 1 as targets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy(self.last(self.first(x).relu()).sigmoid(), target)


class Narrow(nn.Module):
    """One layer has no features at all."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Linear(16, 0)
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h) + self.none(h).sum(-1, keepdim=True)  # type: ignore[no-any-return]


def test_targets_that_random_numbers_are_not() -> None:
    inputs = (torch.randn(4, 5), torch.rand(4, 4))
    pruned = fxprune.compile(Loss().eval(), inputs, target={"params": 0.6}, round_to=1)
    assert pruned.module.first.out_features < 16 and pruned.report.proof.runs == 2


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_features() -> None:
    pruned = fxprune.compile(Narrow().eval(), torch.randn(12, 5), target={"params": 0.6}, round_to=1)
    assert pruned.module.first.out_features < 16
