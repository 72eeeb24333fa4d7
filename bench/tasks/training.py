"""How the tasks' models are trained: one loop, one schedule, one bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TimeRemainingColumn
from torch import Tensor, nn

Progress = Callable[[int, int, float], None]
"""Called after each step with the steps done, the steps in all and the loss of the step's batch."""


@contextmanager
def showing(console: Console, what: str) -> Iterator[Progress]:
    """Show a bar of the training steps on a terminal, and nothing elsewhere; yields what is called after each step."""
    columns = (*Bar.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True))
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, steps: int, loss: float) -> None:
            bar.update(task, completed=done, total=steps, description=f"{what}, loss {loss:.3f}")

        yield advance


def rate(done: int, steps: int) -> float:
    """Return the share of the full learning rate for the next step: up over a tenth of the steps, down a cosine to 0.

    >>> [round(rate(done, 20), 2) for done in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    warm = max(1, steps // 10)
    return min((done + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, done - warm) / max(1, steps - warm)))


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Sequence[Tensor], Tensor]],
    steps: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor | None], Tensor],
    progress: Progress | None = None,
) -> list[float]:
    """Train a model in place, one step a batch, and return each step's loss; gradients longer than 1 are cut to 1.

    `steps` is how many batches there are. The model's mode is left as it was.
    """
    full = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for done, (inputs, labels) in enumerate(batches):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * rate(done, steps)
        value = loss(model(*inputs), labels)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(value.detach()))
        if progress is not None:
            progress(done + 1, steps, losses[-1])
    return losses
