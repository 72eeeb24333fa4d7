"""What a compilation did, in numbers: prints as tables, serialises to JSON."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from fxprune.plan import GroupPlan
from fxprune.prove import Proof
from fxprune.provenance import Provenance

#: A measured speed-up may be so much below what was asked for, as a share.
CLOCK_TOLERANCE = 0.03
#: How many refitted layers are named, those that are the furthest off.
_WORST = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A number of the dense model and of the pruned one."""

    dense: float
    pruned: float

    @property
    def ratio(self) -> float:
        """Return pruned / dense."""
        return self.pruned / self.dense if self.dense else 1.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Dense and pruned timed side by side in one run; milliseconds for one call.

    Attributes:
        speedup: median over rounds of dense / pruned, with a 95 % interval (low, high).
        iqr: interquartile range of each, in milliseconds.
    """

    backend: str
    threads: int
    batch: int
    milliseconds: Pair
    iqr: Pair
    speedup: float
    interval: tuple[float, float]
    rounds: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One build on the way to a target on the clock: predicted and measured speed-up, and its 95 % interval."""

    predicted: float
    measured: float
    interval: tuple[float, float]


@dataclass(slots=True)
class Clocked:
    """How a target on the clock was met.

    Attributes:
        requested: times as fast as the dense model.
        backend, threads: what it was measured on.
        attempts: every build; `taken` is the place of the one that was returned.
        residual: measured time of the dense model over the sum of its parts' times, 1 where the tables are exact.
    """

    requested: float
    backend: str
    threads: int
    attempts: list[Attempt] = field(default_factory=list)
    taken: int = 0
    residual: float = 1.0

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Clocked:
        """Return it from the plain values that it was written down as."""
        attempts = [Attempt(**{**a, "interval": tuple(a["interval"])}) for a in data["attempts"]]
        return cls(**{**data, "attempts": attempts})

    @property
    def measured(self) -> float | None:
        """How many times as fast as the dense model what was returned is; None where nothing had to be built."""
        return self.attempts[self.taken].measured if self.attempts else None

    def met(self, tolerance: float) -> bool:
        """Whether the measured speed-up is what was asked for, or at most a share of it below."""
        return not self.attempts or self.attempts[self.taken].measured >= self.requested * (1 - tolerance)

    def line(self) -> str:
        """Return requested, predicted and measured speed-up in a sentence."""
        if not self.attempts:
            return "the dense model is as fast as was asked for"
        taken = self.attempts[self.taken]
        low, high = taken.interval
        return (
            f"speed-up requested {self.requested:.2f}, predicted {taken.predicted:.2f}, measured {taken.measured:.2f} "
            f"(95 % in {low:.2f}-{high:.2f}) on {self.backend}, {self.threads} threads; {len(self.attempts)} builds; "
            f"the parts' times add up to {1 / self.residual:.2f} of the whole model's"
        )


@dataclass(frozen=True, slots=True)
class PartTime:
    """Milliseconds of a contraction and what follows it, by the tables that the widths were chosen with."""

    name: str
    dense: float
    pruned: float


