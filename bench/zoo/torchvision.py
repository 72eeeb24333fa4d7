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


def _library(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"torchvision.models.{module}"), name)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fcn_resnet50": (_segmentation("fcn_resnet50"), _IMAGE),
    "deeplabv3_mobilenet_v3_large": (_segmentation("deeplabv3_mobilenet_v3_large"), _IMAGE),
    "lraspp_mobilenet_v3_large": (_segmentation("lraspp_mobilenet_v3_large"), _IMAGE),
    "retinanet_resnet50_fpn": (_detection("retinanet_resnet50_fpn"), _IMAGE),
    "fasterrcnn_mobilenet_v3_large_fpn": (_detection("fasterrcnn_mobilenet_v3_large_fpn"), _IMAGE),
    "ssdlite320_mobilenet_v3_large": (_detection("ssdlite320_mobilenet_v3_large"), (2, 3, 320, 320)),
    "r3d_18": (_video("r3d_18"), _CLIP),
    "r2plus1d_18": (_video("r2plus1d_18"), _CLIP),
    "s3d": (_video("s3d"), (1, 3, 16, 224, 224)),
}
NAMES = tuple(MODELS)


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the model in eval mode and random images or clips."""
    make, shape = MODELS[name]
    return make().eval(), (torch.randn(shape),)
