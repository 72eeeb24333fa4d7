"""Where a run is, on disk: the state inside a stage, and the smaller model that the stage before it left."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from fxprune.errors import InputError
from fxprune.pruned import Pruned
from fxprune.saved import load_pruned
from fxprune.training.checkpoint import write

#: What the file says that it is.
_FORMAT = 1


class RunFolder:
    """A folder with `now.pt` and `before-N`; each is replaced as a whole or not at all.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def save(self, state: dict[str, Any]) -> None:
        """Write the state: plain values and tensors."""
        if self.folder is None:
            return
        write({"format": _FORMAT} | state, self.folder / "now.pt")

    def keep(self, stage: int, result: Pruned) -> None:
        """Write the model that a stage left; those of earlier stages are dropped once `save` has been called again."""
        if self.folder is not None:
            result.save(self.folder / f"before-{stage}", overwrite=True)

    def tidy(self, stage: int) -> None:
        """Drop the models that no stage from this one on begins with."""
        if self.folder is not None:
            for old in self.folder.glob("before-*"):
                if int(old.name.partition("-")[2]) < stage:
                    shutil.rmtree(old, ignore_errors=True)

    def load(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a run of the same recipe.

        Raises:
            InputError: there is none, it cannot be read, or it is of another recipe.
        """
        if self.folder is None:
            raise InputError("resume: say where the run is kept, `checkpoint=`")
        path = self.folder / "now.pt"
        if not path.exists():
            raise InputError(f"resume: there is no {path}; run without resume first")
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise InputError(f"resume: {path} cannot be read: {error}") from error
        if state.get("format") != _FORMAT:
            raise InputError(f"resume: {path} is no state of a run of this version")
        if state["recipe"] != recipe:
            other = sorted(k for k in {*state["recipe"], *recipe} if state["recipe"].get(k) != recipe.get(k))
            raise InputError(f"resume: the run was begun with another recipe: {', '.join(other)} differ")
        return state

    def before(self, stage: int) -> Pruned:
        """Return the model that a stage left.

        Raises:
            SavedModelError: it is not there, or damaged.
        """
        assert self.folder is not None
        return load_pruned(self.folder / f"before-{stage}")
