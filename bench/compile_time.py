"""Compile time beside Torch-Pruning, on the same models in the same run: `python -m bench.compile_time`.

Both prune to half by magnitude. fxprune's time is the whole of `compile`, with the proof at its cheapest setting;
Torch-Pruning's is its dependency graph and one pruning step (it checks no output). The two take turns; the first turn
is thrown away, medians are printed. Memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import fxprune
from bench import machine
from bench.models import MODELS, TIMED
from bench.peers import torch_pruning

#: The stages that a report times.
STAGES = ("capture", "analyse", "choose", "rewrite", "prove")


def compile_once(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Return the seconds of one compilation by stage, and of all of it."""
    start = time.perf_counter()
    pruned = fxprune.compile(model, inputs, target={"macs": 0.5}, proof="quick")
    return {**pruned.report.seconds, "total": time.perf_counter() - start, "macs": pruned.report.macs.ratio}


def peer_once(model: nn.Module, inputs: Any) -> float | None:
    """Return Torch-Pruning's seconds, or None where it fails."""
    try:
        return torch_pruning.prune(model, inputs, 0.5, limit=120.0).seconds
    except Exception:  # whatever it fails with is not ours to judge: the table says that it failed
        return None


def time_model(name: str, repeats: int) -> dict[str, Any]:
    """Return medians for one model."""
    model = MODELS[name].make(full=True)
    inputs = MODELS[name].example(batch=1, full=True)
    ours: list[dict[str, float]] = []
    theirs: list[float | None] = []
    for _ in track(range(repeats + 1), name, console=Console(stderr=True), transient=True):
        ours.append(compile_once(model, inputs))
        theirs.append(peer_once(model, inputs))
    seconds = {key: statistics.median(run[key] for run in ours[1:]) for key in (*STAGES, "total")}
    peer = [t for t in theirs[1:] if t is not None]
    return {
        "model": name,
        "fxprune": seconds,
        "macs_ratio": ours[0]["macs"],
        "torch_pruning": statistics.median(peer) if peer else None,
        "ratio": seconds["total"] / statistics.median(peer) if peer else None,
        "extra_memory": extra_memory(name),
    }


def extra_memory(name: str) -> float | None:
    """Return the peak of extra memory during a compilation, in units of the weights' size; None without /proc."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-W", "ignore", "-m", "bench.compile_time", "--memory", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_memory(name: str) -> float:
    """Compile once in this process and return (peak - resident before) / bytes of the weights.

    A compilation of another, tiny model comes first, so that code and thread pools are not counted.
    """
    small = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    fxprune.compile(small, torch.randn(1, 3, 16, 16), target={"macs": 0.5}, proof="quick")
    model = MODELS[name].make(full=True)
    inputs = MODELS[name].example(batch=1, full=True)
    with torch.no_grad():
        model(*inputs)  # activations of one forward pass are the model's own need
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before = _kilobytes("VmRSS")
    pruned = fxprune.compile(model, inputs, target={"macs": 0.5}, proof="quick")
    del pruned
    return (_kilobytes("VmHWM") - before) * 1024 / weights


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the results as a table; times are medians in seconds."""
    result = Table(title="Seconds to prune to half by magnitude", title_justify="left", caption=machine.stamp())
    result.add_column("model")
    for column in ("analysis", "capture", "choose", "rewrite", "prove", "fxprune", "Torch-Pruning", "ratio", "memory"):
        result.add_column(column, justify="right")
    for row in rows:
        times = row["fxprune"]
        result.add_row(
            row["model"],
            f"{times['analyse']:.3f}",
            *(f"{times[stage]:.2f}" for stage in ("capture", "choose", "rewrite", "prove", "total")),
            f"{row['torch_pruning']:.2f}" if row["torch_pruning"] else "fails",
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            f"{row['extra_memory']:.2f} x" if row["extra_memory"] is not None else "",
        )
    return result


def main() -> None:
    """Run the benchmark, print its table, write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(TIMED), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("bench/results/compile_time.json"))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(measure_memory(options.memory))
        return
    rows = [time_model(name, options.repeats) for name in options.models]
    Console(width=120).print(table(rows))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
