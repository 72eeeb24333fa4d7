"""`python -m bench.ladder`: the ladder and block movement pruning on docstrings, at the speed-ups of nn_pruning's line.

MiniLM is fine-tuned to name the module that a docstring is from. A third of the docstrings is held out, three times
what the task `minilm_modules` holds out, since differences of tenths of a point are looked for. Both ways train with
the same distillation (0.1 cross entropy, 0.9 KL to the dense model at temperature 2), the same batch and rate, in
bfloat16 (autocast).

- ladder: `fxprune.ladder`, some epochs on each rung; one run gives all three models. At the first speed-up it has been
  trained the least; with so many epochs on each rung that movement has in all it has been trained as long there
- movement, struct: heads and inner widths have scores that move; the last update of the schedule meets the speed-up by
  measuring, and the smaller model is trained on. No regrowth: what is masked gets no gradient of its score
- dense, trained on: the dense model with as many epochs as movement has

Speed is measured in onnxruntime against the dense model. Every seed orders the batches anew.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable
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
from bench.tasks.task import Inputs
from bench.tasks.training import rate

RESULTS = Path(__file__).parent / "results"
#: The speed-ups of nn_pruning's published line, and the points that it loses there: what is asked for.
SPEEDUPS = (1.84, 2.44, 3.64)
ALLOWED = (0.2, 0.8, 2.5)
SETTINGS = modules.Settings(tested=1600)
LADDER, DENSE = "ladder", "dense, trained on"
#: Options of movement.
MOVEMENTS: dict[str, dict[str, Any]] = {
    "movement, struct": {"lr": 1e-2},
    "movement, struct, no regrowth": {"regrow": False, "lr": 1e-2},
}
_RUNGS = Path(tempfile.gettempdir())
#: Samples that a rung is pruned with.
_SAMPLES = 512


class Remembered(nn.Module):
    """A teacher that is asked once for each docstring: what it says does not depend on the rest of the batch.

    Half of a step of a small model would be the large one's.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map token numbers and their mask, both int64 of shape (N, tokens), to logits (N, classes)."""
        said = [tuple(row[there].tolist()) for row, there in zip(tokens, mask.bool(), strict=True)]
        new = [row for row, key in enumerate(said) if key not in self.known]
        if new:
            answers = self.teacher(tokens[new], mask[new])
            self.known |= {said[row]: answer for row, answer in zip(new, answers, strict=True)}
        return torch.stack([self.known[key] for key in said])


