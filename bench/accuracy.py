"""`python -m bench.accuracy [TASK ...]`: what accuracy is left at which measured speed, without any training.

Each task of `bench.tasks` is pruned to each speed-up by fxprune and by Torch-Pruning, whose ratio is searched until its
model is as fast on the clock. All models of a task and a speed-up are then timed in turns with the dense one in a
single run, and scored on held-out data. The JSON file is written after each speed-up; `--resume` goes on from it.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxprune
from bench import machine
from bench.peers import torch_pruning
from bench.tasks import TASKS
from bench.tasks.task import Inputs, Labelled, Task
from fxprune.backends import BACKENDS
from fxprune.backends.base import Runner
from fxprune.backends.timing import compare
from fxprune.errors import FxpruneError

BACKEND = "onnxruntime"
SPEEDUPS = (1.5, 2.0, 3.0)
#: Samples that models are pruned with: about as many tokens or pixels of each.
SAMPLES = {
    "digits_resnet": 512,
    "digits_vit": 512,
    "minilm_similarity": 2048,
    "minilm_modules": 2048,
    "stdlib_gpt": 256,
}
RESULTS = Path(__file__).parent / "results"
#: What fxprune's methods add to the recipe; the first is what it does where nothing is said.
OWN: dict[str, dict[str, Any]] = {
    "fxprune": {},
    "fxprune, tuned": {"reconstruction": {"name": "least_squares", "tune": 3}},
    "fxprune, not reconstructed": {"reconstruction": "none"},
    "fxprune magnitude": {"criterion": "magnitude", "allocation": "uniform", "reconstruction": "none"},
}
#: Torch-Pruning's importances; widths are rounded as fxprune rounds them, which helps it on this backend.
PEERS: dict[str, torch_pruning.Importance] = {
    "Torch-Pruning magnitude": "magnitude",
    "Torch-Pruning Taylor": "taylor",
    "Torch-Pruning Hessian": "hessian",
}
_ROUND = 8
#: Builds that the search for Torch-Pruning's ratio takes at most.
_TRIES = 6
#: A speed-up is met when the clock says at most this much else.
_NEAR = 0.03
#: The per-sample gradients of the Hessian are taken of so many samples.
_HESSIAN = 128


@dataclass
class Place:
    """A task's dense model, ready to be pruned and timed."""

    name: str
    task: Task
    threads: int
    samples: int

    def __post_init__(self) -> None:
        self.model = self.task.model()
        self.example: Inputs = self.task.example
        self.data: list[Labelled] = self.task.calibration(self.samples)
        self.dense = self.build(self.model)

    def build(self, module: nn.Module) -> Runner:
        """Build a model on the backend."""
        dynamic = self.task.dynamic or True
        return BACKENDS[BACKEND].build(module, self.example, threads=self.threads, dynamic=dynamic)

    def speed(self, runner: Runner, rounds: int = 15) -> float:
        """Return how many times faster than the dense model a built one is."""
        timed = self.timed({"it": runner}, rounds)
        return timed["it"]["speedup"]

    def timed(self, runners: dict[str, Runner], rounds: int) -> dict[str, dict[str, float]]:
        """Return the medians of the speed-ups and latencies of models timed in turns with the dense one."""
        calls = {n: lambda r=r: r.run(*self.example) for n, r in {"dense": self.dense, **runners}.items()}
        timed = compare(calls, reference="dense", repeats=rounds, warmup=2, min_time=0.02)
        result = {}
        for name in runners:
            ratio = timed.ratio(name)
            result[name] = {
                "speedup": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "ms": timed.latencies[name].median * 1e3,
            }
        return result


# ---------------------------------------------------------------------- the two tools
def own(place: Place, method: str, speedup: float) -> tuple[nn.Module, dict[str, Any]]:
    """Prune with fxprune to a speed-up; with data but no loss."""
    recipe = {"target": {"speedup": speedup}, "threads": place.threads, "proof": "quick", **OWN[method]}
    data = None if method.endswith("magnitude") else [inputs for inputs, _ in place.data]
    start = time.perf_counter()
    pruned = fxprune.compile(
        place.model, place.example, recipe=recipe, calibration=data, dynamic_shapes=place.task.dynamic
    )
    clocked = pruned.report.clocked
    assert clocked is not None
    about = {
        "seconds": time.perf_counter() - start,
        "builds": len(clocked.attempts),
        "met": clocked.attempts[clocked.taken].measured,
        "predicted": clocked.attempts[0].predicted,
        "macs": pruned.report.macs.ratio,
    }
    return pruned.module, about


