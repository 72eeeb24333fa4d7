"""Files of a run that goes on later: written all or nothing, and read without running code that is in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.errors import InputError

_PARTS = {"pruner", "model", "optimizers", "random", "more"}
#: What optimizers hold that has the shape of its parameter.
_MOMENTS = {"momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "sum"}


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a file so that at every moment there is the old one or the new one, whole. Of processes the first writes.

    Raises:
        InputError: something in it is neither a tensor nor a plain value, so that it could not be read again.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.save(content, partial)
        _readable(partial)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """Return what is in a file.

    Raises:
        InputError: it is damaged, or something else than a checkpoint.
    """
    where = None if torch.cuda.is_available() else "cpu"
    try:
        content = torch.load(path, weights_only=True, map_location=where)
    except Exception as error:  # what reading damaged bytes ends in is of many kinds
        raise InputError(f"{path} is damaged or no checkpoint of a Pruner ({type(error).__name__})") from error
    if not isinstance(content, dict) or set(content) != _PARTS:
        raise InputError(f"{path} is no checkpoint of a Pruner; `Pruner.save` writes one")
    return content


def check_model(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Refuse the weights of another model.

    Raises:
        InputError: a name or a shape differs.
    """
    own = model.state_dict()
    for name in dict.fromkeys([*own, *state]):
        mine, other = (getattr(d.get(name), "shape", None) for d in (own, state))
        if (name in own) != (name in state) or mine != other:
            told = [f"of shape {tuple(s)}" if s is not None else "missing" for s in (other, mine)]
            raise InputError(f"{path} is of another model: '{name}' is {told[0]} there and {told[1]} here")


def check_stages(own: Sequence[Any], other: Sequence[Any]) -> None:
    """Refuse a state of other stages: for each what it was told and its schedule, in plain values.

    Raises:
        InputError: a key differs, or there are more or fewer.
    """
    for number, (mine, its) in enumerate(zip(own, other, strict=False)):
        for key in (k for here, there in zip(mine, its, strict=True) for k in here if here[k] != there.get(k)):
            raise InputError(f"the state is of other stages: stage {number} differs in '{key}'")
    if len(own) != len(other):
        raise InputError(f"the state is of other stages: it has {len(other)} of them, and here are {len(own)}")


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[Any], path: Path) -> None:
    """Let optimizers go on.

    Raises:
        InputError: there are more or fewer than those of the file, or their groups of parameters are others.
    """
    if states and not optimizers:
        raise InputError(f"{path} holds an optimizer's state: `attach` the optimizer before `load`")
    if optimizers and not states:
        raise InputError(f"{path} holds no optimizer's state, it was saved without `attach`: `load` before it")
    for optimizer, state in zip(optimizers, states, strict=True):
        _same_order(optimizer, state, path)
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            raise InputError(f"{path} is of another optimizer: {error}") from None


def _same_order(optimizer: torch.optim.Optimizer, state: Any, path: Path) -> None:
    """Refuse a state by numbers that are those of other parameters; torch itself does not look.

    Raises:
        InputError: a moment is not of its parameter's shape.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, held, strict=False):
        for name, value in state["state"].get(number, {}).items():
            if name in _MOMENTS and isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                raise InputError(
                    f"{path} is of another optimizer: its parameters are in another order. Make it at the same place "
                    "as before, either before the Pruner or after it"
                )


def random_state() -> dict[str, Any]:
    """Return where torch's random numbers are."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Let torch's random numbers go on from there; those of devices that are missing here are left out."""
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _readable(path: Path) -> None:
    """Refuse to replace a file that can be read by one that cannot.

    Raises:
        InputError: it holds more than tensors and plain values.
    """
    strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if strange:
        raise InputError(f"a checkpoint holds tensors and plain values only, not {', '.join(sorted(strange))}")


def _sync_folder(folder: Path) -> None:
    """Let the new name outlive a loss of power, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
