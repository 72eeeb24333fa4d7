"""`python -m bench.patterns [TASK ...]`: what 2:4 loses by each way to choose masks, and what orders of channels win.

Three tables. Orders: on random matrices, how much of the gap between plain 2:4 and unstructured 50 % the best order
found closes, and in what time. Layers: for every layer of a task's model, the error of its results on calibration data
by each method, as it is published and refitted. Models: what is left of the task's score, and with other tools' masks,
which each puts on the layers that it takes: the share of zeros says how many those are. The row SparseGPT is the
published algorithm, which llm-compressor runs, too. What cannot run is a row with its reason.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import fxprune
from bench import document, machine
from bench.peers import modelopt, onnxsim
from bench.tasks import TASKS
from bench.tasks.task import Inputs
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.groups import find_groups
from fxprune.kept import Kept
from fxprune.passes import gather
from fxprune.passes.calibration import calibration
from fxprune.passes.patterns import METHODS, Weight, pattern
from fxprune.passes.patterns.permute import permutation
from fxprune.passes.patterns.sparsify import eligible
from fxprune.passes.patterns.support import refit
from fxprune.passes.statistics import Statistics
from fxprune.recipe import read_recipe

RESULTS = Path(__file__).parent / "results"
PATTERN = "2:4"
#: Tasks whose layers are looked at one by one, and those whose score is.
LAYERS = ("minilm_similarity",)
SCORES = ("stdlib_gpt", "minilm_similarity", "minilm_modules", "digits_vit", "digits_resnet")
#: Rows x columns of random matrices; the first is the one that Pool and Yu's efficacy, 35.5 %, is given for.
SHAPES = ((64, 128), (512, 512), (768, 3072))
SAMPLES = {"minilm_similarity": 512, "minilm_modules": 512, "digits_resnet": 512, "digits_vit": 512, "stdlib_gpt": 128}
#: What is compared as a whole: the recipe's `sparsity`.
WHOLE: dict[str, dict[str, Any]] = {
    "magnitude (ASP)": {"method": "asp", "permute": False},
    "ASP, ordered": {"method": "asp"},
    "Wanda": {"method": "wanda", "refit": False, "permute": False},
    "Wanda, refitted": {"method": "wanda", "permute": False},
    "SparseGPT": {"method": "sparsegpt", "refit": False, "permute": False},
    "ADMM": {"method": "admm", "permute": False},
    "ALPS": {"method": "alps", "permute": False},
    "ALPS, ordered (default)": {"method": "alps"},
}
#: What stands under the tables of scores.
SPARSEGPT = "SparseGPT: the published algorithm, which llm-compressor's SparseGPTModifier runs, too"
Peer = Callable[[nn.Module, Inputs, list[Inputs], Path], nn.Module]
#: Other tools' masks: row -> what the tool makes of a model, given its example, data and a folder for files.
PEERS: dict[str, Peer] = {
    "ModelOpt magnitude": lambda model, _, data, __: modelopt.sparsify(model, "sparse_magnitude", data),
    "ModelOpt SparseGPT": lambda model, _, data, __: modelopt.sparsify(model, "sparsegpt", data),
    "onnxsim Wanda": lambda model, x, data, to: onnxsim.prune(model, x, 0.5, "2:4 wanda", data, to, 1),
    "onnxsim SparseGPT": lambda model, x, data, to: onnxsim.prune(model, x, 0.5, "2:4 sparsegpt", data, to, 1),
}


def orders(seeds: int = 5, largest: float = float("inf")) -> list[dict[str, Any]]:
    """Return for each shape the shares of the gap that orders close, and the seconds it took, over several seeds.

    Shapes with more elements than `largest` are left out.
    """
    rows = []
    for high, wide in (shape for shape in SHAPES if shape[0] * shape[1] <= largest):
        for escapes in (0, 10) if high * wide < 1e5 else (0,):
            found, seconds = [], []
            for seed in range(seeds if high * wide < 1e5 else 1):
                scores = torch.randn(high, wide, generator=torch.Generator().manual_seed(seed)).abs()
                start = time.perf_counter()
                found.append(permutation(scores, 2, 4, escapes=escapes).efficacy)
                seconds.append(time.perf_counter() - start)
            rows.append(
                {
                    "rows": high,
                    "columns": wide,
                    "escapes": escapes,
                    "efficacy": statistics.median(found),
                    "least": min(found),
                    "seconds": statistics.median(seconds),
                    "matrices": len(found),
                }
            )
    return rows


def layers(name: str, samples: int, say: Callable[[str], None]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return weight -> method -> the relative error of the layer's results, as published and refitted.

    The error is the root of the squared error over the results' energy, on the dense model's own inputs.
    """
    task = TASKS[name]
    model, example = task.model(), task.example
    analysis = analyse(capture(model, example, {}, task.dynamic))
    groups = find_groups(analysis)
    shape = pattern(PATTERN)
    recipe = read_recipe({"sparsity": PATTERN})
    chosen, _ = eligible(analysis, groups, Kept({}), recipe, shape)
    data = calibration([inputs for inputs, _ in task.calibration(samples)], analysis.captured)
    known = Statistics(analysis, 0, data, 8 * 2**30)
    moments = gather.collect(known, data, chosen, [], {"moments"}).moments
    result: dict[str, dict[str, tuple[float, float]]] = {}
    for number, c in enumerate(chosen):
        say(f"{name}: layer {number + 1} of {len(chosen)}, {c.weight}")
        matrix = c.matrix(known.weight(c.weight), 1)[0].double()
        free = int(c.bias is not None)
        if c.bias is not None:
            matrix = torch.cat([matrix, known.weight(c.bias).double().unsqueeze(1)], 1)
        weight = Weight(matrix, moments[c][0], shape, free)
        result[c.weight] = {}
        for method in METHODS:
            if method == "asp":
                continue  # the same mask as magnitude
            found, mask = METHODS[method].choose(weight)
            result[c.weight][method] = (weight.error(found) ** 0.5, weight.error(refit(weight, mask)) ** 0.5)
    return result


