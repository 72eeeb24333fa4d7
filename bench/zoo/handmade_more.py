"""More small models written here: detection, generation, graphs, experts as one product, speech."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(inside: int, outside: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.SiLU())


class SplitBottlenecks(nn.Module):
    """Half of the channels go through bottlenecks; every step's result is kept (C2f)."""

    def __init__(self, inside: int, outside: int, depth: int = 2) -> None:
        super().__init__()
        half = outside // 2
        self.first, self.last = _conv(inside, outside), _conv((2 + depth) * half, outside)
        self.steps = nn.ModuleList(nn.Sequential(_conv(half, half, 3), _conv(half, half, 3)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inside, H, W) -> (N, outside, H, W)."""
        parts = list(self.first(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.last(torch.cat(parts, 1))  # type: ignore[no-any-return]


class CoordinateAttention(nn.Module):
    """Rows' and columns' means gate the channels."""

    def __init__(self, width: int, inner: int = 8) -> None:
        super().__init__()
        self.both, self.rows, self.columns = _conv(width, inner), nn.Conv2d(inner, width, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, width, H, W) -> the same shape."""
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        joint = self.both(torch.cat([rows, columns], 2))
        rows, columns = torch.split(joint, [x.shape[2], x.shape[3]], 2)
        gates: Tensor = self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()
        return x * gates


class Detector(nn.Module):
    """A one-stage detector: pyramid up, boxes as distributions over distances, classes, anchors of the grid (YOLO)."""

    def __init__(self, classes: int = 4, bins: int = 8) -> None:
        super().__init__()
        self.bins, self.classes = bins, classes
        self.stem = nn.Sequential(_conv(3, 16, 3, 2), _conv(16, 32, 3, 2), SplitBottlenecks(32, 32))
        self.deep = nn.Sequential(_conv(32, 64, 3, 2), SplitBottlenecks(64, 64), CoordinateAttention(64))
        self.pools = nn.MaxPool2d(5, 1, 2)
        self.squeeze, self.spread = _conv(64, 32), _conv(128, 64)
        self.fuse = SplitBottlenecks(96, 32)
        self.boxes = nn.ModuleList(nn.Sequential(_conv(w, 32, 3), nn.Conv2d(32, 4 * bins, 1)) for w in (32, 64))
        self.names = nn.ModuleList(nn.Sequential(_conv(w, 16, 3), nn.Conv2d(16, classes, 1)) for w in (32, 64))
        self.distances = nn.Conv2d(bins, 1, 1, bias=False)
        self.distances.weight.data[:] = torch.arange(bins).view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) -> (N, 4 + classes, anchors)."""
        shallow = self.stem(x)
        pools = [self.squeeze(self.deep(shallow))]
        for _ in range(3):
            pools.append(self.pools(pools[-1]))
        deep = self.spread(torch.cat(pools, 1))
        up = self.fuse(torch.cat([F.interpolate(deep, scale_factor=2.0), shallow], 1))
        made = []
        for level, box, name in zip((up, deep), self.boxes, self.names, strict=True):
            made.append(torch.cat([box(level), name(level)], 1).flatten(2))
        boxes, names = torch.split(torch.cat(made, 2), [4 * self.bins, self.classes], 1)
        n, _, anchors = boxes.shape
        shares = boxes.view(n, 4, self.bins, anchors).transpose(1, 2).softmax(1)
        return torch.cat([self.distances(shares).view(n, 4, anchors), names.sigmoid()], 1)


class BatchedExperts(nn.Module):
    """Experts whose weights are one tensor each way: all tokens through all experts, weighted by the router."""

    def __init__(self, experts: int = 4, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(10, width), nn.Linear(width, experts), nn.Linear(width, 5)
        self.into = nn.Parameter(torch.randn(experts, width, 2 * inner) / width**0.5)
        self.out = nn.Parameter(torch.randn(experts, inner, width) / inner**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, 10) -> (N, T, 5)."""
        x = self.embed(x)
        tokens = x.reshape(-1, x.shape[-1])
        best, chosen = self.router(tokens).softmax(-1).topk(2, -1)
        shares = torch.zeros(tokens.shape[0], self.into.shape[0]).scatter(1, chosen, best)
        gate, up = torch.bmm(tokens.expand(self.into.shape[0], *tokens.shape), self.into).chunk(2, -1)
        results = torch.bmm(F.silu(gate) * up, self.out)
        return self.head(x + torch.einsum("etd,te->td", results, shares).view_as(x))  # type: ignore[no-any-return]


