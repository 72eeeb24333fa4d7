"""Small models written here, for what the libraries' smallest do not show."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.zoo import handmade_more


class DiffusionUNet(nn.Module):
    """Convolutions with a time embedding, skips by concatenation, cross-attention to a context in the middle."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 2 * width))
        self.first, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm, self.middle = nn.GroupNorm(4, 2 * width), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.attention = nn.MultiheadAttention(2 * width, 4, kdim=12, vdim=12, batch_first=True)
        self.up, self.last = nn.ConvTranspose2d(2 * width, width, 2, 2), nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor, context: Tensor) -> Tensor:
        """x (N, 3, H, W), step (N,), context (N, T, 12) -> (N, 3, H, W)."""
        rates = torch.exp(torch.arange(self.width // 2) * (-math.log(1e4) / (self.width // 2)))
        angles = step[:, None] * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.first(x)
        y = self.down(F.silu(skip))
        y = y + self.middle(F.silu(self.norm(y)) + time[:, :, None, None])
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, context, context, need_weights=False)[0]
        y = self.up(tokens.transpose(1, 2).reshape(y.shape))
        return self.last(torch.cat([y, skip], 1))  # type: ignore[no-any-return]


class Selective(nn.Module):
    """A selective state space (Mamba), its scan written out."""

    def __init__(self, width: int = 32, state: int = 8) -> None:
        super().__init__()
        self.embed, self.into = nn.Linear(10, width), nn.Linear(width, 4 * width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 3, padding=2, groups=2 * width)
        self.parameters_of = nn.Linear(2 * width, 2 * state + 4)
        self.step = nn.Linear(4, 2 * width)
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(2 * width, 1))
        self.out, self.head = nn.Linear(2 * width, width), nn.Linear(width, 5)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, 10) -> (N, T, 5)."""
        x = self.embed(x)
        u, gate = self.into(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        step, b, c = self.parameters_of(u).split([4, self.state, self.state], -1)
        step = F.softplus(self.step(step))
        h = torch.zeros(x.shape[0], u.shape[-1], self.state)
        ys = []
        for t in range(x.shape[1]):
            h = h * torch.exp(-step[:, t, :, None] * self.decay.exp()) + (step * u)[:, t, :, None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return self.head(x + self.out(torch.stack(ys, 1) * F.silu(gate)))  # type: ignore[no-any-return]


class Tagger(nn.Module):
    """Convolutions, then an LSTM in both directions and a GRU, as speech and handwriting recognisers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(12, 32, 3, 2, 1), nn.BatchNorm1d(32), nn.ReLU())
        self.lstm = nn.LSTM(32, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.head = nn.GRU(48, 20, batch_first=True), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 12, T) -> (N, T / 2, 7)."""
        return self.head(self.gru(self.lstm(self.conv(x).transpose(1, 2))[0])[0])  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A mixture of experts by a loop: each runs on all rows, the router's weights say how much of it is taken."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(10, 32), nn.Linear(32, experts), nn.Linear(32, 5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, 10) -> (N, T, 5)."""
        x = self.embed(x)
        best, chosen = self.router(x).softmax(-1).topk(2, -1)
        for number, expert in enumerate(self.experts):
            x = x + expert(x) * (best * (chosen == number)).sum(-1, keepdim=True)
        return self.head(x)  # type: ignore[no-any-return]


class Recommender(nn.Module):
    """Embedding tables and pairwise products (DLRM)."""

    def __init__(self, tables: int = 4, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, width) for _ in range(tables))
        self.dense = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(pairs + width, 64), nn.ReLU(), nn.Linear(64, 1))
        self.register_buffer("pairs", torch.triu_indices(tables + 1, tables + 1, 1), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """dense (N, 8), sparse (N, tables) -> (N, 1)."""
        x = self.dense(dense)
        rows = torch.stack([x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))], 1)
        pairs: Tensor = self.pairs  # type: ignore[assignment]
        products = (rows @ rows.transpose(1, 2))[:, pairs[0], pairs[1]]
        return self.top(torch.cat([products, x], 1))  # type: ignore[no-any-return]


class SuperResolution(nn.Module):
    """Residual blocks and pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.PReLU(32), nn.Conv2d(32, 32, 3, padding=1))
            for _ in range(2)
        )
        self.shuffle, self.last = nn.PixelShuffle(2), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) -> (N, 3, 2 H, 2 W)."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(F.relu(self.shuffle(self.up(x))))  # type: ignore[no-any-return]


class GatedWaves(nn.Module):
    """Dilated gated convolutions with skips (WaveNet), their weights normalised."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.first, self.last = nn.Conv1d(1, width, 1), nn.Conv1d(width, 8, 1)
        self.gates = nn.ModuleList(norm(nn.Conv1d(width, 2 * width, 3, padding=2**i, dilation=2**i)) for i in range(3))
        self.outs = nn.ModuleList(norm(nn.Conv1d(width, 2 * width, 1)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 1, T) -> (N, 8, T)."""
        x = self.first(x)
        total = torch.zeros_like(x)
        for gate, out in zip(self.gates, self.outs, strict=True):
            a, b = gate(x).chunk(2, 1)
            residual, skip = out(a.tanh() * b.sigmoid()).chunk(2, 1)
            x, total = x + residual, total + skip
        return self.last(F.relu(total))  # type: ignore[no-any-return]


class Translator(nn.Module):
    """torch's own encoder-decoder transformer between tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.body = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source (N, S), target (N, T) -> (N, T, 100)."""
        return self.head(self.body(self.embed(source), self.embed(target)))  # type: ignore[no-any-return]


class Points(nn.Module):
    """A set of points: the same layers for each, then the largest (PointNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, points) -> (N, 6)."""
        return self.head(self.each(x).amax(-1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "diffusion_unet": (
        DiffusionUNet,
        lambda: (torch.randn(2, 3, 16, 16), torch.rand(2) * 100, torch.randn(2, 5, 12)),
    ),
    "selective_state_space": (Selective, lambda: (torch.randn(2, 8, 10),)),
    "recurrent_tagger": (Tagger, lambda: (torch.randn(2, 12, 16),)),
    "experts_by_loop": (Experts, lambda: (torch.randn(2, 6, 10),)),
    "recommender": (Recommender, lambda: (torch.randn(2, 8), torch.randint(0, 50, (2, 4)))),
    "super_resolution": (SuperResolution, lambda: (torch.randn(2, 3, 12, 12),)),
    "gated_waves": (GatedWaves, lambda: (torch.randn(2, 1, 32),)),
    "translator": (Translator, lambda: (torch.randint(0, 100, (2, 7)), torch.randint(0, 100, (2, 5)))),
    "points": (Points, lambda: (torch.randn(2, 3, 20),)),
}
MODELS |= handmade_more.MODELS
NAMES = tuple(MODELS)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the model in eval mode and random inputs."""
    make, inputs = MODELS[name]
    return make().eval(), inputs()
