"""The generated parts about pruning while training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.tables import Documents, Missing, plural, required, table

#: The page of the long tables.
PAGE = "docs/measured-training.md"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean, and the standard deviation of more than one.

    >>> _spread([0.5]), _spread([0.5, 0.7])
    ('0.500', '0.600 ± 0.141')
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _seeds(counts: Sequence[int]) -> str:
    """Return how many seeds rows have.

    >>> _seeds([3, 3]), _seeds([3, 1]), _seeds([1])
    ('3 seeds', '1 to 3 seeds', '1 seed')
    """
    least, most = min(counts), max(counts)
    return plural(most, "seed") if least == most else f"{least} to {plural(most, 'seed')}"


def ladder(documents: Documents) -> list[str]:
    """Return what the ladder and block movement lose at the speed-ups of nn_pruning's line."""
    document = required(documents, "ladder.json")
    dense, rows, seeds = document["dense"], [], []
    for label, by_speed in document["rows"].items():
        for speed, runs in by_speed.items():
            seeds.append(len(runs))
            accuracy = [100 * run["accuracy"] for run in runs.values()]
            at = statistics.mean(run["speedup"] for run in runs.values())
            allowed = document["allowed"].get(speed)
            rows.append(
                [
                    label,
                    f"{speed} x" if float(speed) > 1 else "",
                    f"{at:.2f} x" if float(speed) > 1 else "",
                    _spread(accuracy, 2),
                    f"{100 * dense - statistics.mean(accuracy):+.2f}",
                    "" if allowed is None else f"{allowed:.1f}",
                ]
            )
    if not rows:
        raise Missing("No run is in `bench/results/ladder.json`")
    title = f"Dense {100 * dense:.2f} %, {document['tested']:,} held-out docstrings; movement is trained for "
    title += f"{document['epochs'] + document['more']} epochs at each speed-up; means and standard deviations of "
    title += f"{_seeds(seeds)}:"
    head = ["", "asked for", "measured", "accuracy, %", "points lost", "nn_pruning's line loses"]
    return [title, "", *table(head, rows)]


def mask_cost(documents: Documents) -> list[str]:
    """Return what a step costs with masks, and after `finish`."""
    document = required(documents, "mask_cost.json")
    cell = "{0:.2f} ({1:.2f} to {2:.2f})"
    rows = [
        [label, *(cell.format(*row[when]) for when in ("ratio", "after"))] for label, row in document["rows"].items()
    ]
    title = "A training step of MiniLM over the dense one's time, medians and 95 % intervals of "
    title += f"{document['rounds']} rounds in turns:"
    return [title, "", *table(["", "with masks", "after `finish`"], rows)]


def methods(model: str) -> Callable[[Documents], list[str]]:
    """Return what shows every method on a model."""

    def render(documents: Documents) -> list[str]:
        document = required(documents, "methods.json")
        found = document["models"].get(model)
        if not found or not found["rows"]:
            raise Missing(f"No method was measured on {model}")
        seeds = _seeds([len(runs) for runs in found["rows"].values()])
        title = f"Dense {found['dense']:.4f}; {seeds}, {document['epochs']} epochs, of which the "
        title += f"schedule takes {document['until']:.0%}:"
        families = list(dict.fromkeys(key.split(" / ")[1] for key in found["rows"]))

        def place(key: str) -> tuple[int, float]:
            _label, family, target = key.split(" / ")
            return families.index(family), float(target)

        rows = [_method(key, list(found["rows"][key].values())) for key in sorted(found["rows"], key=place)]
        head = ["pattern", "target", "method", "gone", "before tuning", "after", "parameters", "MACs", "proof"]
        return [title, "", *table(head, rows)]

    return render


def _method(key: str, runs: list[dict[str, Any]]) -> list[str]:
    """Return the row of a method on a pattern; what failed with its reason."""
    label, family, target = key.split(" / ")
    right = [run for run in runs if "failed" not in run]
    if not right:
        return [family, target, label, runs[0]["failed"], *[""] * 5]
    parts = [family, target, label, f"{statistics.mean(run['share'] for run in right):.4f}"]
    parts += [_spread([run[when] for run in right]) for when in ("before", "after")]
    parts += [f"{statistics.mean(run[what] for run in right):.2f}" for what in ("params", "macs")]
    return [*parts, f"{max(run['proof'] for run in right):.0e}"]
