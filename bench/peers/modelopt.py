"""NVIDIA ModelOpt: FastNAS, a search for widths, and 2:4 sparsity by magnitude and by SparseGPT; on the CPU.

Installed with `pip install nvidia-modelopt requests`. FastNAS counts operations with torchprofile 0.0.4.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.peers.limit import limited
from bench.shims import shim_torchvision

Inputs = tuple[Tensor, ...]

_INSTALL = "pip install nvidia-modelopt requests"


def missing(search: bool = False) -> str | None:
    """Return why ModelOpt, or its search for widths, cannot run here; None where it can."""
    if importlib.util.find_spec("modelopt") is None:
        return f"nvidia-modelopt is not installed ({_INSTALL})"
    try:
        with _silent():
            importlib.import_module("modelopt.torch.sparsity")
    except Exception as error:  # a package that it needs, or another version of one
        return f"nvidia-modelopt cannot be imported: {type(error).__name__}: {error} ({_INSTALL})"
    if not search:
        return None
    try:
        profile = importlib.import_module("torchprofile.profile")
    except ImportError:
        profile = None
    return (
        None if hasattr(profile, "handlers") else "FastNAS needs torchprofile 0.0.4 (pip install torchprofile==0.0.4)"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what it prints and warns about off the screen."""
    shim_torchvision()
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        yield


def fastnas(
    model: nn.Module,
    example: Inputs,
    share: float,
    score: Callable[[nn.Module], float],
    data: Sequence[Inputs],
    round_to: int,
    kept: Path,
    limit: float = 600.0,
) -> nn.Module:
    """Return a copy with at most the share `share` of the operations, its widths found by FastNAS.

    Args:
        score: what the search maximises.
        data: batches that it runs the model on.
        round_to: the number that widths are multiples of.
        kept: a file in which it keeps what layers can spare, which is the same for every share.
        limit: seconds.

    Raises:
        TimeoutError: after `limit` seconds.
        Exception: whatever ModelOpt, or the forward of what it leaves, raises.
    """
    with _silent(), limited(limit, "ModelOpt FastNAS"):
        pruning: Any = importlib.import_module("modelopt.torch.prune")
        settings: dict[str, Any] = pruning.fastnas.FastNASConfig().model_dump()
        for layer in settings.values():
            for every in filter(None, layer.values()):
                every |= {key: round_to for key in every if key.endswith("divisor")}
        pruned, _ = pruning.prune(
            copy.deepcopy(model).eval(),
            mode=[("fastnas", settings)],
            constraints={"flops": f"{100 * share:.2f}%"},
            dummy_input=example,
            config={"forward_loop": _loop(data), "score_func": score, "checkpoint": str(kept), "verbose": False},
        )
    result: nn.Module = pruned.eval()
    with torch.inference_mode():
        result(*example)
    return result


def sparsify(model: nn.Module, method: Literal["sparse_magnitude", "sparsegpt"], data: Sequence[Inputs]) -> nn.Module:
    """Return a copy with 2:4 weights in every layer that ModelOpt takes."""
    with _silent():
        sparsity: Any = importlib.import_module("modelopt.torch.sparsity")
        settings = None if method == "sparse_magnitude" else {"forward_loop": _loop(data)}
        sparse = sparsity.sparsify(copy.deepcopy(model).eval(), mode=method, config=settings)
        result: nn.Module = sparsity.export(sparse).eval()
    return result


def _loop(data: Sequence[Inputs]) -> Callable[[nn.Module], None]:
    def loop(model: nn.Module) -> None:
        with torch.no_grad():
            for inputs in data:
                model(*inputs)

    return loop