class Heads(nn.Module):
    """A state space with one decay for each head, as one masked product over the sequence (Mamba-2)."""

    def __init__(self, width: int = 32, heads: int = 4, state: int = 8) -> None:
        super().__init__()
        self.heads, self.state, self.inner = heads, state, 2 * width
        self.embed, self.into = nn.Linear(10, width), nn.Linear(width, 2 * self.inner + 2 * state + heads)
        mixed = self.inner + 2 * state
        self.conv = nn.Conv1d(mixed, mixed, 4, padding=3, groups=mixed)
        self.decay, self.skip = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.ones(heads))
        self.norm, self.out, self.head = nn.RMSNorm(self.inner), nn.Linear(self.inner, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, 10) -> (N, T, 5)."""
        x = self.embed(x)
        n, t, _ = x.shape
        gate, mixed, step = torch.split(self.into(x), [self.inner, self.inner + 2 * self.state, self.heads], -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[..., :t].transpose(1, 2))
        u, b, c = torch.split(mixed, [self.inner, self.state, self.state], -1)
        u = u.view(n, t, self.heads, -1)
        step = F.softplus(step)
        reached = torch.cumsum(-step * self.decay.exp(), 1)
        span = (reached[:, :, None] - reached[:, None]).permute(0, 3, 1, 2)
        past = torch.ones(t, t, dtype=torch.bool).tril()
        weight = torch.exp(span.masked_fill(~past, float("-inf"))) * (c @ b.transpose(1, 2))[:, None]
        y = torch.einsum("nhij,njhp->nihp", weight, u * step[..., None]) + self.skip[:, None] * u
        return self.head(x + self.out(self.norm(y.reshape(n, t, -1) * F.silu(gate))))  # type: ignore[no-any-return]


class Conformer(nn.Module):
    """A speech encoder: subsampling by convolutions, half steps of feed-forward, attention, gated convolution."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.embed = nn.Linear(8 * 5, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.before, self.after = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)) for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.gates, self.mix = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depthwise, self.batch = nn.Conv1d(width, width, 7, padding=3, groups=width), nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 20, T), filter banks -> (N, T / 4, 12)."""
        x = self.subsample(x[:, None]).flatten(1, 2).transpose(1, 2)
        x = self.embed(x)
        x = x + 0.5 * self.before(self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.gates(self.norms[2](x).transpose(1, 2)), 1)
        x = x + self.mix(F.silu(self.batch(self.depthwise(y)))).transpose(1, 2)
        x = x + 0.5 * self.after(self.norms[3](x))
        return self.head(self.norms[4](x))  # type: ignore[no-any-return]


class Graph(nn.Module):
    """Messages along edges, summed at their targets, and an update with a gate."""

    def __init__(self, width: int = 32, rounds: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.messages = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.ReLU()) for _ in range(rounds))
        self.updates = nn.ModuleList(nn.GRUCell(width, width) for _ in range(rounds))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """nodes (V, 6), edges (2, E) -> (V, 3)."""
        x = self.embed(nodes)
        source, target = edges[0], edges[1]
        for message, update in zip(self.messages, self.updates, strict=True):
            sent = message(torch.cat([x[source], x[target]], -1))
            x = update(torch.zeros_like(x).index_add(0, target, sent), x)
        return self.head(x)  # type: ignore[no-any-return]


class TiedAutoencoder(nn.Module):
    """The decoder multiplies with the encoder's weights, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 64), nn.Linear(64, 16)
        self.middle, self.last = nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 24) -> (N, 24)."""
        code = F.relu(self.second(F.relu(self.first(x))))
        return F.linear(F.relu(F.linear(code, self.second.weight.t(), self.middle)), self.first.weight.t(), self.last)


class Mixer(nn.Module):
    """Linear layers over patches, then over channels (MLP-Mixer)."""

    def __init__(self, width: int = 32, patches: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, width, 8, 8), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for _ in range(depth)
            for size in (patches, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, 32, 32) -> (N, 10)."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            y = self.norms[i](x)
            x = x + (layer(y) if i % 2 else layer(y.transpose(1, 2)).transpose(1, 2))
        return self.head(self.norms[-1](x).mean(1))  # type: ignore[no-any-return]


class Modulated(nn.Module):
    """Convolutions whose weights are scaled for each sample by a style, and normalised (StyleGAN 2)."""

    def __init__(self, style: int = 16, width: int = 32) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Linear(style, 32), nn.LeakyReLU(0.2), nn.Linear(32, style))
        self.start = nn.Parameter(torch.randn(1, width, 4, 4))
        self.styles = nn.ModuleList(nn.Linear(style, width) for _ in range(2))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(width, width, 3, 3) / 17) for _ in range(2))
        self.colour = nn.Conv2d(width, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        """z (N, style) -> (N, 3, 16, 16)."""
        w = self.map(z)
        x = self.start.expand(z.shape[0], -1, -1, -1)
        for style, weight in zip(self.styles, self.weights, strict=True):
            scaled = weight[None] * (1 + style(w))[:, None, :, None, None]
            scaled = scaled * torch.rsqrt(scaled.square().sum((2, 3, 4), keepdim=True) + 1e-8)
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            n, c, h, width = x.shape
            x = F.conv2d(x.reshape(1, n * c, h, width), scaled.flatten(0, 1), padding=1, groups=n)
            x = F.leaky_relu(x.view(n, -1, h, width), 0.2)
        return self.colour(x)  # type: ignore[no-any-return]


class ConvolutionsThenRecurrence(nn.Module):
    """Reading text lines: convolutions, height folded into the channels, LSTM in both directions (CRNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(_conv(1, 16, 3, 2), _conv(16, 32, 3, 2), nn.MaxPool2d((2, 1)))
        self.lstm, self.head = nn.LSTM(32 * 4, 24, bidirectional=True, batch_first=True), nn.Linear(48, 30)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 1, 32, W) -> (N, W / 4, 30)."""
        x = self.convs(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "detector": (Detector, lambda: (torch.randn(2, 3, 64, 64),)),
    "experts_by_product": (BatchedExperts, lambda: (torch.randn(2, 6, 10),)),
    "state_space_of_heads": (Heads, lambda: (torch.randn(2, 8, 10),)),
    "conformer": (Conformer, lambda: (torch.randn(2, 20, 32),)),
    "graph": (Graph, lambda: (torch.randn(9, 6), torch.randint(0, 9, (2, 14)))),
    "tied_autoencoder": (TiedAutoencoder, lambda: (torch.randn(3, 24),)),
    "mixer": (Mixer, lambda: (torch.randn(2, 3, 32, 32),)),
    "modulated": (Modulated, lambda: (torch.randn(2, 16),)),
    "convolutions_then_recurrence": (ConvolutionsThenRecurrence, lambda: (torch.randn(2, 1, 32, 48),)),
}
