"""A run as it is shown and written down: a bar on a terminal, a row of `training.csv` now and then."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: The file in the folder of logs.
FILE = "training.csv"


@dataclass(frozen=True, slots=True)
class State:
    """A run at one step.

    Attributes:
        step: of the whole run.
        stage: its number, from 1.
        kind: what the stage does.
        epoch: its number, from 0.
        loss: of the step's batch.
        rate: of the optimizer.
        sparsity: share of the masked weights' entries that is zero; None where none is masked.
        target: share of the units, or of the cost, that is to be gone at the end of the stage.
        macs: share of the multiply-accumulates of the stage's model that stays.
        predicted: times as fast as the stage's model by the times of its parts, where these have been measured.
        measured: times as fast as the stage's model, where the whole of it has been timed.
    """

    step: int
    stage: int
    kind: str
    epoch: int
    loss: float
    rate: float
    sparsity: float | None = None
    target: float | None = None
    macs: float | None = None
    predicted: float | None = None
    measured: float | None = None

    def line(self) -> str:
        """Return the state in a few words.

        >>> State(20, 1, "prune", 0, 0.5, 1e-3, 0.4, 0.8, 0.9).line()
        'stage 1, prune: loss 0.5, sparsity 40.0%, target 80.0%, MACs 0.900'
        """
        said = [f"stage {self.stage}, {self.kind}: loss {self.loss:.4g}"]
        if self.sparsity is not None:
            said.append(f"sparsity {self.sparsity:.1%}")
        if self.target is not None:
            said.append(f"target {self.target:.1%}")
        if self.macs is not None:
            said.append(f"MACs {self.macs:.3f}")
        if self.predicted is not None:
            said.append(f"predicted {self.predicted:.2f} x")
        if self.measured is not None:
            said.append(f"measured {self.measured:.2f} x")
        return ", ".join(said)


class Table:
    """`training.csv` in a folder.

    Args:
        folder: None writes nothing.
        step: rows of this step and later ones are dropped: a run that goes on writes them again.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._path = None if folder is None else folder / FILE
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        if step and self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        with self._path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(State)])
            writer.writeheader()
            writer.writerows(rows)

    def add(self, state: State) -> None:
        """Write a row down."""
        if self._path is not None:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, [f.name for f in fields(State)]).writerow(asdict(state))


class Bar:
    """A bar of the whole run's steps."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=steps)

    def show(self, state: State) -> None:
        """Show a state."""
        self._bar.update(self._task, completed=state.step + 1, description=state.line())


@contextmanager
def showing(steps: int, console: Console | None = None) -> Iterator[Bar]:
    """Show a bar on standard error where that is a terminal, and nothing elsewhere."""
    where = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=where, disable=not where.is_terminal, transient=True) as bar:
        yield Bar(bar, steps)
