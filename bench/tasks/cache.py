"""Trained weights on disk, so that a task is trained once on a machine and not once a run.

One safetensors file a model, in `$XDG_CACHE_HOME/fxprune-bench` (`~/.cache/fxprune-bench` where that is not set). The
file's name carries a hash of all that the weights depend on: whatever is changed is trained anew. Deleting the folder
is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from rich.console import Console
from torch import nn

from bench.tasks.training import Progress, showing

_REVISION = 1  # to be raised whenever the same settings give other weights, because the code changed


def directory() -> Path:
    """Return the folder with the weights; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxprune-bench"


def file(name: str, settings: Mapping[str, object]) -> Path:
    """Return where the weights of a task with these settings are, or will be.

    >>> file("task", {"epochs": 1}).name == file("task", {"epochs": 2}).name
    False
    """
    said = json.dumps({**settings, "revision": _REVISION}, sort_keys=True)
    return directory() / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}.safetensors"


def trained(
    name: str, settings: Mapping[str, object], model: nn.Module, train: Callable[[nn.Module, Progress], object]
) -> nn.Module:
    """Return `model` with its weights from the cache, or trained now and put there; in eval mode.

    Args:
        name: of the task.
        settings: all that the weights depend on; what JSON can hold.
        model: untrained. It is changed in place.
        train: (model, what to call after each step) trains it in place.
    """
    # The shapes, too: weights of an architecture that has changed since would not fit.
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    path = file(name, {**settings, "shapes": shapes})
    if path.exists():
        model.load_state_dict(safetensors.torch.load_file(path))
        return model.eval()
    start = time.perf_counter()
    with showing(Console(stderr=True), f"training {name}") as progress:
        train(model, progress)
    about = {"seconds": f"{time.perf_counter() - start:.1f}", "settings": json.dumps(settings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: another process finds all of the file or none of it.
    partial = path.with_suffix(f".{os.getpid()}")
    weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, partial, metadata=about)
    partial.replace(path)
    return model.eval()


def seconds(path: Path) -> float:
    """Return how long the training took whose weights a file holds."""
    with safetensors.safe_open(path, framework="pt") as opened:  # type: ignore[no-untyped-call, unused-ignore]
        return float(opened.metadata()["seconds"])
