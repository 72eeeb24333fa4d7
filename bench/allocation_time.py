"""`python -m bench.allocation_time`: how long the exact allocations take, on made-up problems of a given size.

Two solvers: the multiple-choice knapsack (what a group costs depends on its own width only), and min-sum elimination
(layers cost the product of the widths that they join), for a row of layers and for residual stages. The gap is what a
solution loses more than a bound that nothing within the budget is below; costs are rounded up to parts of the budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import document, machine
from fxprune.passes.allocate.chain import BUCKETS, solve
from fxprune.passes.allocate.knapsack import BUCKETS as KNAPSACK_BUCKETS
from fxprune.passes.allocate.knapsack import cheapest
from fxprune.passes.allocate.problem import Floats, Problem, Scope, relax

RESULTS = Path(__file__).parent / "results"
#: Share of the dearest choice's cost that may be kept.
SHARE = 0.4


def falling(count: int, options: int, generator: np.random.Generator) -> list[Floats]:
    """Return losses that fall with the width, of groups that matter more or less."""
    return [np.sort(generator.random(options))[::-1] * generator.random() for _ in range(count)]


def products(scopes: list[Scope], count: int, options: int, generator: np.random.Generator) -> Problem:
    """Return a problem in which every pair costs the product of its widths, times a factor of its own."""
    widths = np.arange(1, options + 1) / options
    tables = {scope: np.outer(widths, widths) * generator.uniform(0.1, 1.0) for scope in scopes}
    budget = SHARE * sum(float(t.max()) for t in tables.values())
    return Problem(falling(count, options, generator), tables, budget)


def row(layers: int) -> tuple[list[Scope], int]:
    """Return the scopes of layers in a row, and how many groups they have."""
    return [(i, i + 1) for i in range(layers - 1)], layers


def stages(blocks: tuple[int, ...] = (3, 4, 6, 3)) -> tuple[list[Scope], int]:
    """Return the scopes of bottleneck blocks in residual stages, ResNet-50's by default, and how many groups there are.

    >>> stages((1,))
    ([(0, 1), (0, 2), (2, 3), (1, 3)], 4)
    """
    scopes: list[Scope] = []
    stream, count = 0, 1
    for number in blocks:
        before, stream, count = stream, count, count + 1
        scopes.append((before, stream))
        for block in range(number):
            a, b, count = count, count + 1, count + 2
            scopes += [(stream if block else before, a), (a, b), (stream, b)]
    return [(min(s), max(s)) for s in scopes], count


def timed(run: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Return the median seconds of a call, and its result."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def measure(rounds: int, small: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row of figures for each problem; what is drawn for one depends on those before it.

    Args:
        small: few groups and options, to see that everything works.
    """
    generator = np.random.default_rng(0)
    groups, options = (4, 4) if small else (200, 32)
    losses = falling(groups, options, generator)
    costs = [np.arange(1.0, options + 1) * float(generator.uniform(0.1, 1.0)) for _ in range(groups)]
    budget = SHARE * sum(float(c.max()) for c in costs)
    seconds, choice = timed(lambda: cheapest(losses, costs, budget), rounds)
    row_ = {"problem": "knapsack", "groups": groups, "options": options, "buckets": KNAPSACK_BUCKETS}
    used = sum(float(c[i]) for c, i in zip(costs, choice, strict=True)) / budget
    yield {**row_, "seconds": seconds, "used": used, "gap": None, "relaxed_gap": None, "relaxed_seconds": None}
    for name, (scopes, count), options in (
        ("row of layers", row(4 if small else 33), 4 if small else 32),
        ("residual stages", stages((1, 1) if small else (3, 4, 6, 3)), 4 if small else 16),
    ):
        problem = products(scopes, count, options, generator)
        seconds, found = timed(lambda p=problem: solve(p, BUCKETS), rounds)  # type: ignore[misc]
        choice, bound = found
        quick, relaxed = timed(lambda p=problem: relax(p, [0] * len(p.losses)), rounds)  # type: ignore[misc]
        yield {
            "problem": name,
            "groups": count,
            "options": options,
            "buckets": BUCKETS,
            "seconds": seconds,
            "used": problem.cost(choice) / problem.budget,
            "gap": problem.loss(choice) / bound - 1,
            "relaxed_gap": problem.loss(relaxed) / bound - 1,
            "relaxed_seconds": quick,
        }


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the figures as a rich table."""
    result = Table(title="exact allocation, one solution")
    for column in ("problem", "groups", "widths", "buckets", "s", "used", "gap", "relaxed s", "gap"):
        result.add_column(column, justify="left" if column == "problem" else "right")
    for r in rows:
        size = (str(r[key]) for key in ("groups", "options", "buckets"))
        exact = [f"{r['seconds']:.2f}", f"{r['used']:.2%}"]
        if r["gap"] is not None:
            exact += [f"{r['gap']:.2%}", f"{r['relaxed_seconds']:.2f}", f"{r['relaxed_gap']:.2%}"]
        result.add_row(r["problem"], *size, *exact)
    return result


def main(
    rounds: Annotated[int, typer.Option(min=1, help="of each problem; the median counts")] = 3,
    small: Annotated[bool, typer.Option(help="small problems, to see that everything works")] = False,
    resume: Annotated[bool, typer.Option(help="leave the file as it is where it has every problem")] = False,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "allocation_time.json",
) -> None:
    """Time the exact allocations on one thread."""
    console = Console()
    torch.set_num_threads(1)  # numpy is at work here; this is what the stamp says
    about = document.opened(file, resume, rounds=rounds)
    if not about.get("complete", False):
        about |= {"machine": machine.describe(), "complete": False, "problems": []}
        for found in measure(rounds, small):
            about["problems"].append(found)
            document.write(file, about)
        about["complete"] = True
        document.write(file, about)
    console.print(table(about["problems"]))
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
