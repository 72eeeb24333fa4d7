"""Rows 33 and 36: detectors, whose boxes depend on values, and forward passes that symbolic tracing cannot follow."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError
from tests.failures.checks import filled, masked_by_hand, prune
from tests.failures.layers import SPPF, Bottleneck, C2f, ConvBN, Detect, Yolo
from tests.rules.checks import close

#: The bins that a softmax makes an expectation of could be cut as well; that would be another range of box sizes.
BINS: dict[str, Any] = {"keep": ["*expected"]}


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


# ---------------------------------------------------------------------- 33
class Stages(nn.Module):
    """A small backbone that returns the maps of its last two stages by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBN(3, 8, 3, 2), ConvBN(8, 16, 3, 2))
        self.first = nn.Sequential(ConvBN(16, 24, 3, 2), Bottleneck(24))
        self.second = nn.Sequential(ConvBN(24, 32, 3, 2), Bottleneck(32))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(self.stem(x))
        return OrderedDict([("0", first), ("1", self.second(first))])


class Pyramid(nn.Module):
    """Backbone, torchvision's feature pyramid and its region proposal head: what is before boxes are decoded."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection.rpn import RPNHead
        from torchvision.ops import FeaturePyramidNetwork

        self.body = Stages()
        self.fpn = FeaturePyramidNetwork([24, 32], 16)
        self.rpn = RPNHead(16, 3)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.rpn(list(self.fpn(self.body(x)).values()))


class SingleShot(nn.Module):
    """SSD with a pyramid: torchvision's heads reshape channels to (anchors, classes) and join all positions."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection.ssd import SSDHead
        from torchvision.ops import FeaturePyramidNetwork

        self.body = Stages()
        self.fpn = FeaturePyramidNetwork([24, 32], 16)
        self.head = SSDHead([16, 16], [4, 6], 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.fpn(self.body(x)).values()))


class Dense(nn.Module):
    """RetinaNet's shared towers with group norm, for both levels of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Stages()
        self.lateral = nn.ModuleList([nn.Conv2d(24, 16, 1), nn.Conv2d(32, 16, 1)])
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.score = nn.Conv2d(16, 2 * 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = (layer(m) for layer, m in zip(self.lateral, self.body(x).values(), strict=True))
        fine = fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        made = []
        for level in (fine, coarse):
            y = self.score(self.tower(level))
            n, _, h, w = y.shape
            made.append(y.view(n, -1, 5, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 5))
        return torch.cat(made, 1)


BODIES: dict[str, tuple[Any, list[str]]] = {
    "faster_rcnn": (Pyramid, ["fpn.*_blocks.*.weight.0", "rpn.conv.*.weight.[01]", "rpn.cls_logits.weight.1"]),
    "ssd_with_pyramid": (SingleShot, ["fpn.*_blocks.*.weight.0", "head.*.module_list.*.weight.1"]),
    "retinanet": (Dense, ["lateral.*.weight.[01]", "tower.0.weight.[01]", "score.weight.1"]),
    "yolo": (Yolo, ["stem.conv.weight.0", "up.first.conv.weight.[01]", "low.*.conv.weight.0", "detect.boxes.*.0.*.0"]),
}


@pytest.mark.parametrize("name", BODIES)
def test_row_33_detector_up_to_its_boxes(name: str) -> None:
    """Backbone, pyramid and heads shared by its levels are cut. nni#5356, #5345, #5738, #5742, #3050."""
    build, dimensions = BODIES[name]
    result = prune(build(), images(), **(BINS if name == "yolo" else {}))
    stem = "stem.conv.weight.0" if name == "yolo" else "body.*.conv.weight.0"
    result.cut(stem, *dimensions)
    if name == "yolo":  # 4 bins for each of 4 sides, and a score for each class
        assert result.width("detect.boxes.0.1.weight") == 4 * result.width("detect.expected.weight", 1) == 16
        result.whole("of a model output", "detect.scores.*.1.weight.0")
    else:  # a number for each anchor box and class
        head = {"faster_rcnn": "rpn.bbox_pred.weight.0", "retinanet": "score.weight.0"}
        result.whole("of a model output", head.get(name, "head.*.module_list.*.weight.0"))


class Detector(nn.Module):
    """A body, and boxes picked by value: their number is not known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Dense()

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for scores in self.body(x):
            best = scores.amax(-1)
            found.append(scores[best > best.median()])
        return found


def test_row_33_values_that_decide_are_refused_and_the_body_is_pruned() -> None:
    """Where the whole cannot be recorded, its line is named; a part is pruned and put back. nni#5356, #5738."""
    model = filled(Detector())
    with pytest.raises(CaptureError) as caught:
        fxprune.compile(model, images(), {"target": {"macs": 0.5}})
    text = str(caught.value)
    assert "scores[best > best.median()]" in text and text.splitlines()[-1].endswith("Move that line out of `forward`.")

    part = prune(model.body, images())
    part.cut("body.*.conv.weight.0", "lateral.*.weight.[01]", "tower.0.weight.[01]")
    small, masked = copy.copy(model), copy.deepcopy(model)
    small._modules = {"body": part.pruned.module}
    masked.body = masked_by_hand(model.body, part.pruned.plan.kept)
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert close(masked(x), small(x), 2e-4)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


