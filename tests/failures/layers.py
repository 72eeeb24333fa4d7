"""Layers that several of the models are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    """Convolution, batch norm and an activation."""

    def __init__(
        self, into: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: nn.Module | bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = act if isinstance(act, nn.Module) else nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBN(channels, channels, 3)
        self.second = ConvBN(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class C2f(nn.Module):
    """YOLOv8's block: the second half goes through bottlenecks, each of whose outputs is kept for the last layer."""

    def __init__(self, into: int, out: int, blocks: int) -> None:
        super().__init__()
        hidden = out // 2
        self.first = ConvBN(into, 2 * hidden, 1)
        self.blocks = nn.ModuleList([Bottleneck(hidden) for _ in range(blocks)])
        self.last = ConvBN((2 + blocks) * hidden, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.last(torch.cat(parts, 1))


class SPPF(nn.Module):
    """YOLO's pooling pyramid: the same tensor pooled again and again, all concatenated."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = ConvBN(into, into // 2, 1)
        self.last = ConvBN(into // 2 * 4, out, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class CoordinateAttention(nn.Module):
    """Pooled along each side, joined, worked on, split again, and multiplied onto the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = ConvBN(channels, 8, 1, act=nn.Hardswish())
        self.along_h = nn.Conv2d(8, channels, 1)
        self.along_w = nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        down = F.adaptive_avg_pool2d(x, (None, 1))
        across = F.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)
        first, second = self.squeeze(torch.cat([down, across], 2)).split([h, w], 2)
        return x * self.along_h(first).sigmoid() * self.along_w(second.permute(0, 1, 3, 2)).sigmoid()


class Detect(nn.Module):
    """A decoupled detection head with distribution focal loss: boxes as expectations over 4 bins for each side.

    As in YOLOv8 the anchor points are made anew, and kept on the module, whenever the image has another size.
    """

    def __init__(self, channels: tuple[int, ...], classes: int = 3) -> None:
        super().__init__()
        self.classes, self.bins = classes, 4
        self.boxes = nn.ModuleList([nn.Sequential(ConvBN(c, 16, 3), nn.Conv2d(16, 4 * 4, 1)) for c in channels])
        self.scores = nn.ModuleList([nn.Sequential(ConvBN(c, 12, 3), nn.Conv2d(12, classes, 1)) for c in channels])
        for last in [branch[-1] for branch in (*self.boxes, *self.scores)]:
            last.weight.data *= 10  # else the points of the grid, which no weight makes, are most of the result
        self.expected = nn.Conv2d(4, 1, 1, bias=False).requires_grad_(False)
        self.expected.weight.data[:] = torch.arange(4.0).view(1, 4, 1, 1)
        self.shape: Any = None
        self.anchors: Any = torch.empty(0)

    def forward(self, maps: list[Tensor]) -> Tensor:
        shape = maps[0].shape
        made = [torch.cat([self.boxes[i](x), self.scores[i](x)], 1) for i, x in enumerate(maps)]
        if self.shape != shape:
            self.anchors = torch.cat([self._points(x) for x in maps], 1)
            self.shape = shape
        flat = torch.cat([x.view(shape[0], 16 + self.classes, -1) for x in made], 2)
        boxes, scores = flat.split((16, self.classes), 1)
        n, _, points = boxes.shape
        sides = self.expected(boxes.view(n, 4, 4, points).transpose(2, 1).softmax(1)).view(n, 4, points)
        near, far = sides.chunk(2, 1)
        corners = torch.cat([self.anchors - near, self.anchors + far], 1)
        return torch.cat([corners, scores.sigmoid()], 1)

    @staticmethod
    def _points(x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        return torch.stack((x, y)).view(2, -1)


class Yolo(nn.Module):
    """Backbone, feature pyramid up and down, detection head at two scales."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = ConvBN(3, 8, 3, 2)
        self.stage1 = nn.Sequential(ConvBN(8, 16, 3, 2), C2f(16, 16, 1))
        self.stage2 = nn.Sequential(ConvBN(16, 32, 3, 2), C2f(32, 32, 1), SPPF(32, 32))
        self.up = C2f(48, 16, 1)
        self.down = ConvBN(16, 16, 3, 2)
        self.low = C2f(48, 32, 1)
        self.detect = Detect((16, 32), classes)

    def forward(self, x: Tensor) -> Tensor:
        p1 = self.stage1(self.stem(x))
        p2 = self.stage2(p1)
        small = self.up(torch.cat([F.interpolate(p2, scale_factor=2.0), p1], 1))
        return self.detect([small, self.low(torch.cat([self.down(small), p2], 1))])
