"""`python -m bench.coverage`: which models can be pruned and proved, what stays whole and why, and how long it takes.

Each model of `bench.zoo` has a process of its own, with a time limit, for each tool: a crash or a hang is a row of the
table. fxprune compiles it (`compile`, half of the multiply-accumulates, full proof) and writes it back into its class
(`Pruned.module_like`); Torch-Pruning prunes it as its own examples do (`bench.peers.torch_pruning`). Both have pruned
another small model before, so that neither imports nor first calls count. The JSON file is written after each model;
`--resume` goes on from it.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import fxprune
from bench import document, machine, zoo
from fxprune.analyse import Analysis, analyse
from fxprune.axes import atoms
from fxprune.capture import capture
from fxprune.errors import FxpruneError
from fxprune.groups import frozen_dimensions

SHARE = 0.5
#: The share of channels that Torch-Pruning removes: about what leaves half of the multiply-accumulates.
RATIO = 0.3
#: Models with more parameters than this count in the comparison of times.
LARGE = 5e6
#: Where the share that is left is at most this far below the target, the target is met closely.
NEAR = 0.02
#: How processes start: from one that has the libraries imported.
START = "forkserver"
RESULT = Path(__file__).parent / "results" / "coverage.json"


# ---------------------------------------------------------------------- one model, in a process of its own
def _free(analysis: Analysis) -> float:
    """The share of parameters, by elements, of which at least one dimension can be cut."""
    tensors = analysis.captured.tensors
    sizes = {n: t.numel() for n, t in tensors.items() if isinstance(t, nn.Parameter) and n in analysis.tensors}
    free = sum(size for n, size in sizes.items() if any(True for d in analysis.tensors[n] for _ in atoms(d)))
    return free / max(sum(sizes.values()), 1)


def _first_line(error: BaseException) -> str:
    """What an error says first, files of installed packages without the place where this machine has them."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text.replace(f"{sysconfig.get_path('purelib')}/", "")[:300]


def run_fxprune(shelf: str, name: str, proof: str) -> dict[str, Any]:
    """Return what fxprune makes of a model."""
    fxprune.compile(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8), target={"macs": SHARE}
    )
    model, inputs = zoo.build(shelf, name)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    try:
        pruned = fxprune.compile(model, inputs, target={"macs": SHARE}, proof=proof)
    except FxpruneError as error:
        return row | {"error": _first_line(error), "total": time.perf_counter() - start}
    report = pruned.report
    row |= {
        "total": time.perf_counter() - start,
        "seconds": report.seconds,
        "macs": report.macs.pruned / report.macs.dense,
        "params": report.params.pruned / report.params.dense,
        "proof": report.proof.error,
        "unknown": report.unknown,
        "notes": report.notes,
    }
    analysis = analyse(capture(model, inputs, {}))
    whole = sorted(frozen_dimensions(analysis), key=lambda w: -analysis.captured.tensors[w.tensor].numel())
    row |= {"free": _free(analysis), "whole": [f"{w.tensor}.{w.dim} ({w.size}): {w.reason}" for w in whole[:3]]}
    start = time.perf_counter()
    try:
        pruned.module_like()
        row["like"] = {"seconds": time.perf_counter() - start}
    except FxpruneError as error:
        row["like"] = {"error": _first_line(error)}
    return row


def run_kept_class(shelf: str, name: str, proof: str) -> dict[str, Any]:
    """Return whether a plan is found that the model's own class can express."""
    model, inputs = zoo.build(shelf, name)
    start = time.perf_counter()
    try:
        pruned = fxprune.compile(model, inputs, target={"macs": SHARE}, proof="quick", keep_class=True)
    except FxpruneError as error:
        return {"error": _first_line(error)}
    report = pruned.report
    return {"seconds": time.perf_counter() - start, "macs": report.macs.pruned / report.macs.dense}


