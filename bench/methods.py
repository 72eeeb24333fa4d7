"""`python -m bench.methods [MODEL ...]`: every way to prune while training, on digits, before and after tuning.

Each run starts from the task's trained model and trains it for some epochs with a Pruner attached, whose schedule ends
at some share of them; the rest of the epochs is the tuning. Accuracy is on the held-out images: right after the last
update, and of the smaller model that `finish` returns at the end. Every seed draws other batches. `share` is what is
gone of what the pattern counts, `same` by how much the smaller model's outputs differ from the masked one's.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import fxprune
from bench import document, machine, training_tables
from bench.tables import shown
from bench.tasks import TASKS, digits, transformer
from fxprune.passes.training.units import AxisUnits, LayerUnits

RESULTS = Path(__file__).parent / "results"
MODELS = ("digits_resnet", "digits_vit")
#: Pattern and targets of each family, by model.
FAMILIES: dict[str, dict[str, tuple[Any, tuple[float, ...]]]] = {
    "entries": {"digits_resnet": ("element", (0.9, 0.97)), "digits_vit": ("element", (0.9, 0.95))},
    "blocks": dict.fromkeys(MODELS, ("4x1", (0.75,))),
    "rows": dict.fromkeys(MODELS, ("1xchannel", (0.5,))),
    "widths": {"digits_resnet": ("channel", (0.6, 0.85)), "digits_vit": (("head", "ffn"), (0.6, 0.75))},
    "2:4": dict.fromkeys(MODELS, ("2:4", (0.5,))),
    "layers": {"digits_resnet": ("layer", (0.5,)), "digits_vit": ("layer", (0.25,))},
    "hybrid": {"digits_vit": (("attention:16x16", "ffn"), (0.6,))},
}
#: Label -> the families that it is tried on, and what a stage is told besides.
ROWS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "random": (("entries", "widths", "2:4"), {"method": "random"}),
    "magnitude, one shot": (("entries", "widths", "2:4"), {"schedule": {"ramp": "oneshot"}}),
    "magnitude": (("entries", "blocks", "rows", "widths", "2:4", "layers"), {}),
    "magnitude, progressive": (("rows",), {"progressive": 3}),
    "magnitude, AC/DC": (("entries",), {"schedule": {"dense": 11, "sparse": 11}}),
    "magnitude, rewound": (("entries",), {"rewind": "start"}),
    "soft masks (SMCP)": (("widths", "2:4"), {"method": "soft_mask"}),
    "SNIP at the start": (("entries", "widths"), {"method": "snip", "schedule": {"ramp": "oneshot", "start": 1}}),
    "SNIP, momentum (code)": (("entries", "blocks", "widths"), {"method": "snip_momentum"}),
    "SNIP, momentum (document)": (("blocks",), {"method": {"name": "snip_momentum", "form": "document"}}),
    "gradient": (("blocks",), {"method": "gradient"}),
    "gradient sensitivity": (("widths", "layers"), {"method": "sensitivity"}),
    "group lasso": (("blocks", "widths"), {"method": "group_lasso"}),
    "network slimming": (("widths",), {"method": "slimming"}),
    "growing regularisation (GReg-1)": (("widths",), {"method": {"name": "growing_reg", "delta": 1e-2, "every": 1}}),
    "growing regularisation (GReg-2)": (
        ("widths",),
        {"method": {"name": "growing_reg", "delta": 1e-3, "every": 1, "select": "end"}},
    ),
    "Group-SL": (("widths",), {"method": "group_sl"}),
    "RigL": (("entries", "blocks"), {"method": "rigl"}),
    "movement": (("entries", "blocks", "widths", "hybrid"), {"method": {"name": "movement", "lr": 0.05}}),
    "movement, scores from magnitude": (
        ("entries", "blocks"),
        {"method": {"name": "movement", "lr": 0.002, "initial": "magnitude"}},
    ),
    "L0 (CoFi)": (("widths", "layers"), {"method": "l0"}),
    "learned masks (MaskLLM)": (("2:4",), {"method": {"name": "mask_learning", "lr": 0.05}}),
    "straight through": (("2:4",), {"method": {"name": "straight_through", "decay": 0.0}}),
    "straight through, decay (SR-STE)": (("2:4",), {"method": "straight_through"}),
}


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return what the task's model is trained on with: a fifth of the rate that it was trained with."""
    if name == "digits_vit":
        return transformer.optimizer(model, 2e-4, 0.05)
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)


