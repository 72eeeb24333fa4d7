"""`python -m bench.accuracy [TASK ...]`: what accuracy is left at which measured speed, without any training.

Each task of `bench.tasks` is pruned to each speed-up by fxprune and by other tools (Torch-Pruning, ModelOpt's FastNAS,
onnxsim), whose ratio is searched until their model is as fast on the clock. `torch.nn.utils.prune` only writes zeros:
it is given the share of channels that a model of so many MACs would lack. All models of a task and a speed-up are then
timed in turns with the dense one in a single run, and scored on held-out data. What cannot run is a row with its
reason. The JSON file is written after each speed-up; `--resume` goes on from it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
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
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from bench import document, machine
from bench.peers import modelopt, onnxsim, torch_masks, torch_pruning
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
#: Other tools, of one row each.
OTHERS = ("torch masks", "ModelOpt FastNAS", "onnxsim magnitude", "onnxsim Wanda")
METHODS = (*OWN, *PEERS, *OTHERS)
_ROUND = 8
#: Builds that the search for another tool's ratio takes at most.
_TRIES = 6
#: A speed-up is met when the clock says at most this much else.
_NEAR = 0.03
#: The per-sample gradients of the Hessian are taken of so many samples; FastNAS scores each of its candidates on them.
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
        """Build a model on the backend; a file is opened already."""
        if isinstance(module, onnxsim.File):
            return module.runner
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


def search(place: Place, speedup: float, make: Callable[[float], nn.Module]) -> tuple[float, nn.Module]:
    """Return the ratio at which a tool's model is as fast as asked for, and that model.

    Raises:
        ValueError: no ratio is.
    """
    low, high = 0.0, 0.97
    ratio = 1 - 1 / speedup**0.75
    away, best = float("inf"), (ratio, place.model)
    for _ in range(_TRIES):
        module = make(ratio)
        found = place.speed(place.build(module))
        if abs(found / speedup - 1) < away:
            away, best = abs(found / speedup - 1), (ratio, module)
        if away <= _NEAR / 2:
            break
        low, high = (ratio, high) if found < speedup else (low, ratio)
        ratio = (low + high) / 2
    if away > 0.1:
        raise ValueError(f"no ratio gives {speedup:g} x: the nearest is {away:.0%} away")
    return best


def other(place: Place, method: str, speedup: float, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Prune with one of OTHERS.

    Args:
        folder: for files, which are kept as long as what is returned is used.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how it would be.
        ValueError: no ratio makes it as fast.
        Exception: whatever else the tool raises.
    """
    if method == "torch masks":
        share = torch_masks.share(speedup)
        return torch_masks.prune(place.model, share, whole(place.model, place.example)), {"ratio": share}
    absent = modelopt.missing(search=True) if method.startswith("ModelOpt") else onnxsim.missing()
    if absent is not None:
        raise ModuleNotFoundError(absent)
    data = [inputs for inputs, _ in place.data]
    if method == "ModelOpt FastNAS":
        few = place.task.calibration(min(place.samples, _HESSIAN))
        kept = folder / "fastnas.pth"  # what each layer can spare, which every try reads

        def fewer(ratio: float) -> nn.Module:
            return modelopt.fastnas(place.model, place.example, 1 - ratio, score, data, _ROUND, kept)

        def score(model: nn.Module) -> float:
            with torch.inference_mode():
                return -sum(float(place.task.loss(model(*inputs), labels)) for inputs, labels in few)

        ratio, module = search(place, speedup, fewer)
        return module, {"ratio": ratio}
    way: onnxsim.Method = "wanda" if method.endswith("Wanda") else "magnitude"
    ratio, module = search(
        place,
        speedup,
        lambda share: onnxsim.prune(place.model, place.example, share, way, data, folder, place.threads),
    )
    return module, {"ratio": ratio}