def peer(place: Place, importance: torch_pruning.Importance, ratio: float, heads: torch_pruning.Heads) -> nn.Module:
    """Prune with Torch-Pruning."""

    def losses(model: nn.Module) -> Iterator[Tensor]:
        if importance == "taylor":
            for inputs, labels in place.data:
                yield place.task.loss(model(*inputs), labels) / len(place.data)
            return
        seen = 0
        for inputs, labels in place.data:
            for i in range(len(inputs[0])):
                if seen == _HESSIAN:
                    return
                seen += 1
                yield _one(place.task, model, inputs, labels, i)

    return torch_pruning.prune(
        place.model,
        place.example,
        ratio,
        heads=heads,
        ignored=whole(place.model, place.example),
        round_to=_ROUND,
        importance=importance,
        losses=losses,
    ).model


def _one(task: Task, model: nn.Module, inputs: Inputs, labels: Tensor | None, i: int) -> Tensor:
    """The loss of one sample of a batch; of a contrastive one the cosine's to its own label among the batch's."""
    output = model(*(x[i : i + 1] for x in inputs))
    if labels is not None and labels.dtype.is_floating_point:
        others = torch.cat([labels[i : i + 1], labels[:i], labels[i + 1 :]])
        return task.loss(torch.cat([output, others[1:].to(output)]), others)
    return task.loss(output, None if labels is None else labels[i : i + 1])


def whole(model: nn.Module, example: Inputs) -> list[str]:
    """Return the layers whose results must keep their width: the classifier, or all that add to what comes out."""
    with torch.inference_mode():
        output = model(*example)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    last = [n for n in layers if n.endswith("head")]
    if last:
        return last
    return [n for n, m in layers.items() if m.out_features == output.shape[-1] and "output" in n]


def search(place: Place, speedup: float, heads: torch_pruning.Heads) -> float:
    """Return the ratio at which Torch-Pruning's model is as fast as asked for; widths are the same for all importances.

    Raises:
        ValueError: no ratio is.
    """
    low, high, best = 0.0, 0.97, (float("inf"), 0.0)
    ratio = 1 - 1 / speedup**0.75
    for _ in range(_TRIES):
        found = place.speed(place.build(peer(place, "magnitude", ratio, heads)))
        best = min(best, (abs(found / speedup - 1), ratio))
        if best[0] <= _NEAR / 2:
            break
        low, high = (ratio, high) if found < speedup else (low, ratio)
        ratio = (low + high) / 2
    if best[0] > 0.1:
        raise ValueError(f"no ratio gives {speedup:g} x: the nearest is {best[0]:.0%} away")
    return best[1]


# ---------------------------------------------------------------------- one task at one speed-up
def cell(place: Place, speedup: float, methods: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Return each method's figures."""
    rows: dict[str, Any] = {}
    modules: dict[str, nn.Module] = {}
    for method in (m for m in methods if m in OWN):
        say(f"{place.name} {speedup:g} x: {method}")
        try:
            modules[method], rows[method] = own(place, method, speedup)
        except FxpruneError as error:
            rows[method] = {"error": str(error).splitlines()[0]}
    peers = [m for m in methods if m in PEERS]
    kinds: tuple[torch_pruning.Heads, ...] = ("dims", "whole", "none") if _has_heads(place.model) else ("whole",)
    for heads in kinds if peers else ():
        if heads == "none" and any(m.startswith("Torch-Pruning") for m in modules):
            continue  # attention stays whole only where it can do nothing else
        say(f"{place.name} {speedup:g} x: Torch-Pruning's ratio, {heads}")
        suffix = f", {heads}" if len(kinds) > 1 else ""
        try:
            ratio = search(place, speedup, heads)
        except Exception as error:  # whatever it raises is the result
            rows |= {m + suffix: {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]} for m in peers}
            continue
        for method in peers:
            try:
                modules[method + suffix] = peer(place, PEERS[method], ratio, heads)
                rows[method + suffix] = {"ratio": ratio}
            except Exception as error:
                rows[method + suffix] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    say(f"{place.name} {speedup:g} x: timing and scoring {len(modules)} models")
    timed = place.timed({n: place.build(m) for n, m in modules.items()}, 31) if modules else {}
    for name, module in modules.items():
        rows[name] |= timed[name] | {"measures": place.task.measures(module)}
        rows[name]["params"] = sum(p.numel() for p in module.parameters())
    return rows


def _has_heads(model: nn.Module) -> bool:
    return any(True for _ in torch_pruning._attentions(model))


def lost(row: dict[str, Any], dense: float) -> float | None:
    """Return the score lost."""
    return None if "measures" not in row else dense - next(iter(row["measures"].values()))


def best_peer(rows: dict[str, Any], dense: float) -> tuple[str, float] | None:
    """Return Torch-Pruning's best criterion and the score that it loses."""
    found = [(loss, n) for n, row in rows.items() if n.startswith("Torch-Pruning") and (loss := lost(row, dense))]
    return (min(found)[1], min(found)[0]) if found else None