def scores(
    name: str, methods: dict[str, dict[str, Any]], peers: list[str], samples: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the dense model's figures and those of each method, `failed` where a tool has none."""
    task = TASKS[name]
    model, example = task.model(), task.example
    data = [inputs for inputs, _ in task.calibration(samples)]
    rows: dict[str, Any] = {}
    for label, sparsity in methods.items():
        say(f"{name}: {label}")
        start = time.perf_counter()
        recipe = {"sparsity": {"pattern": PATTERN, **sparsity}, "reconstruction": "none", "proof": "quick"}
        if label.startswith("ALPS, ordered"):
            recipe = {"sparsity": {"pattern": PATTERN, **sparsity}, "proof": "quick"}
        pruned = fxprune.compile(model, example, recipe, calibration=data, dynamic_shapes=task.dynamic)
        rows[label] = {"measures": task.measures(pruned.module), "seconds": time.perf_counter() - start}
        step = pruned.report.steps[0]
        rows[label] |= {"error": step.error[1] if step.error else None, "zeros": zeros(pruned.module)}
    for label in peers:
        say(f"{name}: {label}")
        reason = modelopt.missing() if label.startswith("ModelOpt") else onnxsim.missing()
        if reason is not None:
            rows[label] = {"failed": reason}
            continue
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                sparse = PEERS[label](model, example, data, Path(folder))
                seconds = time.perf_counter() - start
                rows[label] = {"measures": task.measures(sparse), "seconds": seconds, "zeros": zeros(sparse)}
        except Exception as error:  # whatever it raises is the result
            rows[label] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return {"dense": task.measures(model), "methods": rows, "samples": samples, "unit": task.unit}


def zeros(model: nn.Module) -> float:
    """Return the share of a model's weights that are zero.

    >>> net = nn.Linear(4, 4, bias=False)
    >>> net.weight.data[:, ::2] = 0
    >>> zeros(net)
    0.5
    """
    if isinstance(model, onnxsim.File):
        return model.zeros / model.size
    sizes = [(int((p == 0).sum()), p.numel()) for p in model.parameters()]
    return sum(zero for zero, _ in sizes) / sum(size for _, size in sizes)


# ---------------------------------------------------------------------- tables
def order_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of orders."""
    table = Table(title="share of the gap between 2:4 and unstructured 50 % that an order of the columns closes")
    for column in ("matrix", "escapes", "median", "least", "seconds", "matrices"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            f"{r['rows']} x {r['columns']}",
            str(r["escapes"]),
            f"{r['efficacy']:.1%}",
            f"{r['least']:.1%}",
            f"{r['seconds']:.2f}",
            str(r["matrices"]),
        )
    return table


def layer_table(name: str, found: dict[str, dict[str, tuple[float, float]]]) -> Table:
    """Return the medians over layers, and in how many layers each method beats magnitude and Wanda as published."""
    table = Table(title=f"{name}: relative error of a layer's results in {PATTERN}, {len(found)} layers")
    for column in ("method", "median", "largest", "median, refitted", "better than magnitude", "better than Wanda"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in next(iter(found.values())):
        plain = [row[method][0] for row in found.values()]
        wins = Counter(
            other for row in found.values() for other in ("magnitude", "wanda") if row[method][0] < row[other][0]
        )
        table.add_row(
            method,
            f"{statistics.median(plain):.3f}",
            f"{max(plain):.3f}",
            f"{statistics.median(row[method][1] for row in found.values()):.3f}",
            *(f"{wins[other]} of {len(found)}" for other in ("magnitude", "wanda")),
        )
    return table


def score_table(name: str, found: dict[str, Any]) -> Table:
    """Return the scores of a task."""
    keys = list(found["dense"])
    title = f"{name} in {PATTERN}: {found['unit']}; {found['samples']} samples, no training"
    table = Table(title=title, caption=SPARSEGPT)
    for column in ("method", *keys, "error of the outputs", "zeros", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_row("dense", *(f"{found['dense'][k]:.4f}" for k in keys), "", "", "")
    for label, row in found["methods"].items():
        if "failed" in row:
            table.add_row(label, row["failed"])
            continue
        error = "-" if row.get("error") is None else f"{row['error']:.3f}"
        measures = (f"{row['measures'][k]:.4f}" for k in keys)
        table.add_row(label, *measures, error, f"{row['zeros']:.0%}", f"{row['seconds']:.0f}")
    return table


def main(
    names: Annotated[list[str] | None, typer.Argument(help="tasks; by default those of LAYERS and SCORES")] = None,
    method: Annotated[list[str] | None, typer.Option(help="rows of scores; all where there is none")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="that masks are chosen on")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="random matrices of each small shape")] = 5,
    largest: Annotated[float, typer.Option(help="elements of the largest random matrix")] = float("inf"),
    threads: Annotated[int, typer.Option(min=1)] = 2,
    resume: Annotated[bool, typer.Option(help="leave out what the file has")] = False,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "patterns.json",
) -> None:
    """Compare ways to choose 2:4 masks, layer by layer and by what is left of real tasks."""
    console = Console()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    known = [*WHOLE, *PEERS]
    unknown = [m for m in method or () if m not in known] + [n for n in names or () if n not in TASKS]
    if unknown:
        raise typer.BadParameter(f"there is no {unknown[0]!r}: methods {known}, tasks {list(TASKS)}")
    whole = {label: recipe for label, recipe in WHOLE.items() if not method or label in method}
    peers = [label for label in PEERS if not method or label in method]
    about: dict[str, Any] = json.loads(file.read_text()) if resume and file.exists() else {}
    about |= {"machine": machine.describe(), "threads": threads, "pattern": PATTERN}

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    if "orders" not in about:
        about["orders"] = orders(seeds, largest)
        document.write(file, about)
    console.print(order_table(about["orders"]))
    for name in [n for n in LAYERS if not names or n in names]:
        if name not in about.setdefault("layers", {}):
            about["layers"][name] = layers(name, samples or SAMPLES[name], say)
            document.write(file, about)
        console.print(layer_table(name, about["layers"][name]))
    for name in names or SCORES:
        found = about.setdefault("scores", {}).setdefault(name, {"methods": {}})
        left = {label: recipe for label, recipe in whole.items() if label not in found["methods"]}
        others = [label for label in peers if label not in found["methods"]]
        if left or others:
            measured = scores(name, left, others, samples or SAMPLES[name], say)
            about["scores"][name] = measured | {"methods": found["methods"] | measured["methods"]}
            document.write(file, about)
        console.print(score_table(name, about["scores"][name]))
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