def stage(pattern: Any, target: float, told: dict[str, Any], steps: int, until: float) -> dict[str, Any]:
    """Return what the Pruner is told."""
    end = round(until * steps)
    schedule = {"ramp": "cubic", "start": 0, "end": end, "every": max(1, end // 12)} | told.get("schedule", {})
    if schedule["ramp"] == "oneshot":
        schedule.pop("end")
    aim = {} if pattern == "2:4" else {"target": target}  # which says its share by itself
    return {"pattern": pattern, **aim, "round_to": 1, **told, "schedule": schedule}


def run(
    name: str, pattern: Any, target: float, told: dict[str, Any], seed: int, epochs: int, until: float
) -> dict[str, float]:
    """Prune the task's model in one run, and say what came of it."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = task.model()
    data = digits.digits()
    steps = epochs * -(-len(data.train_labels) // 64)
    trained_with = optimizer(name, model)
    given = stage(pattern, target, told, steps, until)
    pruner = fxprune.Pruner(model, task.example, given, steps=steps, seed=seed).attach(trained_with)
    before: list[float] = []

    def look(done: int, _steps: int, _loss: float) -> None:
        if not before and all(one.done for one in pruner.prunings):
            before.append(task.score(model))
            model.train()

    look(0, steps, 0.0)
    model.train()
    digits.train(model, epochs, seed=seed, data=data, optimizer=trained_with, progress=look)
    (one,) = pruner.prunings
    share, target = one.sparsity(), one.target
    counted = max(u.counts for u in one.units) / sum(u.size * u.counts for u in one.units)
    axes = all(isinstance(u, AxisUnits | LayerUnits) for u in one.units)
    result = pruner.finish()
    report = result.report
    entries = sum(mask.numel() for mask in result.plan.masks.values())
    zeros = sum(int((~mask).sum()) for mask in result.plan.masks.values())
    return {
        "share": share,
        "target": target,
        "unit": counted,
        "before": before[0],
        "after": task.score(result.module),
        "params": report.params.ratio,
        "macs": report.macs.ratio,
        "zeros": 0.0 if axes or not entries else zeros / entries,
        "proof": report.proof.error,
    }


def cases(models: Iterable[str], labels: Iterable[str]) -> Iterator[tuple[str, str, str, float]]:
    """Yield (model, label, family, target) of what is run."""
    for name, label in itertools.product(models, labels):
        for family in ROWS[label][0]:
            for target in FAMILIES[family][name][1] if name in FAMILIES[family] else ():
                yield name, label, family, target


def main(
    models: Annotated[list[str] | None, typer.Argument(help="digits_resnet, digits_vit")] = None,
    method: Annotated[list[str] | None, typer.Option(help="rows; all where there is none")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    epochs: Annotated[int, typer.Option(min=2)] = 6,
    until: Annotated[float, typer.Option(help="share of the epochs at which the schedule ends")] = 0.6,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    resume: Annotated[bool, typer.Option(help="leave out what the file has")] = False,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "methods.json",
) -> None:
    """Compare ways to prune while training."""
    console = Console()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    unknown = [m for m in method or () if m not in ROWS] + [m for m in models or () if m not in MODELS]
    if unknown:
        raise typer.BadParameter(f"there is no {unknown[0]!r}: methods {list(ROWS)}, models {list(MODELS)}")
    about = document.opened(file, resume, epochs=epochs, until=until)
    about |= {"machine": machine.describe(), "threads": threads}
    chosen = list(models or MODELS)
    for name in chosen:
        if name not in about.setdefault("models", {}):
            about["models"][name] = {"dense": TASKS[name].score(TASKS[name].model()), "rows": {}}
    for seed, (name, label, family, target) in itertools.product(range(seeds), cases(chosen, method or ROWS)):
        row = about["models"][name]["rows"].setdefault(f"{label} / {family} / {target:g}", {})
        if str(seed) in row:
            continue
        try:
            row[str(seed)] = run(name, FAMILIES[family][name][0], target, ROWS[label][1], seed, epochs, until)
        except fxprune.FxpruneError as error:
            row[str(seed)] = {"failed": str(error)}
        document.write(file, about)
        said = f"{name}: {label}, {family}, {target:g}, seed {seed}: {row[str(seed)]}"
        console.print(said, style="dim", highlight=False)
    for name in chosen:
        console.print(name, shown(training_tables.methods(name)({"methods.json": about})))
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