def test_row_33_torchvision_faster_rcnn() -> None:
    """The whole of torchvision's detector is refused with its line; its backbone is pruned in place. nni#3050."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    class WithFPN(BackboneWithFPN):
        """The pyramid around a backbone that names its maps itself."""

        def __init__(self) -> None:
            super().__init__(nn.Sequential(OrderedDict(last=nn.Identity())), {"last": "0"}, [24, 32], 16)
            self.body = Stages()

    anchors = AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0),) * 3)
    model = FasterRCNN(WithFPN(), 4, min_size=32, max_size=32, rpn_anchor_generator=anchors)
    with pytest.raises(CaptureError, match=r"the forward pass of FasterRCNN cannot be recorded"):
        fxprune.compile(model.eval(), [[torch.randn(3, 32, 32)]], {"target": {"macs": 0.5}})
    before = {k: v.shape for k, v in model.backbone(images()).items()}
    result = prune(model.backbone, images())
    result.cut("body.*.conv.weight.0")
    # Whatever takes the maps still finds them by name, and 16 channels in each.
    result.whole("of a model output", "fpn.layer_blocks.*.weight.0")
    model.backbone = result.pruned.module
    assert {k: v.shape for k, v in model.backbone(images()).items()} == before


# ---------------------------------------------------------------------- 36
def test_row_36_yolov8() -> None:
    """Blocks that loop over lists, and a head that keeps the anchors of the last image size. ModelOpt#506."""
    result = prune(Yolo(), images(), **BINS)
    result.cut("stem.conv.weight.0", "stage?.1.*.conv.weight.[01]", "stage2.2.*.conv.weight.[01]")
    result.cut("up.*.conv.weight.0", "down.conv.weight.[01]", "low.*.conv.weight.0", "detect.*.0.conv.weight.[01]")


def test_row_36_state_that_forward_keeps() -> None:
    """Anchors of another image size are not taken for those of this one, and stay as they are. ModelOpt#506."""
    head = filled(Detect((6, 8)))
    small, large = ([torch.randn(2, 6, s, s), torch.randn(2, 8, s // 2, s // 2)] for s in (4, 8))
    with torch.no_grad():
        head(small)
    anchors = head.anchors
    pruned = fxprune.compile(head, (large,), {"target": {"macs": 0.5}, **BINS})
    assert head.anchors is anchors and head.shape == small[0].shape
    masked = masked_by_hand(head, pruned.plan.kept)
    with torch.no_grad():
        assert close([masked(large)], [pruned.module(large)], 2e-4)


@dataclass
class Maps:
    """Two maps under names."""

    fine: Tensor
    coarse: Tensor


class Untraceable(nn.Module):
    """Python all over: dataclasses, loops over sizes, branches on shapes and types, keywords, numbers from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 16, 3)
        self.layers = nn.ModuleDict({"c2f": C2f(16, 16, 1), "plain": ConvBN(16, 16, 3), "pool": SPPF(16, 16)})
        self.scales = nn.ParameterList([torch.rand(16, 1, 1) + 0.5 for _ in range(2)])
        self.last = nn.Linear(16, 5)

    def _stage(self, *xs: Any, keys: tuple[str, ...] = ("c2f",), **options: Any) -> Maps:
        x = xs[0]
        for key, layer in self.layers.items():
            if key in keys or (isinstance(layer, SPPF) and x.shape[-1] > 4):
                x = layer(x)
        if options.get("odd") and x.size(2) % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return Maps(x, F.max_pool2d(x, 2))

    def forward(self, x: Tensor, gain: float | None = None) -> Tensor:
        maps = self._stage(self.stem(x), keys=("c2f", "plain"), odd=True)
        total = torch.zeros(len(x), 5)
        for i, name in enumerate(vars(maps)):
            y = getattr(maps, name) * self.scales[i]
            while y.shape[-1] > 4:
                y = F.avg_pool2d(y, 2)
            total = total + self.last(torch.stack([row.mean(-1) for row in y.unbind(2)], -1).sum(-1))
        assert total.dim() == 2, "a check that a tracer cannot decide"
        return total if gain is None else total * gain


@pytest.mark.parametrize("size", [7, 16])
def test_row_36_what_symbolic_tracing_cannot_follow(size: int) -> None:
    """The operators that were run are recorded, whatever code ran them. ModelOpt#176."""
    model = Untraceable()
    with pytest.raises(Exception, match=r"symbolically traced|Proxy"):
        torch.fx.symbolic_trace(model)
    result = prune(model, images(size))
    result.cut("stem.conv.weight.0", "layers.*.conv.weight.[01]", "scales.*.0", "last.weight.1")


def test_row_36_head_without_anchors() -> None:
    """A detection head by itself takes a list of maps. ModelOpt#506."""
    result = prune(Detect((6, 8)).eval(), ([torch.randn(2, 6, 8, 8), torch.randn(2, 8, 4, 4)],), **BINS)
    result.cut("boxes.*.0.conv.weight.0", "scores.*.0.conv.weight.0", "boxes.*.1.weight.1", "scores.*.1.weight.1")
    result.whole("of the input", "boxes.*.0.conv.weight.1", "scores.*.0.conv.weight.1")
