"""The proof on models that do not run on every input: the example's own are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ProofError


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


class Tokens(nn.Module):
    """Attention and a linear layer over many tokens; optionally with noise."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
        self.noisy = noisy

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for _ in range(3))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.layer(x) + self.noisy * torch.rand(16)  # type: ignore[no-any-return]


def test_heavy_models_have_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.prove.HEAVY", 0)
    x = torch.randn(2, 40, 6)
    pruned = fxprune.compile(Tokens().eval(), x, target={"macs": 0.6}, round_to=1)
    proof = pruned.report.proof
    assert proof.runs == 1 and proof.error < 1e-9 and proof.capture_error is not None and proof.capture_error < 1e-5


def test_heavy_models_that_are_not_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.prove.HEAVY", 0)
    with pytest.raises(ProofError, match="differs from Tokens itself"):
        fxprune.compile(Tokens(noisy=True).eval(), torch.randn(2, 40, 6), target={"macs": 0.6}, round_to=1)


def test_heavy_models_have_their_vectors_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.prove.HEAVY", 0)
    original = fxprune.making.rewrite

    def rewrite(*args: Any) -> Any:
        result = original(*args)
        result.module.embed.bias.data += 1
        return result

    monkeypatch.setattr("fxprune.making.rewrite", rewrite)
    with pytest.raises(ProofError, match="is not what is kept of"):
        fxprune.compile(Tokens().eval(), torch.randn(2, 40, 6), target={"macs": 0.6}, round_to=1)
