"""`python -m bench.demo`: two real models made faster before your eyes, and what that costs.

- all-MiniLM-L6-v2, a pretrained sentence encoder: calibrated on docstrings of the standard library, nothing is trained
- a small ResNet, trained here on handwritten digits: halved with its training images, trained on for a moment

Nothing is downloaded. Both end up as a saved model, as an ONNX file that needs nothing of this project, and on a page.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from bench import machine
from bench.tasks import digits, minilm
from bench.tasks.training import showing as training
from fxprune.backends.timing import Interval
from fxprune.page import html, read
from fxprune.page import page as about

BACKEND = "onnxruntime"
THREADS = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is done; the defaults take about five minutes on two idle cores.

    Attributes:
        speedup: asked for, on the clock; None: half of the multiply-accumulates, where time does not matter.
        calibration: sentences that the encoder is pruned with.
        sentences: other ones, that embeddings are compared on.
        batch, length: sentences and tokens of one timed call of the encoder.
        epochs: of training the ResNet.
        more: epochs of training it on after pruning.
        widths: of its stages.
        images: of one timed call of the ResNet.
        rounds: of timing dense and pruned in turns.
    """

    speedup: float | None = 2.0
    calibration: int = 512
    sentences: int = 128
    batch: int = 8
    length: int = 128
    epochs: int = 4
    more: int = 2
    widths: tuple[int, int, int] = (32, 64, 128)
    images: int = 64
    rounds: int = 15

    @property
    def target(self) -> dict[str, float]:
        """What is asked for."""
        return {"macs": 0.5} if self.speedup is None else {"speedup": self.speedup}


def speed(faster: Interval) -> str:
    """Return a speed-up with its 95 % interval, as the tables show it.

    >>> speed(Interval(1.5, 1.4, 1.62))
    '1.50 x (1.40-1.62)'
    """
    return f"{faster.median:.2f} x ({faster.low:.2f}-{faster.high:.2f})"


def count(number: float) -> str:
    """Return a number of parameters or multiply-accumulates in three digits.

    >>> count(22_565_376), count(1_682_522_112), count(950)
    ('22.6 M', '1.68 G', '950')
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:#.3g} {name}"
    return f"{number:.0f}"


def command(file: Path, batch: int) -> str:
    """Return one shell line that runs an ONNX file on made-up inputs of `batch` rows and says what came out.

    It needs Python with onnxruntime and numpy, and nothing of this project.
    """
    code = (
        "import numpy as np, onnxruntime as ort; "
        f's = ort.InferenceSession("{file.as_posix()}", providers=["CPUExecutionProvider"]); '
        'kinds = {"tensor(int64)": "int64", "tensor(float)": "float32"}; '
        f"size = lambda i: [d if isinstance(d, int) else {batch} for d in i.shape]; "
        "feeds = {i.name: np.ones(size(i), kinds[i.type]) for i in s.get_inputs()}; "
        "y = s.run(None, feeds)[0]; "
        "print(y.shape, y[0, :4].round(3))"
    )
    return shlex.join(["python", "-c", code])


def keep(pruned: fxprune.Pruned, out: Path, name: str, console: Console) -> Path:
    """Save a pruned model and export it, both under `out`; return the ONNX file."""
    saved = pruned.save(out / name, overwrite=True)
    file = pruned.export(out / f"{name}.onnx")
    console.print(f"saved {saved} (fxprune.load reads it) and {file}", highlight=False, soft_wrap=True)
    return file


# ---------------------------------------------------------------------- the encoder
def prune_encoder(console: Console, out: Path, settings: Settings) -> Path:
    """Prune MiniLM to the speed-up; print the table, keep the model, return its ONNX file."""
    console.rule(f"all-MiniLM-L6-v2, {_asked(settings)}, without training")
    console.print(
        f"A pretrained sentence encoder. {settings.calibration} docstrings say which heads and hidden units it can do "
        f"without, and what stays is refitted by least squares on them. {settings.sentences} other ones show what that "
        "costs: the cosine of each embedding to the dense model's."
    )
    dense = minilm.encoder()
    sentences = minilm.sentences(settings.sentences + settings.calibration)
    held_out, known = sentences[: settings.sentences], sentences[settings.sentences :]
    inputs = minilm.tokenize(held_out[: settings.batch], length=settings.length)
    batches = minilm.sorted_batches(held_out)[0]
    with stage(console) as progress:
        calibrated = fxprune.compile(
            dense,
            inputs,
            target=settings.target,
            calibration=minilm.sorted_batches(known, length=settings.length)[0],
            dynamic_shapes=minilm.DYNAMIC,
            metric=lambda model: minilm.cosine(dense, model, batches),
            threads=THREADS,
            progress=progress,
        )
        share = calibrated.report.macs.ratio
        plain = fxprune.compile(dense, inputs, target={"macs": share}, dynamic_shapes=minilm.DYNAMIC)
    latency = calibrated.measure(backend=BACKEND, threads=THREADS, rounds=settings.rounds)
    report = calibrated.report
    assert report.metric is not None
    table = Table(
        title=f"{settings.sentences} sentences; onnxruntime, batch {settings.batch}, {settings.length} tokens, "
        f"{THREADS} threads, {settings.rounds} rounds",
        title_justify="left",
    )
    table.add_column("")
    for column in ("MACs", "parameters", "mean cosine", "ms", "speed-up (95 %)"):
        table.add_column(column, justify="right")
    ms, faster = latency.milliseconds, Interval(latency.speedup, *latency.interval)
    table.add_row("dense", count(report.macs.dense), count(report.params.dense), "1.000", f"{ms.dense:.1f}", "")
    alike = [f"{report.metric.pruned:.3f}", f"{minilm.cosine(dense, plain.module, batches):.3f}"]
    for name, pruned, cosine, time in (
        ("fxprune, calibrated", report, alike[0], (f"{ms.pruned:.1f}", speed(faster))),
        ("the smallest weights go", plain.report, alike[1], ("", "")),
    ):
        table.add_row(name, count(pruned.macs.pruned), count(pruned.params.pruned), cosine, *time)
    console.print(table)
    for line in report.lines():
        console.print(line, highlight=False, markup=False)
    return keep(calibrated, out, "minilm", console)


def _asked(settings: Settings) -> str:
    return "half of its work" if settings.speedup is None else f"{settings.speedup:g} times as fast"


@contextmanager
def stage(console: Console) -> Iterator[Callable[[str], None]]:
    """Show what is being done, on a terminal; elsewhere nothing is."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update


