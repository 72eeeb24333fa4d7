"""`python -m bench.tasks [NAME ...]`: train what is not in the cache and print how good each dense model is."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.tasks import TASKS


def main(
    names: Annotated[list[str] | None, typer.Argument(help="of the tasks; all where there is none")] = None,
) -> None:
    """Print each task's parameters, score, baseline, the seconds to get and to score its model; then what they mean."""
    console = Console()
    table = Table()
    table.add_column("task")
    for column in ("parameters", "score", "baseline", "model, s", "score, s"):
        table.add_column(column, justify="right")
    meanings = []
    for name in names or TASKS:
        if name not in TASKS:
            raise typer.BadParameter(f"there is no task {name!r}: {', '.join(TASKS)}")
        task = TASKS[name]
        start = time.perf_counter()
        model = task.model()
        trained = time.perf_counter()
        figures = task.measures(model)
        scored = time.perf_counter()
        score, *others = figures.items()
        table.add_row(
            name,
            f"{sum(value.numel() for value in model.parameters()):,}",
            f"{score[1]:.4f}",
            "" if task.baseline is None else f"{task.baseline():.4f}",
            f"{trained - start:.1f}",
            f"{scored - trained:.1f}",
        )
        also = [f"{what} {value:.3f}" for what, value in others]
        meanings.append("; ".join([f"{name}: {task.better}", *also]))
    console.print(table)
    for line in meanings:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
