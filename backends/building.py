"""What building has in common: a file that stays, or goes with its runner; and parity with torch at several sizes."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fxprune.backends.base import Parity, Runner, bind_arguments, check_parity, forward_signature
from fxprune.backends.dynamic import other_sizes, resized, sizes
from fxprune.input_names import Dynamic

R = TypeVar("R", bound=Runner)


def into_file(path: Path | None, name: str, make: Callable[[Path], R]) -> R:
    """Return what `make` builds into `path`, or into a temporary file that lives as long as the runner."""
    file = path or Path(tempfile.mkdtemp(prefix="fxprune-")) / name
    try:
        runner = make(file)
    except BaseException:
        if path is None:
            shutil.rmtree(file.parent, ignore_errors=True)
        raise
    if path is None:
        # Weights kept beside a model stay mapped from the file for as long as it is open.
        weakref.finalize(runner, shutil.rmtree, file.parent, ignore_errors=True)
    runner.path = path
    return runner


def parity_at_sizes(
    name: str,
    module: nn.Module,
    runner: Runner,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Dynamic,
    tolerance: float,
    *,
    placed: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: arguments,
    other: Callable[[Mapping[str, int]], dict[str, int]] = other_sizes,
) -> Parity:
    """Compare a runner with its module on the example, and at another size of every dimension that may change.

    Args:
        placed: moves arguments to where the module is.
        other: the sizes of the example -> other ones.

    Raises BackendError where the relative difference is above the tolerance.
    """
    signature = forward_signature(module)
    trials = [(args, dict(kwargs))]
    if dynamic:
        wanted = other(sizes(signature, args, kwargs, dynamic))
        trials.append(resized(signature, args, kwargs, dynamic, wanted))
    found = []
    for trial in trials:
        outputs = runner.run(*trial[0], **trial[1])
        found.append(check_parity(name, module, placed(bind_arguments(signature, *trial)), outputs, tolerance))
    return Parity(max(parity.max_abs for parity in found), max(parity.max_rel for parity in found))
