"""What is written down at every update: for the terminal, as CSV, for TensorBoard."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

#: Steps between what is written down of updates that all take the same share.
_APART = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One update.

    Attributes:
        step: before which it was made.
        sparsity: share of the masked weights' entries that is zero.
        gone, target: share of the units (or of the cost) that is gone, and that is to be at the end.
        macs: share of the multiply-accumulates that stays, as far as widths, heads and layers go.
        loss: of the last step, where it is known.
        predicted: times as fast as the dense model by the times of its parts, where these have been measured.
        measured: times as fast as the dense model, where an update has timed the whole of it.
    """

    step: int
    sparsity: float
    gone: float
    target: float
    macs: float
    loss: float | None = None
    predicted: float | None = None
    measured: float | None = None

    def line(self) -> str:
        """Return the row in a sentence.

        >>> Row(20, 0.25, 0.3, 0.5, 0.8).line()
        'step 20: 30.0% of 50.0% gone, sparsity 25.0%, MACs 0.800'
        >>> Row(20, 0.25, 0.3, 0.5, 0.8, predicted=1.21, measured=1.18).line()
        'step 20: 30.0% of 50.0% gone, sparsity 25.0%, MACs 0.800, predicted 1.21 x, measured 1.18 x'
        """
        said = [
            f"step {self.step}: {self.gone:.1%} of {self.target:.1%} gone",
            f"sparsity {self.sparsity:.1%}",
            f"MACs {self.macs:.3f}",
        ]
        said += [] if self.predicted is None else [f"predicted {self.predicted:.2f} x"]
        said += [] if self.measured is None else [f"measured {self.measured:.2f} x"]
        said += [] if self.loss is None else [f"loss {self.loss:.4g}"]
        return ", ".join(said)


class Log:
    """Rows, and the files that they go to.

    Args:
        folder: for `pruning.csv`, and TensorBoard's event file where tensorboard is installed; None for neither.
    """

    def __init__(self, folder: Path | None) -> None:
        self.rows: list[Row] = []
        self._folder = folder
        self._board: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder))
            except ImportError:
                pass  # the CSV has the same

    def due(self, step: int, gone: float) -> bool:
        """Return whether an update is worth a row: of those in every step that take no other share one in ten is."""
        last = self.rows[-1] if self.rows else None
        return last is None or gone != last.gone or step - last.step >= _APART

    def add(self, row: Row) -> None:
        """Write a row down."""
        self.rows.append(row)
        if self._folder is None:
            return
        path = self._folder / "pruning.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            if new:
                writer.writeheader()
            writer.writerow(asdict(row))
        if self._board is not None:
            for name, value in asdict(row).items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"pruning/{name}", value, row.step)

    def restore(self, rows: list[Row]) -> None:
        """Go on from the rows of a checkpoint: those that were written after it will be written again."""
        self.rows = list(rows)
        if self._folder is None:
            return
        with (self._folder / "pruning.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    def close(self) -> None:
        """Close files."""
        if self._board is not None:
            self._board.close()
