"""torchvision: what timm does not have. Segmentation, video, optical flow, and the bodies of detectors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CLASSES: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 6}
_IMAGE = (2, 3, 64, 64)
_CLIP = (2, 3, 8, 64, 64)


class _Body(nn.Module):
    """The part of a detector that makes feature maps and raw predictions; what follows depends on their values."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, getattr(detector, "head", None) or detector.rpn.head

    def forward(self, x: Tensor) -> Any:
        """Return the head's predictions on every feature map."""
        return self.head(list(self.backbone(x).values()))


def _segmentation(name: str) -> Callable[[], nn.Module]:
    return lambda: _library("segmentation", name)(**_CLASSES)


def _video(name: str) -> Callable[[], nn.Module]:
    return lambda: _library("video", name)(weights=None, num_classes=6)


def _detection(name: str) -> Callable[[], nn.Module]:
    return lambda: _Body(_library("detection", name)(**_CLASSES))


def _classification(name: str) -> Callable[[], nn.Module]:
    return lambda: _library(name.partition("_")[0], name)(weights=None, num_classes=6)


class _Flow(nn.Module):
    """RAFT gives a list of flows, one for each update; the last is the result."""

    def __init__(self) -> None:
        super().__init__()
        self.raft = _library("optical_flow", "raft_small")(weights=None)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the flow (N, 2, H, W) after two updates."""
        flow: Tensor = self.raft(first, second, num_flow_updates=2)[-1]
        return flow


def _library(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"torchvision.models.{module}"), name)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fcn_resnet50": (_segmentation("fcn_resnet50"), _IMAGE),
    "deeplabv3_mobilenet_v3_large": (_segmentation("deeplabv3_mobilenet_v3_large"), _IMAGE),
    "lraspp_mobilenet_v3_large": (_segmentation("lraspp_mobilenet_v3_large"), _IMAGE),
    "retinanet_resnet50_fpn": (_detection("retinanet_resnet50_fpn"), _IMAGE),
    "fasterrcnn_mobilenet_v3_large_fpn": (_detection("fasterrcnn_mobilenet_v3_large_fpn"), _IMAGE),
    "ssdlite320_mobilenet_v3_large": (_detection("ssdlite320_mobilenet_v3_large"), (2, 3, 320, 320)),
    "fcos_resnet50_fpn": (_detection("fcos_resnet50_fpn"), _IMAGE),
    "maskrcnn_resnet50_fpn": (_detection("maskrcnn_resnet50_fpn"), _IMAGE),
    "ssd300_vgg16": (_detection("ssd300_vgg16"), (2, 3, 300, 300)),
    "maxvit_t": (_classification("maxvit_t"), (2, 3, 224, 224)),
    "shufflenetv2_x0_5": (lambda: _library("shufflenetv2", "shufflenet_v2_x0_5")(num_classes=6), _IMAGE),
    "squeezenet1_1": (lambda: _library("squeezenet", "squeezenet1_1")(num_classes=6), _IMAGE),
    "alexnet": (_classification("alexnet"), (2, 3, 224, 224)),
    "raft_small": (_Flow, (2, 3, 128, 128)),
    "r3d_18": (_video("r3d_18"), _CLIP),
    "r2plus1d_18": (_video("r2plus1d_18"), _CLIP),
    "mc3_18": (_video("mc3_18"), _CLIP),
    "swin3d_t": (_video("swin3d_t"), _CLIP),
    "mvit_v2_s": (_video("mvit_v2_s"), (1, 3, 16, 224, 224)),
    "s3d": (_video("s3d"), (1, 3, 16, 224, 224)),
}
NAMES = tuple(MODELS)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the model in eval mode and random images or clips."""
    make, shape = MODELS[name]
    count = 2 if make is _Flow else 1
    return make().eval(), tuple(torch.randn(shape) for _ in range(count))
