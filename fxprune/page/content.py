"""What is on the page about one or several saved models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from fxprune.errors import SavedModelError
from fxprune.page import figures
from fxprune.page.parts import Bar, Boxes, Cell, Code, Figure, Page, Part, Section, Table, Text
from fxprune.recipe import as_yaml
from fxprune.report import CLOCK_TOLERANCE, Latency, Pair, Report
from fxprune.saved import INT8, WEIGHTS, read_saved_report
from fxprune.sweep import INDEX, points

#: Longer tables are folded away.
_LONG = 12
#: So many names stand behind a reason.
_NAMES = 4


@dataclass(frozen=True, slots=True)
class Saved:
    """A report with what lies beside it.

    Attributes:
        name: of the directory, or of a sweep's target.
        files: name -> bytes.
    """

    name: str
    report: Report
    files: dict[str, int]


def read(directories: Sequence[Path]) -> tuple[list[Saved], dict[str, str]]:
    """Return the reports of saved models and sweeps, and the targets of sweeps that were not reached, with the reason.

    Raises:
        SavedModelError: a directory is neither, or is damaged.
    """
    found: list[Saved] = []
    failed: dict[str, str] = {}
    for folder in directories:
        if (folder / INDEX).is_file():
            try:
                index = json.loads((folder / INDEX).read_text())
                models, missed = dict(index["models"]), dict(index["failed"])
            except (ValueError, KeyError, TypeError) as error:
                raise SavedModelError(f"'{folder / INDEX}' is damaged: {error}") from error
            found += [_saved(name, folder / place) for name, place in models.items()]
            failed |= missed
        else:
            found.append(_saved(folder.name or str(folder), folder))
    return found, failed


def _saved(name: str, folder: Path) -> Saved:
    report = read_saved_report(folder)
    kept = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix not in (".html", ".md"))
    return Saved(name, report, {f.name: f.stat().st_size for f in kept})


def page(saved: Sequence[Saved], failed: dict[str, str] | None = None) -> Page:
    """Return the page about one model, or about several with what tells them apart first."""
    if len(saved) == 1 and not failed:
        (one,) = saved
        return Page(f"{one.report.model}, pruned", _lead(one.report), _sections(one, ""))
    models = ", ".join(dict.fromkeys(s.report.model for s in saved)) or "nothing"
    sections = [Section("front", "All of them", _front(saved, failed or {}), "all of them")]
    for number, one in enumerate(saved, 1):
        for i, part in enumerate(_sections(one, _lead(one.report))):
            listed = "" if i else one.name
            sections.append(Section(f"m{number}-{part.name}", f"{one.name}: {part.title}", part.parts, listed))
    return Page(
        f"{models}: {len(saved)} pruned models", "Speed-ups are over each one's dense model, timed in turns.", sections
    )


# ---------------------------------------------------------------------- one model
def _sections(saved: Saved, lead: str) -> list[Section]:
    report = saved.report
    parts: list[tuple[str, str, list[Part]]] = [
        ("result", "Asked and reached", [*([Text(lead)] if lead else []), *_asked(report), _numbers(saved)]),
        ("layers", "Width kept and work saved", _widths(report)),
        ("latency", "Where the time goes", _times(report)),
        ("heads", "Heads kept", _heads(report)),
        ("curves", "What each group alone would cost", _curves(report)),
        ("steps", "Patterns and numbers of fewer bits", _steps(report)),
        ("whole", "What stays whole, and why", _whole(report)),
        ("proof", "Proof and reconstruction", _proof(report)),
        ("again", "The same again", _again(saved)),
    ]
    return [Section(name, title, some, title) for name, title, some in parts if some]


def _lead(report: Report) -> str:
    said = [f"{report.params.ratio:.0%} of the parameters and {report.macs.ratio:.0%} of the multiply-accumulates stay"]
    time = _time(report)
    if time is not None:
        said.append(f"{time.speedup:.2f} times as fast on {time.backend}, measured")
    if report.metric is not None:
        said.append(f"the metric is {report.metric.pruned:.4g}, of the dense model {report.metric.dense:.4g}")
    elif report.error is not None:
        said.append(f"the outputs differ by {report.error:.2g} of their variance")
    return "; ".join(said) + "."


def _time(report: Report) -> Latency | None:
    return report.latency[-1] if report.latency else None


def _target(report: Report) -> tuple[str, float]:
    target = {k: v for k, v in report.recipe["target"].items() if v is not None and v is not False}
    return next(iter(target.items()))


def _asked(report: Report) -> list[Part]:
    """What the recipe asked for, and what came of it."""
    kind, wanted = _target(report)
    clock = report.clocked
    rows: list[tuple[Cell, ...]] = []
    shares = {"macs": report.macs, "params": report.params, "memory": report.memory}
    if kind in shares:
        rows.append((f"share of {kind} kept", f"{wanted:.3f}", f"{shares[kind].ratio:.3f}"))
    elif kind == "max_drop" and report.metric is not None:
        drop = report.metric.dense - report.metric.pruned
        rows.append(("drop of the metric, at most", f"{wanted:.4g}", f"{drop:.4g}"))
    elif kind == "dead":
        rows.append(("only what is dead", "no output changes", f"{report.params.ratio:.3f} of the parameters"))
    elif clock is not None:
        for number, attempt in enumerate(clock.attempts):
            low, high = attempt.interval
            taken = ", taken" if number == clock.taken else ""
            rows.append(
                (
                    f"speed-up, build {number + 1}{taken} (predicted {attempt.predicted:.2f} x)",
                    f"{clock.requested:.2f} x",
                    f"{attempt.measured:.2f} x (95 % in {low:.2f}-{high:.2f})",
                )
            )
    parts: list[Part] = [Table(("", "#asked", "#reached"), rows)] if rows else []
    if clock is not None and not clock.attempts:
        parts.append(Text(clock.line()))
    if clock is not None and clock.attempts and not clock.met(CLOCK_TOLERANCE):
        parts.append(Text("The target on the clock was missed: this is the nearest of all builds."))
    return parts


def _numbers(saved: Saved) -> Table:
    report = saved.report
    rows: list[tuple[Cell, ...]] = [
        _row(name, pair) for name, pair in (("parameters", report.params), ("MACs", report.macs))
    ]
    rows.append(
        (
            "memory: weights and most activations at a time",
            decimal(int(report.memory.dense)),
            decimal(int(report.memory.pruned)),
            Bar(report.memory.ratio, f"{report.memory.ratio:.3f}"),
        )
    )
    if report.metric is not None:
        dense, pruned = report.metric.dense, report.metric.pruned
        rows.append(("metric (higher is better)", f"{dense:.4g}", f"{pruned:.4g}", f"{pruned - dense:+.4g}"))
    if report.error is not None:
        rows.append(("squared error of the outputs, of their variance", "0", f"{report.error:.3g}", ""))
    for time in report.latency:
        low, high = time.interval
        where = f"{time.backend}, {time.threads} threads, batch {time.batch}, {time.rounds} rounds"
        rows.append(
            (
                f"ms, {where}; median and interquartile range",
                f"{time.milliseconds.dense:.2f} ({time.iqr.dense:.2f})",
                f"{time.milliseconds.pruned:.2f} ({time.iqr.pruned:.2f})",
                Bar(1 / time.speedup, f"{time.speedup:.2f} x as fast (95 % in {low:.2f}-{high:.2f})"),
            )
        )
    for name in (WEIGHTS, INT8):
        if name in saved.files:
            rows.append((f"file {name}", "", decimal(saved.files[name]), ""))
    rows += [
        (f"file {name}", "", decimal(size), "")
        for name, size in saved.files.items()
        if name.endswith((".onnx", ".engine", ".pt2")) and name != INT8
    ]
    return Table(("", "#dense", "#pruned", "pruned / dense"), rows)


def _row(name: str, pair: Pair) -> tuple[Cell, ...]:
    return name, f"{pair.dense:,.0f}", f"{pair.pruned:,.0f}", Bar(pair.ratio, f"{pair.ratio:.3f}")


def _widths(report: Report) -> list[Part]:
    """A bar for each group."""
    rows: list[tuple[Cell, ...]] = [
        (
            g.name,
            f"{g.kind} ({g.role})" if g.role else g.kind,
            Bar(g.kept / g.size, f"{g.kept} of {g.size}"),
            f"{g.params:,}",
            f"{g.macs:,}",
        )
        for g in report.groups
    ]
    if not rows:
        return [Text("No group can be cut: the model came back whole.")]
    columns = ("group", "kind", "units kept", "#parameters saved by it alone", "#MACs saved by it alone")
    return [Table(columns, rows, _fold(rows, "groups"))]


def _times(report: Report) -> list[Part]:
    """A bar for each part of the tables that a target on the clock was chosen with."""
    if not report.parts:
        return []
    assert report.clocked is not None
    dense = sum(p.dense for p in report.parts)
    pruned = sum(p.pruned for p in report.parts)
    most = max(p.dense for p in report.parts)
    rows: list[tuple[Cell, ...]] = [
        (
            p.name,
            Bar(p.dense / most, f"{p.dense:.3f}"),
            Bar(p.pruned / most, f"{p.pruned:.3f}"),
            f"{p.dense - p.pruned:.3f}",
        )
        for p in report.parts
    ]
    lead = (
        f"Each part is a contraction and what follows it, timed by itself on {report.clocked.backend} at several "
        f"widths. By these tables {dense:.2f} ms become {pruned:.2f}; the parts alone add up to "
        f"{1 / report.clocked.residual:.2f} of the whole model's measured time, which is set right in these numbers."
    )
    return [Text(lead), Table(("part", "ms dense", "ms pruned", "#ms saved"), rows, _fold(rows, "parts"))]


def _heads(report: Report) -> list[Part]:
    rows: list[tuple[Cell, ...]] = []
    for g in report.groups:
        if g.kind == "heads":
            stays = set(g.heads)
            rows.append((g.name, Boxes(tuple(i in stays for i in range(g.size))), f"{g.kept} of {g.size}"))
    return [Table(("layer", "heads, ■ stays", "#kept"), rows)] if rows else []


def _curves(report: Report) -> list[Part]:
    """What the criterion says is lost at several widths."""
    curves = {name: curve for name, curve in report.losses.items() if len(curve) > 1}
    if not curves:
        return []
    criterion = report.recipe["criterion"]
    name = criterion if isinstance(criterion, str) else criterion["name"]
    about = f"What criterion {name} says is lost when a group alone keeps so many units."
    rows: list[tuple[Cell, ...]] = [
        (group, ", ".join(f"{n}: {loss:.3g}" for n, loss in curve)) for group, curve in curves.items()
    ]
    svg = figures.curves(curves, "Each group pruned alone", f"loss by criterion {name}")
    return [Figure(svg, about, Table(("group", "units: loss"), rows, "the numbers"))]


def _steps(report: Report) -> list[Part]:
    parts: list[Part] = [Text(step.line()) for step in report.steps]
    if report.sparse:
        rows: list[tuple[Cell, ...]] = [
            (s.name, "x".join(map(str, s.shape)), s.pattern, Bar(s.kept, f"{s.kept:.3f}"), f"{s.lost:.3g}")
            for s in report.sparse
        ]
        columns = ("weight", "shape", "pattern", "entries kept", "#share of its results' energy lost")
        parts.append(Table(columns, rows, _fold(rows, "weights")))
    parts += [Text(f"Not eligible, {why}: {_names(names)}.") for why, names in _by_reason(report.unfit.items())]
    parts += [Text(engine.line()) for engine in report.engines]
    return parts


def _whole(report: Report) -> list[Part]:
    said = [(g.name, g.why) for g in report.groups if g.why and g.kept == g.size]
    parts: list[Part] = []
    rows: list[tuple[Cell, ...]] = [
        (why, str(len(names)), _names(names)) for why, names in _by_reason([*said, *report.whole.items()])
    ]
    if report.unknown:
        lines = ", ".join(f"{name} ({count} x)" for name, count in report.unknown.items())
        parts.append(Text(f"Operators without a rule, so that what they touch stays whole: {lines}."))
    if rows:
        parts.append(Table(("because", "#dimensions", "of which"), rows, _fold(rows, "reasons")))
    return parts or [Text("Nothing: every dimension of every parameter could be cut.")]


def _proof(report: Report) -> list[Part]:
    parts: list[Part] = [Text(f"{line[0].upper()}{line[1:]}.") for line in report.proved()]
    if report.refitted:
        rows: list[tuple[Cell, ...]] = [(r.name, f"{r.before:.3g}", f"{r.after:.3g}") for r in report.refitted]
        parts.append(Table(("layer", "#error before refitting", "#after"), rows, _fold(rows, "refitted layers")))
    parts += [Text(f"Note: {note}") for note in report.notes]
    return parts


def _again(saved: Saved) -> list[Part]:
    report = saved.report
    parts: list[Part] = [Text(report.made.line())]
    if report.made.data is not None:
        parts.append(Text(f"Calibration data: {report.samples} samples, fingerprint {report.made.data}."))
    if report.made.command:
        parts.append(Code(report.made.command))
    parts.append(Text("The recipe, with everything written out:"))
    parts.append(Code(as_yaml(report.recipe).rstrip()))
    seconds = ", ".join(f"{stage} {number:.1f}" for stage, number in report.seconds.items())
    parts.append(Text(f"Seconds: {seconds}."))
    return parts


# ---------------------------------------------------------------------- several
def _front(saved: Sequence[Saved], failed: dict[str, str]) -> list[Part]:
    """All models in a table, and their accuracy over their speed."""
    rows: list[tuple[Cell, ...]] = []
    for one in saved:
        report, time = one.report, _time(one.report)
        rows.append(
            (
                one.name,
                Bar(report.macs.ratio, f"{report.macs.ratio:.3f}"),
                Bar(report.params.ratio, f"{report.params.ratio:.3f}"),
                "" if report.error is None else f"{report.error:.3g}",
                "" if report.metric is None else f"{report.metric.pruned:.4g}",
                "" if time is None else f"{time.milliseconds.pruned:.2f} ({time.iqr.pruned:.2f})",
                "" if time is None else f"{time.speedup:.2f} x ({time.interval[0]:.2f}-{time.interval[1]:.2f})",
                decimal(one.files.get(WEIGHTS, 0)),
            )
        )
    columns = ("model", "MACs", "parameters", "#error", "#metric", "#ms (IQR)", "#speed-up (95 %)", "#weights")
    parts: list[Part] = [Table(columns, rows)]
    parts += [Text(f"{name} was not reached: {why}") for name, why in failed.items()]
    found = points({s.name: s.report for s in saved})
    if len(found) > 1:
        metric = next((s.report.metric for s in saved if s.report.metric is not None), None)
        dense, what = (metric.dense, "metric") if metric else (1.0, "1 - squared error of the outputs")
        marks = [(p["name"], p["speedup"], p["left"]) for p in found]
        numbers: list[tuple[Cell, ...]] = [(n, f"{x:.2f} x", f"{y:.4g}") for n, x, y in [("dense", 1.0, dense), *marks]]
        about = f"The front: {what} over the measured speed-up."
        parts.append(
            Figure(
                figures.front(marks, dense, what),
                about,
                Table(("model", "#speed-up", f"#{what}"), numbers, "the numbers"),
            )
        )
    return parts


# ---------------------------------------------------------------------- small things
def _fold(rows: Sequence[object], what: str) -> str:
    return f"{len(rows)} {what}" if len(rows) > _LONG else ""


def _by_reason(items: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, why in items:
        found.setdefault(why, []).append(name)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
