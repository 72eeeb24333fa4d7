"""Artefacts of any kind timed side by side: models on the backends asked for, files on the runtime of their own."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fxprune.artefacts import (
    Artefact,
    Inputs,
    Opened,
    What,
    check_options,
    example_inputs,
    open_file,
    open_module,
    open_sizes,
    read,
)
from fxprune.backends.base import Backend, chosen
from fxprune.backends.timing import LEAST_REPEATS, Comparison, compare
from fxprune.errors import BackendError, FxpruneError, InputError

#: Builds models where no backend is named and no saved model's recipe names one.
DEFAULT_BACKEND = "onnxruntime"


@dataclass(frozen=True, slots=True)
class Timing:
    """What one artefact took; milliseconds for one call.

    Attributes:
        runs_on: the backend, with its options; None where it could not be run.
        size: of the file that is run, or of the saved directory, in bytes; None where there is none.
        milliseconds: the median over the rounds.
        iqr: the interquartile range.
        speedup: how many times as fast as the reference, the median over the rounds.
        interval: that holds the speed-up with 95 % confidence (low, high).
        failure: why there are no numbers.
    """

    artefact: str
    runs_on: str | None = None
    size: int | None = None
    milliseconds: float | None = None
    iqr: float | None = None
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Combination:
    """All artefacts timed in turns in one run.

    Attributes:
        backend: what models were built on; None where there are none.
        batch: rows of the first input.
        threads: CPU threads.
        reference: the artefact that speed-ups are over; None where nothing could be timed.
    """

    backend: str | None
    batch: int
    threads: int
    reference: str | None
    timings: tuple[Timing, ...]

    def title(self) -> str:
        """Return what is common to all rows.

        >>> Combination("torch", 8, 1, None, ()).title()
        'torch, batch 8, 1 thread'
        """
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return ", ".join([*([self.backend] if self.backend else []), f"batch {self.batch}", threads])

    def table(self) -> Table:
        """Return the rows as a table for a terminal."""
        rows = Table(title=self.title(), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", "runs on"):
            rows.add_column(column, overflow="fold")
        for column in ("ms", "IQR", "speed-up", "95 % in", "file"):
            rows.add_column(column, justify="right", no_wrap=True)
        for row in self.timings:
            rows.add_row(Text(row.artefact), Text(row.runs_on or ""), *_numbers(row, row.artefact == self.reference))
        return rows


def _numbers(row: Timing, is_reference: bool) -> list[str]:
    if row.milliseconds is None or row.iqr is None or row.speedup is None or row.interval is None:
        return ["not timed"]
    gain = ["reference", ""] if is_reference else [f"{row.speedup:.2f} x", "{:.2f}-{:.2f}".format(*row.interval)]
    size = "" if row.size is None else decimal(row.size)
    return [_milliseconds(row.milliseconds), _milliseconds(row.iqr), *gain, size]


def _milliseconds(number: float) -> str:
    """Return three digits or more, none of them an exponent.

    >>> _milliseconds(0.01234), _milliseconds(1.234), _milliseconds(1234.5)
    ('0.0123', '1.23', '1,234')
    """
    return f"{number:,.{4 if number < 0.1 else 3 if number < 1 else 2 if number < 10 else 1 if number < 100 else 0}f}"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What `bench` measured, one combination of backend, batch and threads after the other."""

    artefacts: tuple[Artefact, ...]
    rounds: int
    combinations: tuple[Combination, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a row for each artefact and combination, and the sizes of saved models, as plain JSON values."""
        rows = [
            {
                **asdict(row),
                "interval": list(row.interval) if row.interval else None,
                "backend": c.backend,
                "batch": c.batch,
                "threads": c.threads,
                "reference": c.reference,
            }
            for c in self.combinations
            for row in c.timings
        ]
        saved = {
            a.name: {"macs": asdict(a.pruned.report.macs), "params": asdict(a.pruned.report.params)}
            for a in self.artefacts
            if a.pruned is not None
        }
        return {"rounds": self.rounds, "rows": rows, "models": saved, "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """Return what follows the tables: the sizes of saved models, why something was not timed, and notes."""
        lines = [f"{self.rounds} rounds, all of a table in turn; medians"]
        for a in self.artefacts:
            if a.pruned is not None:
                macs, params = a.pruned.report.macs, a.pruned.report.params
                lines.append(
                    f"{a.name}: {params.pruned:,.0f} of {params.dense:,.0f} parameters ({params.ratio:.3f}), "
                    f"{macs.pruned:,.0f} of {macs.dense:,.0f} MACs ({macs.ratio:.3f})"
                )
        failures: dict[str, list[str]] = {}
        for c in self.combinations:
            for row in c.timings:
                if row.failure is not None:
                    failures.setdefault(f"{row.artefact} was not timed%s: {row.failure}", []).append(c.title())
        for text, where in failures.items():
            everywhere = len(where) == len(self.combinations)
            lines.append(text.replace("%s", "" if everywhere else f" ({'; '.join(where)})", 1))
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        for combination in self.combinations:
            console.print(combination.table())
        for line in self.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()


def bench(
    artefacts: Sequence[What] | Mapping[str, What],
    *,
    against: What | None = None,
    backends: Sequence[str | Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    threads: Sequence[int] = (),
    batches: Sequence[int] = (),
    rounds: int = 30,
    progress: Callable[[str], None] = lambda stage: None,
) -> Benchmark:
    """Time artefacts of any kind alternately in one run, once for each combination of backend, batch and threads.

    A saved directory, what `compile` returned, a module, or what the command line calls MODEL is built on each backend.
    Files run as they are, beside it, on the one runtime that they are for: FILE.onnx on onnxruntime, FILE.engine on
    its TensorRT, FILE.pt2 of compiled code on torch-aot. What cannot be run here is a row that says why.

    Sizes that the first saved model leaves open stay open in every model that is built, so that all are built alike;
    where there is none, every size is fixed.

    Args:
        artefacts: names for messages -> artefacts, or artefacts alone.
        against: the reference, the dense model as a rule; by default the first artefact.
        backends: names, or {"name": ..., option: value}; by default that of the first saved model's recipe.
        options: set on each backend that has them; `provider` on that of ONNX files, too.
        inputs: as for `--input`; by default those of the first model that has some, or what a file says of itself.
        threads: CPU threads; by default torch's number.
        batches: sizes of dimension 0; by default that of the inputs.
        rounds: how often each artefact is timed.
        progress: called with the name of each stage as it begins.

    Raises:
        InputError: an artefact is not there, there are no inputs for it, or a number makes no sense.
        SavedModelError: a saved directory is damaged.
        BackendError: a backend, an option or its value is unknown.
        FxpruneError: nothing could be timed; of the kind of what stood in the way.

    >>> from torch import nn
    >>> from fxprune import compile
    >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> small = compile(net, torch.randn(2, 8), target={"macs": 0.5})
    >>> result = bench({"small": small}, against=net, backends=["torch"], batches=[1, 4], rounds=6)
    >>> [(c.title().partition(", 1 ")[0].split(", ")[:2], c.reference) for c in result.combinations]
    [(['torch', 'batch 1'], 'Sequential'), (['torch', 'batch 4'], 'Sequential')]
    >>> [(row.artefact, row.runs_on) for row in result.combinations[0].timings]
    [('Sequential', 'torch'), ('small', 'torch')]
    """
    _check(threads, batches, rounds)
    asked = [_configured(chosen(b), options or {}) for b in backends]
    progress("read what is to be timed")
    listed, reference = _read(artefacts, against)
    everything = [reference, *(a for a in listed if a is not reference)]
    on = _backends(everything, asked, options or {})
    check_options(options or {}, [b for b in on if b is not None], everything)
    # Inputs of what is listed come before those of the reference.
    given = example_inputs([*listed, reference], inputs, batches[0] if batches else None)
    run = _Run(everything, rounds, options or {})
    combinations = []
    sizes: Sequence[int | None] = batches or [None]
    for backend, batch, count in itertools.product(on, sizes, threads or [torch.get_num_threads()]):
        rows = given.rebatched(batch)
        progress(f"measure on {backend.key if backend else 'the runtimes of the files'}, batch {rows.batch}")
        combinations.append(run.combination(backend, rows, count))
    if not any(c.reference for c in combinations):
        raise run.nothing()
    notes = [*_mismatches(reference, everything[1:]), *run.notes]
    if asked and on == [None]:
        notes.append("there is no model to build: files run on the runtime that they are for")
    return Benchmark(tuple(everything), rounds, tuple(combinations), tuple(dict.fromkeys(notes)))


def _check(threads: Sequence[int], batches: Sequence[int], rounds: int) -> None:
    if rounds < LEAST_REPEATS:
        raise InputError(f"{rounds} rounds allow no 95 % interval; take {LEAST_REPEATS} or more")
    for what, numbers in (("threads", threads), ("batches", batches)):
        if any(n < 1 for n in numbers):
            raise InputError(f"{what} are {', '.join(map(str, numbers))}; each is 1 or more")


def _read(artefacts: Sequence[What] | Mapping[str, What], against: What | None) -> tuple[list[Artefact], Artefact]:
    """What is to be timed, each once and with a name of its own, and the reference, which may be among it."""
    named = artefacts.items() if isinstance(artefacts, Mapping) else [(None, what) for what in artefacts]
    seen: list[tuple[What, Artefact]] = []
    for name, what in named:
        if _known(what, seen) is None:
            seen.append((what, _read_one(what, name, seen)))
    if not seen:
        raise InputError("there is nothing to time: name a saved directory, a model or a file")
    listed = [artefact for _, artefact in seen]
    if against is None:
        return listed, listed[0]
    return listed, _known(against, seen) or _read_one(against, None, seen)


def _known(what: What, seen: Sequence[tuple[What, Artefact]]) -> Artefact | None:
    return next((a for other, a in seen if what is other or (isinstance(what, str) and what == other)), None)


def _read_one(what: What, name: str | None, seen: Sequence[tuple[What, Artefact]]) -> Artefact:
    found = read(what, name)
    alike = sum(a.name.partition(" #")[0] == found.name for _, a in seen)
    return replace(found, name=f"{found.name} #{alike + 1}") if alike else found


def _configured(backend: Backend, options: Mapping[str, Any]) -> Backend:
    """The backend with those of the options that it has."""
    return backend.configured(**{name: value for name, value in options.items() if name in backend.OPTIONS})


def _backends(
    artefacts: Sequence[Artefact], asked: Sequence[Backend], options: Mapping[str, Any]
) -> Sequence[Backend | None]:
    """What models are built on, one after the other; [None] where there are none."""
    if all(a.module is None for a in artefacts):
        return [None]
    if asked:
        return asked
    saved = (a.pruned.report.recipe.get("backend") for a in artefacts if a.pruned is not None)
    return [_configured(chosen(next(saved, None) or DEFAULT_BACKEND), options)]


def _mismatches(reference: Artefact, others: Sequence[Artefact]) -> Iterator[str]:
    """Say so where the reference is not the model that a saved one was made of."""
    module = reference.module
    if module is None or reference.pruned is not None:
        return
    kind, count = type(module).__name__, sum(p.numel() for p in module.parameters())
    for other in others:
        report = other.pruned.report if other.pruned is not None else None
        if report is not None and (kind != report.model or count < report.params.dense):
            yield (
                f"{reference.name} is a {kind} of {count:,} parameters, but {other.name} was made of a {report.model} "
                f"of {report.params.dense:,.0f}: the two may not do the same work"
            )


class _Run:
    """Combination after combination, with what is to be said about all of them."""

    def __init__(self, artefacts: Sequence[Artefact], rounds: int, options: Mapping[str, Any]) -> None:
        self.notes: list[str] = []
        self._artefacts = artefacts
        self._rounds = rounds
        self._options = options
        self._errors: list[tuple[str, FxpruneError]] = []

    def nothing(self) -> FxpruneError:
        """Return the error for a run in which nothing could be timed."""
        kinds = {type(error) for _, error in self._errors}
        kind = kinds.pop() if len(kinds) == 1 else BackendError
        reasons = dict.fromkeys(f"{name}: {error}" for name, error in self._errors)
        return kind(f"nothing could be timed: {'; '.join(reasons)}")

    def combination(self, backend: Backend | None, inputs: Inputs, threads: int) -> Combination:
        """Open every artefact and time those that run."""
        opened: dict[int, Opened] = {}
        calls: dict[str, Callable[[], object]] = {}
        failed: dict[int, FxpruneError] = {}
        with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
            shapes: dict[int, list[tuple[int, ...]]] = {}
            for i, artefact in enumerate(self._artefacts):
                try:
                    found = self._open(artefact, backend, inputs, threads, Path(folder) / f"model{i}")
                    shapes[i] = [tuple(t.shape) for t in found.outputs()]
                    calls[str(i)] = found.call()
                    opened[i] = found
                except FxpruneError as error:
                    failed[i] = error
                except Exception as error:  # whatever a model's own code raises at this batch
                    failed[i] = BackendError(f"it cannot be run on these inputs: {type(error).__name__}: {error}")
            compared = compare(calls, reference=min(calls, key=int), repeats=self._rounds) if calls else None
        self._errors += [(self._artefacts[i].name, error) for i, error in failed.items()]
        timings = [self._timing(i, opened, failed, compared) for i in range(len(self._artefacts))]
        reference = self._artefacts[int(compared.reference)].name if compared else None
        result = Combination(backend.key if backend else None, inputs.batch, threads, reference, tuple(timings))
        self.notes += self._about(result, opened, failed, shapes)
        return result

    def _open(self, artefact: Artefact, backend: Backend | None, inputs: Inputs, threads: int, file: Path) -> Opened:
        if artefact.module is None or backend is None:
            return open_file(artefact, inputs, threads, self._options)
        dynamic = open_sizes(artefact.module, inputs, [artefact, *self._artefacts])
        return open_module(artefact, inputs, backend, threads, dynamic, file)

    def _timing(
        self, i: int, opened: Mapping[int, Opened], failed: Mapping[int, FxpruneError], compared: Comparison | None
    ) -> Timing:
        name = self._artefacts[i].name
        if i in failed or compared is None:
            return Timing(name, failure=str(failed[i]))
        latency, speedup = compared.latencies[str(i)], compared.ratio(str(i))
        low, high = latency.quartiles
        return Timing(
            artefact=name,
            runs_on=opened[i].runs_on,
            size=opened[i].size,
            milliseconds=latency.median * 1e3,
            iqr=(high - low) * 1e3,
            speedup=speedup.median,
            interval=(speedup.low, speedup.high),
        )

    def _about(
        self,
        result: Combination,
        opened: Mapping[int, Opened],
        failed: Mapping[int, FxpruneError],
        shapes: Mapping[int, list[tuple[int, ...]]],
    ) -> Iterator[str]:
        """What the reader of the numbers must know."""
        if 0 in failed and result.reference is not None:
            yield f"speed-ups are over {result.reference} where {self._artefacts[0].name} was not timed"
        for i in opened:
            name = self._artefacts[i].name
            first = min(opened)
            if shapes[i] != shapes[first]:
                yield (
                    f"{name} returns {_shapes(shapes[i])}, but {result.reference} {_shapes(shapes[first])}: the two "
                    "may not do the same work"
                )
            if self._artefacts[i].kind == "package":
                yield f"{name} computes with the number of threads that it was compiled for, whatever was asked for"


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "a scalar" for shape in shapes) or "nothing"
