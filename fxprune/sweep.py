"""`sweep`: one model at a list of targets. Capture, analysis, scores and latency tables are made once for all."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from fxprune.admit import admit
from fxprune.api import checked
from fxprune.benchmark import bench
from fxprune.capture import example
from fxprune.choosing import choose, prepare
from fxprune.clock import Clock, Progress, no_collection
from fxprune.errors import FxpruneError, InputError, RecipeError, SavedModelError
from fxprune.making import make, within_drop
from fxprune.pruned import Pruned
from fxprune.recipe import Recipe
from fxprune.report import Latency, Pair, Report

#: What `Sweep.save` writes beside the models.
INDEX = "sweep.json"


@dataclass(slots=True)
class Sweep:
    """One model at several targets.

    Attributes:
        results: by the target's name, "speedup=2.0", in the order in which they were asked for.
        failed: by the target's name, why there is no model.
    """

    results: dict[str, Pruned] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def measure(
        self,
        *,
        backend: str | Mapping[str, Any] | None = None,
        threads: int | None = None,
        rounds: int = 30,
        progress: Progress | None = None,
    ) -> None:
        """Time all models and the dense one in turns, in one run, and add the result to each report.

        Args:
            backend: by default the recipe's.
            threads: by default torch's number.
        """
        some = next(iter(self.results.values()), None)
        if some is None:
            return
        dense = some.dense
        assert dense is not None
        found = bench(
            dict(self.results),
            against=dense,
            backends=[backend or some.report.recipe["backend"]],
            threads=[threads or torch.get_num_threads()],
            rounds=rounds,
            progress=progress or (lambda stage: None),
        ).combinations[0]
        before, *others = found.timings
        rows = {row.artefact: row for row in others}
        for name, pruned in self.results.items():
            row = rows[name]
            if row.milliseconds is None or before.milliseconds is None:
                pruned.report.notes.append(f"not timed beside the dense model: {row.failure or before.failure}")
                continue
            assert row.iqr is not None and before.iqr is not None
            assert row.speedup is not None and row.interval is not None
            pruned.report.latency.append(
                Latency(
                    backend=found.backend or "",
                    threads=found.threads,
                    batch=found.batch,
                    milliseconds=Pair(before.milliseconds, row.milliseconds),
                    iqr=Pair(before.iqr, row.iqr),
                    speedup=row.speedup,
                    interval=row.interval,
                    rounds=rounds,
                )
            )

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write each model into a directory of its own, and sweep.json, which `fxprune report` reads.

        Raises:
            SavedModelError: the directory holds something else, or the files cannot be written.
        """
        folder = Path(directory)
        check_free(folder, overwrite)
        names = {name: name.replace("=", "-") for name in self.results}
        for name, pruned in self.results.items():
            pruned.save(folder / names[name], overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            index = {"models": names, "failed": self.failed}
            (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        except OSError as error:
            raise SavedModelError(f"'{folder / INDEX}' cannot be written: {error.strerror}") from error
        return folder

    def table(self) -> Table:
        """Return a row for each target, as a table for a terminal."""
        rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("target", "MACs", "parameters", "error", "metric", "ms", "speed-up", "95 % in"):
            rows.add_column(column, justify="left" if column == "target" else "right")
        for name, pruned in self.results.items():
            report = pruned.report
            time = report.latency[-1] if report.latency else None
            rows.add_row(
                name,
                f"{report.macs.ratio:.3f}",
                f"{report.params.ratio:.3f}",
                "" if report.error is None else f"{report.error:.2g}",
                "" if report.metric is None else f"{report.metric.pruned:.4g}",
                "" if time is None else f"{time.milliseconds.pruned:.2f}",
                "" if time is None else f"{time.speedup:.2f} x",
                "" if time is None else "{:.2f}-{:.2f}".format(*time.interval),
            )
        for name in self.failed:
            rows.add_row(name, "failed")
        return rows


def sweep(
    model: nn.Module,
    example_inputs: Any,
    targets: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any] | str | os.PathLike[str] | Recipe | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
    progress: Progress | None = None,
    calibration: Any = None,
    loss: Callable[..., Tensor] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    **overrides: Any,
) -> Sweep:
    """Prune a model to each of several targets; what they have in common is done once.

    Args:
        targets: of recipes: [{"speedup": 1.5}, {"speedup": 2.0}].
        recipe: what holds for all of them; a target in it is not used. The other arguments are those of
            `fxprune.compile`.

    Returns:
        The models. A target that cannot be reached is in `failed`, and the others go on.

    Raises:
        RecipeError: there is no target, one is there twice, or one is `dead`, which is no point of a front.
        FxpruneError: of the data, the model or the recipe; or no target can be reached, and why the last one cannot.

    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> found = sweep(net, torch.randn(2, 8), [{"macs": 0.75}, {"macs": 0.5}])
    >>> {name: pruned.module.get_parameter("0.weight").shape[0] for name, pruned in found.results.items()}
    {'macs=0.75': 48, 'macs=0.5': 32}
    """
    if not targets:
        raise RecipeError("a sweep takes targets: [{'speedup': 1.5}, {'speedup': 2.0}]")
    every = {
        name_of(target): checked(recipe, None, {**overrides, "target": target}, calibration is not None, metric)
        for target in targets
    }
    if len(every) < len(targets):
        raise RecipeError(f"a target is there twice: {', '.join(map(name_of, targets))}")
    if any(settings.target.dead for settings in every.values()):
        raise RecipeError("target dead removes what is dead and nothing else: compile it alone")
    admitted = admit(model)
    args, keywords = example(example_inputs, kwargs)
    clock = Clock(progress)
    found = Sweep()
    failure = FxpruneError()
    with no_collection(), torch.inference_mode(False):
        first = next((s for s in every.values() if s.removes), next(iter(every.values())))
        ready = prepare(admitted, args, keywords, first, dynamic_shapes, clock, None, calibration, loss)
        for name, settings in every.items():
            clock.say(name)
            own = clock.again()
            try:
                if settings.target.max_drop is not None and metric is not None:
                    found.results[name] = within_drop(ready, settings, own, metric)
                else:
                    found.results[name] = make(choose(ready, settings, own), settings, own, metric)
            except InputError:  # of the data or the metric: the others would fail alike
                raise
            except FxpruneError as error:
                found.failed[name] = str(error)
                failure = error
    if not found.results:
        raise failure
    return found


def name_of(target: Mapping[str, Any]) -> str:
    """Return a target as the command line writes it.

    >>> name_of({"speedup": 2.0})
    'speedup=2.0'
    """
    return ",".join(f"{key}={value}" for key, value in target.items())


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a directory that holds something else.

    Raises:
        SavedModelError: it does.
    """
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / INDEX).is_file())):
        raise SavedModelError(f"'{folder}' exists and is no sweep of fxprune; choose another name")
    if (folder / INDEX).is_file() and not overwrite:
        raise SavedModelError(f"'{folder}' holds a sweep; pass overwrite=True (--overwrite), or choose another name")


def points(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Return the accuracy and the speed of each timed report, fastest last, where they can be compared.

    The accuracy is the metric, or where none has one 1 minus the error of the outputs. Nothing is returned for
    different models, or where only some have the metric.
    """
    timed = {name: r for name, r in reports.items() if r.latency}
    alike = {(r.model, r.params.dense, r.metric is None, r.error is None) for r in timed.values()}
    if len(alike) != 1 or next(iter(alike))[2:] == (True, True):
        return []
    found = []
    for name, report in timed.items():
        speedup = statistics.median(row.speedup for row in report.latency)
        left = report.metric.pruned if report.metric is not None else 1 - (report.error or 0.0)
        found.append({"name": name, "speedup": speedup, "left": left})
    return sorted(found, key=lambda point: float(point["speedup"]))