@dataclass(frozen=True, slots=True)
class Refitted:
    """One layer after reconstruction, or the outputs after tuning.

    Attributes:
        name: of its weight, or "outputs".
        before, after: mean squared error of the result over the variance of the target, on calibration data.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Sparse:
    """One layer's weight that got a pattern.

    Attributes:
        name: of the weight.
        kept: share of its entries that stays.
        lost: what its results lose by that, as a share of their energy (without data: of the weight's).
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    kept: float
    lost: float


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a recipe of several, compared with what it started from.

    Attributes:
        taken: whether its result was kept.
        error: squared error of the outputs over the dense outputs' variance on calibration data, before and after; None
            without data.
        metric: the user's, before and after.
        speedup: measured, of the result over what the step started from, with its 95 % interval; None where the
            backend cannot be timed here or was not asked.
        why: what decided.
    """

    name: str
    taken: bool
    error: tuple[float, float] | None = None
    metric: tuple[float, float] | None = None
    speedup: tuple[float, float, float] | None = None
    why: str = ""

    def line(self) -> str:
        """Return the step in a sentence."""
        said = [f"{self.name}: {'taken' if self.taken else 'left out'}"]
        if self.why:
            said.append(self.why)
        if self.error is not None:
            said.append(f"error of the outputs {self.error[0]:.2g} -> {self.error[1]:.2g} of their variance")
        if self.metric is not None:
            said.append(f"metric {self.metric[0]:.4g} -> {self.metric[1]:.4g}")
        if self.speedup is not None:
            said.append(f"{self.speedup[0]:.2f} x as fast (95 % in {self.speedup[1]:.2f}-{self.speedup[2]:.2f})")
        return "; ".join(said)


@dataclass(frozen=True, slots=True)
class EngineSummary:
    """An engine that was built of the pruned model: what for, how large (bytes), and what came of 2:4 sparsity.

    Attributes:
        parity: the largest relative difference from torch; None where it could not be told.
    """

    path: str
    library: str
    version: str
    compute_capability: tuple[str, ...]
    dtype: str
    size: int
    layers: int
    sparsity: str
    parity: float | None

    def line(self) -> str:
        """Return all of it in a sentence."""
        target = ", ".join(self.compute_capability) or "8.6 and later"
        parity = "" if self.parity is None else f", within {self.parity:.1e} of torch"
        return (
            f"engine {self.path}: {self.library} {self.version} for compute capability {target}, {self.dtype}{parity}, "
            f"{self.size / 1e6:.1f} MB, {self.layers} layers; {self.sparsity}"
        )


@dataclass(slots=True)
class Report:
    """The result of one `compile`.

    Attributes:
        macs: multiply-accumulates of one forward pass on the example inputs.
        params: parameters that the model's graph uses.
        memory: bytes of all tensors of the graph and of the most activations alive at a time.
        proof: the error measured between the pruned module and the masked dense model.
        groups: every group with its units, dense and kept.
        whole: parameter dimensions that stay whole -> why.
        latency: filled by `Pruned.measure`.
        seconds: time spent in each stage.
        clocked: how a target on the clock was met.
        refitted: what reconstruction did to each layer.
        tuned: what tuning did to the outputs, on calibration data held out for it.
        steps: what followed structured pruning.
        sparse: the weights that got a pattern.
        unfit: weights that could not have it -> why.
        samples: of calibration.
        random: calibration was on random numbers.
        recipe: with what was left open written out: the same recipe, data and versions give the same plan.
        notes: what the user should know.
        engines: filled by `Pruned.export`.
        metric: the user's.
        error: squared error of the outputs over the dense outputs' variance on calibration data; None without data.
        made: versions, machine, data.
        losses: what the criterion says is lost when a group alone keeps so many units: {group: [(units, loss), ...]}.
        parts: of a model whose target was on the clock.
    """

    model: str
    macs: Pair
    params: Pair
    memory: Pair
    proof: Proof
    groups: list[GroupPlan]
    whole: dict[str, str]
    unknown: dict[str, int]
    round_to: int
    recipe: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    clocked: Clocked | None = None
    refitted: list[Refitted] = field(default_factory=list)
    tuned: Refitted | None = None
    samples: int = 0
    random: bool = False
    steps: list[Step] = field(default_factory=list)
    sparse: list[Sparse] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    engines: list[EngineSummary] = field(default_factory=list)
    metric: Pair | None = None
    error: float | None = None
    made: Provenance = field(default_factory=Provenance)
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    parts: list[PartTime] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return result

    def tables(self) -> list[Table]:
        """Return the report as rich tables."""
        table = Table(title=self.model, title_justify="left")
        for column in ("", "dense", "pruned", "pruned / dense"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row(
            "parameters", f"{self.params.dense:,.0f}", f"{self.params.pruned:,.0f}", f"{self.params.ratio:.3f}"
        )
        table.add_row("MACs", f"{self.macs.dense:,.0f}", f"{self.macs.pruned:,.0f}", f"{self.macs.ratio:.3f}")
        for row in self.latency:
            where = f"{row.backend}, {row.threads} threads, batch {row.batch}"
            table.add_row(
                f"ms, {where}",
                f"{row.milliseconds.dense:.2f} (IQR {row.iqr.dense:.2f})",
                f"{row.milliseconds.pruned:.2f} (IQR {row.iqr.pruned:.2f})",
                f"{1 / row.speedup:.3f}",
            )
            low, high = row.interval
            table.add_row("speed-up", "1.00 x", f"{row.speedup:.2f} x", f"95 % in {low:.2f}-{high:.2f}")
        if self.metric is not None:
            dense, pruned = self.metric.dense, self.metric.pruned
            table.add_row("metric", f"{dense:.4g}", f"{pruned:.4g}", f"{pruned - dense:+.4g}")
        table.add_row("units", *self._units())
        return [table]

    def _units(self) -> tuple[str, str, str]:
        dense, kept = sum(g.size for g in self.groups), sum(g.kept for g in self.groups)
        return f"{dense:,} in {len(self.groups)} groups", f"{kept:,}", f"{kept / dense if dense else 1:.3f}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        for table in self.tables():
            console.print(table)
        for line in self.lines():
            console.print(line, highlight=False, markup=False)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()

    def _patterned(self) -> list[str]:
        """Which layers got a pattern, which lost the most by it, and which could not."""
        lines = []
        if self.sparse:
            entries = [math.prod(s.shape) for s in self.sparse]
            share = sum(s.kept * n for s, n in zip(self.sparse, entries, strict=True)) / sum(entries)
            worst = sorted(self.sparse, key=lambda s: s.lost, reverse=True)[:_WORST]
            lines.append(
                f"{self.sparse[0].pattern} in {len(self.sparse)} layers, {share:.1%} of {sum(entries):,} weights stay; "
                f"the most is lost in {', '.join(f'{s.name} {s.lost:.2g}' for s in worst)}"
            )
        reasons: dict[str, list[str]] = {}
        for name, why in self.unfit.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - _WORST} more" if len(names) > _WORST else ""
            lines.append(f"not eligible, {why}: {', '.join(names[:_WORST])}{more}")
        return lines

    def _blocked(self) -> list[str]:
        """What the recipe leaves whole, by reason."""
        names: dict[str, list[str]] = {}
        for g in self.groups:
            if g.why and g.kept == g.size:
                names.setdefault(g.why, []).append(g.name)
        lines = []
        for why, groups in names.items():
            count = "1 group stays" if len(groups) == 1 else f"{len(groups)} groups stay"
            more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
            lines.append(f"{count} whole: {why} ({', '.join(groups[:3])}{more})")
        return lines

    def proved(self) -> list[str]:
        """Return how the result was proved, and how close what was refitted comes to the dense model."""
        proof = self.proof
        lines = [
            f"proved: pruned equals {'the dense model' if proof.lossless else 'masked dense'} within {proof.error:.1e} "
            f"(allowed {proof.tolerance:.0e}; {proof.level}, {proof.runs} comparisons)"
        ]
        if self.samples:
            lines.append(f"calibrated on {self.samples} samples" + (" of random numbers" if self.random else ""))
        if self.refitted:
            before, after = (statistics.median(getattr(r, k) for r in self.refitted) for k in ("before", "after"))
            lines.append(
                f"refitted {len(self.refitted)} layers after the proof: relative error of a layer {before:.3g} -> "
                f"{after:.3g} (median)"
            )
            worst = sorted(self.refitted, key=lambda r: r.after, reverse=True)[:_WORST]
            said = (f"{r.name} {max(r.before, 0):.3g} -> {max(r.after, 0):.3g}" for r in worst)
            lines.append(f"the largest errors of refitted layers: {', '.join(said)}")
        if self.tuned is not None:
            lines.append(
                "tuned biases, scales and shifts: relative error of the outputs on data held out "
                f"{self.tuned.before:.3g} -> {self.tuned.after:.3g}"
            )
        if self.error is not None:
            lines.append(f"squared error of the outputs: {self.error:.2g} of their variance on calibration data")
        return lines

    def lines(self) -> list[str]:
        """Return what follows the tables: proof, frozen dimensions, notes."""
        lines = self.proved()
        lines += [
            f"no rule for {name} ({count} x): what it touches stays whole" for name, count in self.unknown.items()
        ]
        if self.clocked is not None:
            lines.append(self.clocked.line())
        lines += [step.line() for step in self.steps]
        lines += self._patterned()
        lines += self._blocked()
        lines += [engine.line() for engine in self.engines]
        lines += [f"note: {note}" for note in self.notes]
        return lines