# ---------------------------------------------------------------------- one task at one speed-up
def cell(place: Place, speedup: float, methods: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Return each method's figures, an `error` where it has none."""
    with tempfile.TemporaryDirectory() as folder:
        return _cell(place, speedup, methods, say, Path(folder))


def _cell(place: Place, speedup: float, methods: list[str], say: Callable[[str], None], folder: Path) -> dict[str, Any]:
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
            ratio, _ = search(place, speedup, lambda r, heads=heads: peer(place, "magnitude", r, heads))  # type: ignore[misc]
        except Exception as error:  # whatever it raises is the result
            rows |= {m + suffix: _failed(error) for m in peers}
            continue
        for method in peers:
            try:
                modules[method + suffix] = peer(place, PEERS[method], ratio, heads)
                rows[method + suffix] = {"ratio": ratio}
            except Exception as error:
                rows[method + suffix] = _failed(error)
    for method in (m for m in methods if m in OTHERS):
        say(f"{place.name} {speedup:g} x: {method}")
        try:
            modules[method], rows[method] = other(place, method, speedup, folder)
        except Exception as error:
            rows[method] = _failed(error)
    say(f"{place.name} {speedup:g} x: timing and scoring {len(modules)} models")
    timed = place.timed({n: place.build(m) for n, m in modules.items()}, 31) if modules else {}
    for name, module in modules.items():
        rows[name] |= timed[name] | {"measures": place.task.measures(module)}
        size = module.size if isinstance(module, onnxsim.File) else sum(p.numel() for p in module.parameters())
        rows[name]["params"] = size
        if not isinstance(module, onnxsim.File):
            rows[name].setdefault("macs", flops(module, place.example) / flops(place.model, place.example))
    return rows


def flops(module: nn.Module, example: Inputs) -> int:
    """Return the floating-point operations of matrix products, convolutions and attention.

    >>> flops(nn.Linear(4, 8), (torch.zeros(2, 4),))
    128
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*example)
    return int(counter.get_total_flops())


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _has_heads(model: nn.Module) -> bool:
    return any(True for _ in torch_pruning._attentions(model))


def lost(row: dict[str, Any], dense: float) -> float | None:
    """Return the score lost."""
    return None if "measures" not in row else dense - next(iter(row["measures"].values()))


def best_peer(rows: dict[str, Any], dense: float) -> tuple[str, float] | None:
    """Return the method of another tool, as fast as fxprune's, that loses least of the score, and how much it loses."""
    found = [(lost(row, dense), n) for n, row in rows.items() if n not in OWN and n != "torch masks"]
    best = min(((loss, n) for loss, n in found if loss is not None), default=None)
    return None if best is None else (best[1], best[0])


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
            missing = "fails" if "error" in row else "-"
            texts.append(missing if loss is None else f"{dense - loss:.4f} ({row['speedup']:.2f} x)")
        rows.add_row(method, *texts)
    ratios = []
    for speed in speeds:
        cells = result["speedups"][speed]
        least, mine = best_peer(cells, dense), lost(cells.get("fxprune", {}), dense)
        ratios.append(f"{mine / least[1]:.2f}" if least and least[1] > 0 and mine is not None else "-")
    rows.add_section()
    rows.add_row("fxprune's loss over other tools' least", *ratios)
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
            linestyle="-" if ours else {"m": "--", "T": ":", "H": "-."}.get(method.split()[1][0], (0, (1, 3))),
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
    methods = method or [*METHODS]
    unknown = [m for m in methods if m not in METHODS] + [n for n in names or [] if n not in TASKS]
    if unknown:
        raise typer.BadParameter(f"there is no {unknown[0]!r}: methods {[*METHODS]}, tasks {list(TASKS)}")
    about: dict[str, Any] = json.loads(file.read_text()) if resume and file.exists() else {"tasks": {}}
    about |= {"machine": machine.describe(), "threads": threads, "backend": BACKEND}
    for name in names or TASKS:
        place = Place(name, TASKS[name], threads, samples or SAMPLES[name])
        result = about["tasks"].setdefault(name, {"speedups": {}})
        result["samples"] = place.samples
        result["dense"] = TASKS[name].score(place.model)
        for wanted in speedup or SPEEDUPS:
            cells = result["speedups"].setdefault(f"{wanted:g}", {})
            known = {n.partition(",")[0] for n in cells if n not in OWN} | set(cells)
            missing = [m for m in methods if m not in known]
            if missing:
                cells |= cell(place, wanted, missing, lambda text: console.print(text, style="dim"))
            document.write(file, about)
        console.print(table(name, result))
        for speed, cells in result["speedups"].items():
            for failed, row in cells.items():
                if "error" in row:
                    console.print(f"{failed} at {speed} x: {row['error']}", markup=False, highlight=False)
        plot(name, result, file.parent / f"accuracy_{name}.svg")
    met = [
        row["met"] / float(speed) - 1
        for result in about["tasks"].values()
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