# ---------------------------------------------------------------------- tables and plots
def table(name: str, result: dict[str, Any]) -> Table:
    """Return a task's scores and speeds, a row a method."""
    dense = result["dense"]
    rows = Table(title=f"{name}: {TASKS[name].unit}, dense {dense:.4f}, {BACKEND}, no training")
    rows.add_column("method")
    speeds = list(result["speedups"])
    for speed in speeds:
        rows.add_column(f"at {speed} x", justify="right")
    names = dict.fromkeys(n for cells in result["speedups"].values() for n in cells)
    for method in names:
        texts = []
        for speed in speeds:
            row = result["speedups"][speed].get(method, {})
            loss = lost(row, dense)
            texts.append("-" if loss is None else f"{dense - loss:.4f} ({row['speedup']:.2f} x)")
        rows.add_row(method, *texts)
    ratios = []
    for speed in speeds:
        cells = result["speedups"][speed]
        other, mine = best_peer(cells, dense), lost(cells.get("fxprune", {}), dense)
        ratios.append(f"{mine / other[1]:.2f}" if other and mine is not None else "-")
    rows.add_section()
    rows.add_row("fxprune's loss over Torch-Pruning's least", *ratios)
    return rows


def plot(name: str, result: dict[str, Any], path: Path) -> None:
    """Draw scores over measured speed-ups, a line a method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    names = dict.fromkeys(n for cells in result["speedups"].values() for n in cells)
    colours = iter(pyplot.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    for method in names:
        rows = [cells[method] for cells in result["speedups"].values() if "measures" in cells.get(method, {})]
        points = sorted((row["speedup"], next(iter(row["measures"].values()))) for row in rows)
        if not points:
            continue
        ours = method.startswith("fxprune")
        axes.plot(
            *zip((1.0, result["dense"]), *points, strict=True),
            color=next(colours) if ours else "0.55",
            linestyle="-" if ours else {"m": "--", "T": ":", "H": "-."}[method.split()[1][0]],
            linewidth=2.2 if method == "fxprune" else 1.3,
            marker={"dims": "s", "none": "v"}.get(method.rpartition(", ")[2], "o"),
            markersize=4,
            label=method,
        )
    axes.set_xlabel(f"times faster than the dense model ({BACKEND}, measured)")
    axes.set_ylabel(TASKS[name].unit)
    axes.set_title(f"{name}, without training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="of the tasks; all where there is none")] = None,
    speedup: Annotated[list[float] | None, typer.Option(help="speed-ups; by default 1.5, 2 and 3")] = None,
    method: Annotated[list[str] | None, typer.Option(help="methods; all where there is none")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    samples: Annotated[int | None, typer.Option(min=1, help="that models are pruned with")] = None,
    resume: Annotated[bool, typer.Option(help="leave out what the file has")] = False,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "accuracy.json",
) -> None:
    """Prune each task to each measured speed-up by each method, and print what is left of its score."""
    console = Console()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    methods = method or [*OWN, *PEERS]
    unknown = [m for m in methods if m not in OWN and m not in PEERS] + [n for n in names or [] if n not in TASKS]
    if unknown:
        raise typer.BadParameter(f"there is no {unknown[0]!r}: methods {[*OWN, *PEERS]}, tasks {list(TASKS)}")
    document: dict[str, Any] = json.loads(file.read_text()) if resume and file.exists() else {"tasks": {}}
    document |= {"machine": machine.describe(), "threads": threads, "backend": BACKEND}
    for name in names or TASKS:
        place = Place(name, TASKS[name], threads, samples or SAMPLES[name])
        result = document["tasks"].setdefault(name, {"speedups": {}})
        result["samples"] = place.samples
        result["dense"] = TASKS[name].score(place.model)
        for wanted in speedup or SPEEDUPS:
            cells = result["speedups"].setdefault(f"{wanted:g}", {})
            known = {n.partition(",")[0] for n in cells if n not in OWN} | set(cells)
            missing = [m for m in methods if m not in known]
            if missing:
                cells |= cell(place, wanted, missing, lambda text: console.print(text, style="dim"))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(document, indent=1) + "\n")
        console.print(table(name, result))
        plot(name, result, file.parent / f"accuracy_{name}.svg")
    met = [
        row["met"] / float(speed) - 1
        for result in document["tasks"].values()
        for speed, cells in result["speedups"].items()
        for row in cells.values()
        if "met" in row
    ]
    if met:
        console.print(
            f"speed-ups against what was asked for: median {statistics.median(met):+.1%}, "
            f"furthest {max(met, key=abs):+.1%}",
            highlight=False,
        )
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
