"""What must be put right before third-party model libraries can be imported."""

from __future__ import annotations

import importlib
import sys

import torch

_declared: torch.library.Library | None = None


def shim_torchvision() -> None:
    """Make `import torchvision` work where its compiled operators do not load; does nothing elsewhere.

    A torchvision wheel built for CUDA next to a CPU-only torch loads no operators, and its import then fails at
    registering fake kernels for two that do not exist. Declaring those two is enough: timm and transformers import
    torchvision for image transforms and never call them. Call this before importing either library.
    """
    global _declared
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _declared is not None or "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        # The library object must stay alive: its operators go when it does.
        _declared = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            _declared.define(  # type: ignore[no-untyped-call]
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return  # not installed: whoever needs it says so better than this function could
