"""What the command line calls TASK: a model with the data and the loss that it is trained on, and its score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, Protocol

from torch import Tensor, nn

from fxprune import named
from fxprune.errors import InputError
from fxprune.registry import nearest

#: The entry points of packages that bring tasks.
GROUP = "fxprune.tasks"
#: Where a name alone is looked up besides: in the folder that the command is run in.
TABLE = "bench.tasks:TASKS"
FORMS = ("a name of an entry point fxprune.tasks or in bench.tasks", "FILE.py:NAME or MODULE:NAME")


class Task(Protocol):
    """What can be trained by its name.

    Attributes:
        example: the inputs that a model is captured and timed with: a tuple of positional ones.
        dynamic: which sizes differ from batch to batch, as `fxprune.compile` takes it; None: the batch alone.
    """

    @property
    def example(self) -> Any:
        """The example inputs."""

    @property
    def dynamic(self) -> Mapping[str, Mapping[int, Any]] | None:
        """What is dynamic."""

    def model(self) -> nn.Module:
        """Return the model that is pruned."""

    def training(self, batch: int, number: int, seed: int = 0) -> Iterable[Any]:
        """Return the batches of an epoch, (inputs, labels) each, in an order of its own."""

    def loss(self, output: Any, labels: Any) -> Tensor:
        """Return what is minimised."""

    def score(self, model: nn.Module) -> float:
        """Return how good a model is on data that it was not trained on; higher is better."""

    def calibration(self, samples: int, seed: int = 0) -> Iterable[Any]:
        """Return batches that numbers in 8 bits are calibrated on."""


def task(text: str, seed: int = 0) -> Task:
    """Return the task that a text names.

    Raises:
        InputError: there is none, it cannot be imported, or it is no task.
    """
    found = _named(text, seed)
    missing = [name for name in ("model", "example", "training", "loss", "score") if not hasattr(found, name)]
    if missing and callable(found):
        found = named.call(text, found)
        missing = [name for name in ("model", "example", "training", "loss", "score") if not hasattr(found, name)]
    if missing:
        raise InputError(
            f"'{text}' is of type {type(found).__name__}, which has no {', '.join(missing)}: a task has those, see "
            "fxprune.training.task.Task"
        )
    result: Task = found
    return result


def _named(text: str, seed: int) -> Any:
    if named.is_name(text):
        return named.load(text, "a task", seed)
    points = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if text in points:
        return named.call(f"{points[text].value}:{text}", points[text].load)
    try:
        table = named.load(TABLE, "a table of tasks", seed)
    except InputError as error:
        if "there is no module" not in str(error):
            raise
        table = {}
    if text in table:
        return table[text]
    known = [*points, *table]
    told = f" Known: {', '.join(known)}" if known else f" Known here: none; write {FORMS[1]}"
    raise InputError(f"there is no task '{text}'{nearest(text, known) or '.'}{told}")
