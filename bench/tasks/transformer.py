"""A pre-norm transformer block of plain `torch.nn` layers: what the ViT and the GPT are stacks of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention with queries, keys and values out of one linear layer.

    Args:
        width: of what goes in and comes out.
        heads: `width / heads` dimensions each.
        context: if not None, this is the decoder's attention: a position sees itself and those before it, at most
            `context` in all, and queries and keys are turned by angles that grow with the position (Su et al. 2021,
            https://arxiv.org/abs/2104.09864).
    """

    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.causal = context is not None
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if context is not None:
            half = width // heads // 2
            speeds = 1000.0 ** -(torch.arange(half) / half)
            angles = torch.outer(torch.arange(context), speeds)
            self.register_buffer("cos", angles.cos(), persistent=False)  # (context, width / heads / 2)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, positions, width) to the same shape."""
        batch, length, _ = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        if self.causal:
            query, key = self.turned(query), self.turned(key)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        mixed: Tensor = self.out(seen.transpose(1, 2).reshape(batch, length, -1))
        return mixed

    def turned(self, x: Tensor) -> Tensor:
        """Turn the pairs (d, d + half) of (N, heads, positions, 2 half) by the angles of their positions."""
        cos, sin = self.get_buffer("cos")[: x.shape[2]], self.get_buffer("sin")[: x.shape[2]]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Block(nn.Module):
    """Attention, then an MLP of four times the width, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, positions, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


def initialise(model: nn.Module, depth: int) -> None:
    """Draw weights as GPT-2 does: small, and smaller still for what is added to the stream `depth` times."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            added = name.endswith(("attention.out", "mlp.2"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if added else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def optimizer(model: nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only, as transformers are trained."""
    matrices = [value for value in model.parameters() if value.dim() > 1]
    others = [value for value in model.parameters() if value.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
