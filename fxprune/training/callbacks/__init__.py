"""A `Pruner` in the training loops of others. Each file is imported when its class is asked for, and not before.

- `TransformersCallback`, `distilled`  for `transformers.Trainer`
- `LightningCallback`                  for `lightning.Trainer`, or `pytorch_lightning`'s

With accelerate nothing is needed: `pruner.attach(optimizer)`, before or after `accelerator.prepare`.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Name -> the file that it is in.
_FILES = {
    "TransformersCallback": "for_transformers",
    "distilled": "for_transformers",
    "LightningCallback": "for_lightning",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