# ---------------------------------------------------------------------- the ResNet
def prune_resnet(console: Console, out: Path, settings: Settings, data: digits.Digits | None = None) -> Path:
    """Train a ResNet, prune it, train it on; print the table, keep it, return its ONNX file."""
    console.rule("ResNet on handwritten digits, half of its work, trained on")
    data = data or digits.digits()
    model = digits.resnet(widths=settings.widths)
    with training(console, "training the dense model") as advance:
        digits.train(model, settings.epochs, data=data, progress=advance)
    accuracies = [digits.accuracy(model, data)]
    with stage(console) as progress:
        pruned = fxprune.compile(
            model,
            data.train_images[: settings.images],
            target={"macs": 0.5},
            calibration=[(data.train_images[:512],)],
            threads=THREADS,
            progress=progress,
        )
    accuracies.append(digits.accuracy(pruned.module, data))
    with training(console, "training the pruned model") as advance:
        digits.finetune(pruned.module, settings.more, data=data, progress=advance)
    accuracies.append(digits.accuracy(pruned.module, data))
    latency = pruned.measure(backend=BACKEND, threads=THREADS, rounds=settings.rounds)

    report = pruned.report
    table = Table(
        title=f"{len(data.test_labels)} test images; onnxruntime, batch {latency.batch}, {THREADS} threads, "
        f"{latency.rounds} rounds",
        title_justify="left",
    )
    table.add_column("")
    for column in ("dense", "pruned", f"pruned, {settings.more} epochs more"):
        table.add_column(column, justify="right")
    table.add_row("accuracy", *(f"{value:.1%}" for value in accuracies))
    for name, pair in (("parameters", report.params), ("MACs", report.macs)):
        table.add_row(name, count(pair.dense), *[count(pair.pruned)] * 2)
    table.add_row("ms", f"{latency.milliseconds.dense:.2f}", "", f"{latency.milliseconds.pruned:.2f}")
    table.add_row("speed-up (95 %)", "", "", speed(Interval(latency.speedup, *latency.interval)))
    console.print(table)
    for line in report.lines():
        console.print(line, highlight=False, markup=False)
    return keep(pruned, out, "digits", console)


def show(console: Console, files: Sequence[Path], batch: int) -> list[str]:
    """Print, and return, one command for each ONNX file; nothing breaks their lines."""
    console.rule("run them anywhere")
    console.print("With Python, onnxruntime and numpy, and nothing else:")
    commands = [command(file, batch) for file in files]
    for line in commands:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return commands


def main(
    out: Annotated[Path, typer.Option(help="where the models go")] = Path("demo-out"),
) -> None:
    """Prune two real models and print what it brings and costs."""
    console = Console()
    settings = Settings()
    torch.manual_seed(0)
    files = [prune_encoder(console, out, settings), prune_resnet(console, out, settings)]
    page = out / "report.html"
    page.write_text(html(about(*read([out / "minilm", out / "digits"]))), encoding="utf-8")
    show(console, files, batch=2)
    console.rule("all of it on one page")
    console.print(page, soft_wrap=True, highlight=False)
    console.print(machine.stamp(), style="dim", highlight=False)


if __name__ == "__main__":
    typer.run(main)