def objective(model: nn.Module, teacher: nn.Module, inputs: Inputs, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """Return 0.1 cross entropy + 0.9 KL to the teacher: Lagunas et al., "Block Pruning For Faster Transformers"."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(*inputs)
    logits = logits.float()
    known = (teacher(*inputs) / temperature).log_softmax(-1)
    soft = nn.functional.kl_div((logits / temperature).log_softmax(-1), known, log_target=True, reduction="batchmean")
    return 0.1 * nn.functional.cross_entropy(logits, labels) + 0.9 * temperature**2 * soft


def fit(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor]],
    steps: int,
    lr: float,
    say: Callable[[str], None],
    attach: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None,
) -> None:
    """Train a model in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, fused=True)
    attach(optimizer)
    model.train()
    for done, (inputs, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * rate(done, steps)
        optimizer.zero_grad()
        loss = objective(model, teacher, inputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if done % 50 == 0:
            say(f"step {done} of {steps}, loss {float(loss.detach()):.3f}")
    model.eval()


def run_ladder(
    settings: modules.Settings,
    teacher: nn.Module,
    seed: int,
    epochs: int,
    lr: float,
    folder: Path,
    say: Callable[[str], None],
) -> dict[float, dict[str, Any]]:
    """Return the figures of all rungs of one run."""
    task = modules.task(settings)
    each = modules.steps_each(settings)

    def tune(module: nn.Module, _dense: nn.Module, rung: int) -> None:
        fit(module, teacher, modules.epochs(settings, epochs, 100 * seed + rung), epochs * each, lr, say)

    family = fxprune.ladder(
        task.model(),
        task.example,
        SPEEDUPS,
        tune,
        calibration=task.calibration(_SAMPLES, seed),
        loss=task.loss,
        metric=task.score,
        dynamic_shapes=task.dynamic,
        directory=folder,
        progress=say,
        seed=seed,
    )
    return {speed: figures(pruned) for speed, pruned in zip(SPEEDUPS, family, strict=True)}


def run_movement(
    settings: modules.Settings,
    teacher: nn.Module,
    options: dict[str, Any],
    speedup: float,
    seed: int,
    epochs: int,
    more: int,
    lr: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the figures of one model that was pruned by movement with these options of it."""
    task = modules.task(settings)
    model = task.model()
    steps = epochs * modules.steps_each(settings)
    stage = {
        "method": {"name": "movement"} | options,
        "pattern": "struct",
        "target": {"speedup": speedup},
        "schedule": {"ramp": "cubic", "start": 0, "end": steps - 1},
        "max_sparsity": 0.95,
    }
    pruner = fxprune.Pruner(
        model, task.example, stage, dynamic_shapes=task.dynamic, steps=steps, seed=seed, progress=say
    )
    fit(model, teacher, modules.epochs(settings, epochs, 100 * seed), steps, lr, say, pruner.attach)
    pruned = pruner.finish()
    left = more * modules.steps_each(settings)
    fit(pruned.module, teacher, modules.epochs(settings, more, 100 * seed + 1), left, lr, say)
    pruned.report.metric = fxprune.report.Pair(0.0, task.score(pruned.module))
    pruned.measure(against=task.model())
    return figures(pruned)


def figures(pruned: fxprune.Pruned) -> dict[str, Any]:
    """Return what is kept of a result."""
    report = pruned.report
    assert report.metric is not None
    latency = report.latency[-1]
    return {
        "accuracy": report.metric.pruned,
        "speedup": latency.speedup,
        "interval": list(latency.interval),
        "macs": report.macs.pruned,
        "proof": report.proof.error,
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"rows: {LADDER}; {'; '.join(MOVEMENTS)}; {DENSE}")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rung: Annotated[list[int] | None, typer.Option(min=1, help="epochs on a rung of a ladder; 2, and 4")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="epochs of movement")] = 4,
    more: Annotated[int, typer.Option(min=1, help="epochs of the smaller model after movement")] = 2,
    lr: Annotated[float, typer.Option()] = 1e-4,
    limit: Annotated[int | None, typer.Option(min=16, help="training docstrings; all where not said")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    speeds: Annotated[list[float] | None, typer.Option("--speed", help="movement at these alone")] = None,
    resume: Annotated[bool, typer.Option(help="leave out what the file has")] = False,
    rungs: Annotated[Path, typer.Option(help="where rungs are kept, for an interrupted run")] = _RUNGS,
    file: Annotated[Path, typer.Option("--json", help="where the figures go")] = RESULTS / "ladder.json",
) -> None:
    """Compare the ladder with block movement pruning."""
    console = Console()
    torch.set_num_threads(threads)
    shim_torchvision()
    warnings.simplefilter("ignore")

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    settings = dataclasses.replace(SETTINGS, trained=limit)
    about = document.opened(
        file,
        resume,
        epochs=epochs,
        more=more,
        lr=lr,
        limit=limit,
        tested=SETTINGS.tested,
        package=minilm.PACKAGE,
    )
    about |= {"machine": machine.describe(), "threads": threads}
    about["allowed"] = dict(zip(map(str, SPEEDUPS), ALLOWED, strict=True))
    task = modules.task(settings)
    if "dense" not in about:
        about["dense"] = task.score(task.model())
    teacher = Remembered(task.model())
    rows = about.setdefault("rows", {})

    def keep(label: str, speed: float, seed: int, row: dict[str, Any]) -> None:
        rows.setdefault(label, {}).setdefault(f"{speed:g}", {})[str(seed)] = row
        document.write(file, about)
        say(f"{label}, {speed:g} x, seed {seed}: {row}")

    def missing(label: str, speed: float, seed: int) -> bool:
        wanted = not only or any(label.startswith(one) for one in only)
        return wanted and str(seed) not in rows.get(label, {}).get(f"{speed:g}", {})

    for seed in range(seeds):
        for each in rung or (2, 4):
            label = f"{LADDER}, {each} epochs a rung"
            if any(missing(label, speed, seed) for speed in SPEEDUPS):
                folder = rungs / f"fxprune-ladder-{each}-{lr:g}-{seed}"
                for speed, row in run_ladder(settings, teacher, seed, each, lr, folder, say).items():
                    keep(label, speed, seed, row)
        for label, options in MOVEMENTS.items():
            for speed in speeds or SPEEDUPS:
                if missing(label, speed, seed):
                    row = run_movement(settings, teacher, options, speed, seed, epochs, more, lr, say)
                    keep(label, speed, seed, row)
        if missing(DENSE, 1.0, seed):
            model = task.model()
            left = (epochs + more) * modules.steps_each(settings)
            fit(model, teacher, modules.epochs(settings, epochs + more, 100 * seed), left, lr, say)
            keep(DENSE, 1.0, seed, {"accuracy": task.score(model), "speedup": 1.0})
    console.print(shown(training_tables.ladder({"ladder.json": about})))
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
