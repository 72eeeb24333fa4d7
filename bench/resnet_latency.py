"""What the multiple of widths does to the measured speed-up: `python -m bench.resnet_latency`.

ResNet-50 at half its MACs, uniform allocation, for several values of `round_to`; onnxruntime, dense and pruned
alternating in one run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import fxprune
from bench import machine
from bench.models import MODELS

MULTIPLES = (None, 1, 4, 8, 16, 32)


def measure(multiple: int | None, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """Return the MACs ratio and the measured latency for one multiple (None: the backend's own)."""
    model = MODELS["resnet50"].make(full=True)
    inputs = MODELS["resnet50"].example(batch=batch, full=True)
    pruned = fxprune.compile(model, inputs, target={"macs": 0.5}, round_to=multiple, proof="quick")
    latency = pruned.measure(threads=threads, rounds=rounds)
    return {
        "round_to": pruned.report.round_to,
        "default": multiple is None,
        "macs": pruned.report.macs.ratio,
        "latency": asdict(latency),
    }


def table(rows: list[dict[str, Any]], batch: int, threads: int) -> Table:
    """Return the results as a table."""
    title = f"ResNet-50 at half its MACs, onnxruntime, {threads} threads, batch {batch}, fp32"
    result = Table(title=title, title_justify="left", caption=machine.stamp())
    for column in ("round_to", "MACs saved", "dense ms", "pruned ms", "speed-up", "95 % interval", "speed-up / saving"):
        result.add_column(column, justify="right")
    for row in rows:
        latency = row["latency"]
        saving = 1 / row["macs"]
        result.add_row(
            f"{row['round_to']}{' (default)' if row['default'] else ''}",
            f"{saving:.2f} x",
            f"{latency['milliseconds']['dense']:.1f}",
            f"{latency['milliseconds']['pruned']:.1f}",
            f"{latency['speedup']:.2f} x",
            f"{latency['interval'][0]:.2f}-{latency['interval'][1]:.2f}",
            f"{latency['speedup'] / saving:.2f}",
        )
    return result


def main() -> None:
    """Run the benchmark, print its table, write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--multiples", type=int, nargs="*", help="instead of the default list")
    parser.add_argument("--json", type=Path, default=Path("bench/results/resnet_latency.json"))
    options = parser.parse_args()
    chosen = options.multiples or MULTIPLES
    rows = [
        measure(multiple, options.batch, options.threads, options.rounds)
        for multiple in track(chosen, "round_to", console=Console(stderr=True), transient=True)
    ]
    Console(width=120).print(table(rows, options.batch, options.threads))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