def run_torch_pruning(shelf: str, name: str, proof: str) -> dict[str, Any]:
    """Return what Torch-Pruning makes of a model."""
    from bench.peers import torch_pruning

    torch_pruning.prune(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), (torch.randn(1, 3, 8, 8),), 0.5
    )
    model, inputs = zoo.build(shelf, name)
    try:
        result = torch_pruning.prune(model, inputs, RATIO)
    except Exception as error:  # whatever it raises is the result
        return {"error": _first_line(error)}
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    return {"total": result.seconds, "params": after / before, "smaller": after < before}


TOOLS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "fxprune": run_fxprune,
    "keep_class": run_kept_class,
    "torch_pruning": run_torch_pruning,
}


def _child(tool: str, shelf: str, name: str, proof: str, threads: int, answers: Any) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    try:
        answers.put(TOOLS[tool](shelf, name, proof))
    except BaseException as error:  # a row, not an end
        answers.put({"error": f"crash: {_first_line(error)}"})


def measure(tool: str, shelf: str, name: str, proof: str, limit: float, threads: int) -> dict[str, Any]:
    """Run one tool on one model in a process of its own and return its row; a timeout or a death is an error."""
    context: Any = multiprocessing.get_context(START)
    context.set_forkserver_preload(["bench.zoo.preload", "bench.coverage"])
    answers = context.Queue()
    process = context.Process(target=_child, args=(tool, shelf, name, proof, threads, answers))
    process.start()
    end = time.monotonic() + limit
    try:
        while True:
            try:
                row: dict[str, Any] = answers.get(timeout=0.5)
                return row
            except queue.Empty:
                if time.monotonic() > end:
                    return {"error": f"no result in {limit:g} s"}
                if not process.is_alive() and answers.empty():
                    return {"error": f"the process died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------------- what the rows say
def unproved(row: dict[str, Any]) -> float:
    """Return the seconds of a compilation without its proof."""
    return float(row["total"] - row["seconds"]["prove"])


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all models: counts, shares and ratios of time."""
    ours = {k: r["fxprune"] for k, r in rows.items() if "fxprune" in r}
    done = {k: r for k, r in ours.items() if "error" not in r}
    peers = {k: rows[k]["torch_pruning"] for k in ours if "torch_pruning" in rows[k]}
    both = [k for k in done if k in peers and "error" not in peers[k] and done[k]["parameters"] > LARGE]
    ratios = {k: unproved(done[k]) / peers[k]["total"] for k in both}
    kept = {k: rows[k]["keep_class"] for k in ours if "keep_class" in rows[k]}
    slowest = max(done, key=lambda k: done[k]["total"], default=None)
    largest = max(ratios, key=lambda k: ratios[k], default=None)
    return {
        "models": len(ours),
        "proved": len(done),
        "reached": sum(r["macs"] <= SHARE for r in done.values()),
        "within_2_percent": sum(SHARE - NEAR <= r["macs"] <= SHARE for r in done.values()),
        "free": sum(r["free"] >= 0.95 for r in done.values()),
        "like": sum("seconds" in r["like"] for r in done.values()),
        "keep_class": [sum("error" not in r for r in kept.values()), len(kept)],
        "peer": [sum(r.get("smaller", False) for r in peers.values()), len(peers)],
        "ratio": [statistics.median(ratios.values()), len(ratios)] if ratios else None,
        "largest_ratio": [ratios[largest], largest] if largest else None,
        "slowest": [done[slowest]["total"], slowest] if slowest else None,
    }


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "model", "M params", "proved", "MACs", "free", "capture", "analyse", "rewrite", "prove", "all", "class"
    )
    table.add_column("Torch-Pruning")
    for key, row in rows.items():
        ours, peer = row.get("fxprune", {}), row.get("torch_pruning")
        name, size = key, f"{ours.get('parameters', 0) / 1e6:.1f}"
        said = "" if peer is None else peer.get("error", "")[:40] or f"{peer['total']:.2f} s"
        if "error" in ours:
            table.add_row(name, size, ours["error"], *[""] * 8, said)
            continue
        seconds = [f"{ours['seconds'][stage]:.2f}" for stage in ("capture", "analyse", "rewrite", "prove")]
        like = "yes" if "seconds" in ours["like"] else "no"
        if like == "no" and "error" not in row.get("keep_class", {"error": ""}):
            like = f"kept at {row['keep_class']['macs']:.2f}"
        cells = [f"{ours['proof']:.0e}", f"{ours['macs']:.3f}", f"{ours['free']:.3f}", *seconds, f"{ours['total']:.1f}"]
        table.add_row(name, size, *cells, like, said)
    return table


def _print(console: Console, rows: dict[str, dict[str, Any]]) -> None:
    console.print(_table(rows))
    for key, row in rows.items():
        ours = row.get("fxprune", {})
        for text in [*ours.get("whole", []), *(f"no rule: {op}" for op in ours.get("unknown", {}))]:
            if ours.get("free", 1) < 0.95:
                console.print(f"{key}: {text}", highlight=False)
    for shelf in dict.fromkeys(k.partition("/")[0] for k in rows):
        console.print(shelf, summary({k: r for k, r in rows.items() if k.startswith(f"{shelf}/")}))
    console.print("all", summary(rows))
    console.print(machine.stamp(), highlight=False)


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Globs of model names; all without any.")] = None,
    shelf: Annotated[list[str] | None, typer.Option(help="Shelves of the zoo.")] = None,
    peer: Annotated[bool, typer.Option(help="Torch-Pruning beside it.")] = True,
    peer_above: Annotated[float, typer.Option(help="Torch-Pruning only on models with more parameters.")] = 0,
    keep_class: Annotated[bool, typer.Option(help="Where the class cannot hold the plan, look for one it can.")] = True,
    proof: Annotated[str, typer.Option(help="full or quick")] = "full",
    limit: Annotated[float, typer.Option(help="Seconds for a model.")] = 150,
    peer_limit: Annotated[float, typer.Option(help="Seconds for Torch-Pruning on a model.")] = 75,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    output: Annotated[Path, typer.Option("--json", "--output", help="The JSON file.")] = RESULT,
    resume: Annotated[bool, typer.Option(help="Keep what the JSON file has.")] = False,
) -> None:
    """Prune and prove every model of the zoo, and print what became of it."""
    for unknown in set(shelf or ()) - set(zoo.SHELVES):
        raise typer.BadParameter(f"there is no shelf '{unknown}'; the shelves: {', '.join(zoo.SHELVES)}")
    if proof not in ("full", "quick"):
        raise typer.BadParameter(f"a proof is full or quick, not '{proof}'")
    wanted = zoo.names(models or (), shelf or zoo.SHELVES)
    if not wanted:
        raise typer.BadParameter(f"no model of {', '.join(shelf or zoo.SHELVES)} matches {models}")
    data: dict[str, Any] = json.loads(output.read_text()) if resume and output.exists() else {}
    rows: dict[str, dict[str, Any]] = data.setdefault("rows", {})
    data |= {"machine": machine.describe(), "threads": threads}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(wanted))
        for place, name in wanted:
            key = f"{place}/{name}"
            progress.update(task, advance=1, description=key)
            row = rows.setdefault(key, {})
            if "fxprune" not in row:
                row["fxprune"] = measure("fxprune", place, name, proof, limit, threads)
            ours = row["fxprune"]
            if keep_class and "error" in ours.get("like", {}) and "keep_class" not in row:
                row["keep_class"] = measure("keep_class", place, name, proof, limit, threads)
            if peer and ours.get("parameters", 0) > peer_above and "torch_pruning" not in row:
                row["torch_pruning"] = measure("torch_pruning", place, name, proof, peer_limit, threads)
            data["summary"] = summary(rows)
            document.write(output, data)
    _print(Console(width=180), {f"{s}/{n}": rows[f"{s}/{n}"] for s, n in wanted})


if __name__ == "__main__":
    typer.run(main)
