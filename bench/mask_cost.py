"""`python -m bench.mask_cost`: what masks cost a training step of MiniLM, dense and masked in turns in one run.

A step is forward, backward and the optimizer's on a batch of the task `minilm_modules`. The first row is the dense
model, the others have a Pruner attached: between updates, which is nearly every step, and with an update in every step.
The last is what `finish` leaves when nothing has been removed: the cost of having been pruned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import fxprune
from bench import document, machine, training_tables
from bench.shims import shim_torchvision
from bench.tables import shown
from bench.tasks import minilm, modules
from fxprune.backends.timing import compare

RESULTS = Path(__file__).parent / "results"
#: Updates so far apart that none is timed.
NEVER = {"start": 10**6, "end": 10**6, "ramp": "linear"}
OFTEN = {"start": 0, "end": 10**6, "every": 1, "ramp": "linear"}
#: What is timed: the label and what the Pruner is told.
ROWS: dict[str, dict[str, Any]] = {
    "magnitude, single entries": {"pattern": "element", "target": 0.5, "schedule": NEVER},
    "magnitude, heads and MLPs": {"pattern": ("head", "ffn"), "target": 0.5, "schedule": NEVER},
    "SNIP with momentum, 4x1": {"method": "snip_momentum", "pattern": "4x1", "target": 0.5, "schedule": NEVER},
    "movement, hybrid blocks": {"method": "movement", "pattern": "hybrid", "target": 0.5, "schedule": NEVER},
    "L0, heads and MLPs": {"method": "l0", "pattern": ("head", "ffn"), "target": 0.5, "schedule": NEVER},
    "straight through, 2:4, chosen anew every step": {
        "method": "straight_through",
        "pattern": "2:4",
        "schedule": OFTEN | {"initial": 0.5},
    },
}


def step(model: nn.Module, inputs: tuple[Tensor, ...], labels: Tensor) -> tuple[Callable[[], None], Any]:
    """Return one training step as a function, and its optimizer."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-7, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run, optimizer


def main(
    rounds: Annotated[int, typer.Option(min=12)] = 15,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    tokens: Annotated[int, typer.Option(min=8)] = 64,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "mask_cost.json",
) -> None:
    """Time training steps with and without masks."""
    torch.set_num_threads(threads)
    shim_torchvision()
    console = Console()
    inputs = minilm.tokenize(minilm.sentences(batch), tokens)
    labels = torch.arange(batch) % modules.Settings().modules

    def pruner(model: nn.Module, told: dict[str, Any]) -> fxprune.Pruner:
        return fxprune.Pruner(model, inputs, told, dynamic_shapes=minilm.DYNAMIC)

    rows: dict[str, dict[str, Any]] = {}
    about = {"machine": machine.describe(), "threads": threads, "batch": batch, "tokens": tokens, "rounds": rounds}
    about["rows"] = rows
    for label, told in ROWS.items():
        dense, masked, finished = (modules.classifier() for _ in range(3))
        run, _ = step(dense, inputs, labels)
        run_masked, optimizer = step(masked, inputs, labels)
        pruner(masked, told).attach(optimizer)
        nothing = pruner(finished, {"pattern": ("head", "ffn"), "target": 0.001, "schedule": {"ramp": "oneshot"}})
        run_finished, _ = step(nothing.finish(proof="quick").module, inputs, labels)
        runs: dict[str, Callable[[], object]] = {"dense": run, "masked": run_masked, "finished": run_finished}
        start = time.perf_counter()
        found = compare(runs, reference="dense", repeats=rounds, min_time=0.0)
        masked_ratio, after = found.ratio("masked"), found.ratio("finished")
        rows[label] = {
            "milliseconds": {name: found.latencies[name].median * 1e3 for name in runs},
            "ratio": [1 / masked_ratio.median, 1 / masked_ratio.high, 1 / masked_ratio.low],
            "after": [1 / after.median, 1 / after.high, 1 / after.low],
        }
        console.print(f"{label}: {rows[label]['ratio'][0]:.3f} ({time.perf_counter() - start:.0f} s)", highlight=False)
        document.write(file, about)
    console.print(shown(training_tables.mask_cost({"mask_cost.json": about})))
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
