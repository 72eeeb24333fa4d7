"""Dense and pruned, timed side by side in one run on the backend that will run the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.backends import chosen
from fxprune.backends.base import forward_signature
from fxprune.backends.timing import LEAST_REPEATS, compare
from fxprune.errors import InputError
from fxprune.input_names import Dynamic, input_names, renamed
from fxprune.report import Latency, Pair


def measure(
    dense: nn.Module,
    pruned: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str | Mapping[str, Any],
    threads: int | None = None,
    rounds: int = 30,
    dynamic: bool | Dynamic = True,
) -> Latency:
    """Build both on the backend and time them alternately on the same inputs.

    `dynamic` is that of `Backend.build`, by the names of the pruned module's inputs; the dense model may have others.

    Raises:
        BackendError: the backend is missing, or one of the two cannot be built.
        InputError: too few rounds for an interval.
    """
    if rounds < LEAST_REPEATS:
        raise InputError(f"{rounds} rounds allow no 95 % interval; take {LEAST_REPEATS} or more")
    runs_on = chosen(backend)
    count = threads or torch.get_num_threads()
    others = dynamic
    if not isinstance(dynamic, bool):
        own, theirs = (input_names(forward_signature(module), args, kwargs) for module in (pruned, dense))
        others = renamed(dynamic, own, theirs)
    runners = {
        name: runs_on.build(module, args, kwargs, threads=count, dynamic=sizes)
        for name, module, sizes in (("dense", dense, others), ("pruned", pruned, dynamic))
    }
    comparison = compare(
        {name: runner.bind(*args, **kwargs) for name, runner in runners.items()},
        reference="dense",
        repeats=rounds,
    )
    before, after = comparison.latencies["dense"], comparison.latencies["pruned"]
    speedup = comparison.ratio("pruned")
    spread = [high - low for low, high in (before.quartiles, after.quartiles)]
    return Latency(
        backend=runs_on.key,
        threads=count,
        batch=batch_of(args, kwargs),
        milliseconds=Pair(before.median * 1e3, after.median * 1e3),
        iqr=Pair(spread[0] * 1e3, spread[1] * 1e3),
        speedup=speedup.median,
        interval=(speedup.low, speedup.high),
        rounds=rounds,
    )


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return dimension 0 of the first tensor among the arguments, 1 where there is none."""
    first = next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.dim()), None)
    return int(first.shape[0]) if first is not None else 1
