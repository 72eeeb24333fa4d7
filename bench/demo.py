"""`python -m bench.demo`: two real models pruned before your eyes, what that costs in accuracy and brings in time.

- all-MiniLM-L6-v2, a pretrained sentence encoder, on sentences from the standard library's docstrings: no data is used
  for pruning it and nothing is trained afterwards
- a small ResNet, trained here on handwritten digits, pruned to half of its work and trained on for a moment

Nothing is downloaded. Both end up as a saved model and as an ONNX file that needs nothing of this project.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxprune
from bench import machine
from bench.tasks import digits, minilm
from bench.tasks.training import showing as training
from fxprune.backends import BACKENDS
from fxprune.backends.timing import Comparison, Interval, compare

BACKEND = "onnxruntime"
THREADS = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is done; the defaults take about two minutes on two idle cores.

    Attributes:
        shares: of the encoder's multiply-accumulates that stay.
        sentences: that embeddings are compared on.
        batch, length: sentences and tokens of one timed call of the encoder.
        epochs: of training the ResNet.
        more: epochs of training it on after pruning.
        widths: of its stages.
        images: of one timed call of the ResNet.
        rounds: of timing dense and pruned in turns.
    """

    shares: tuple[float, ...] = (0.9, 0.75, 0.5)
    sentences: int = 96
    batch: int = 8
    length: int = 128
    epochs: int = 5
    more: int = 3
    widths: tuple[int, int, int] = (32, 64, 128)
    images: int = 64
    rounds: int = 15


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


def timed(models: dict[str, nn.Module], inputs: tuple[Tensor, ...], rounds: int) -> Comparison:
    """Build all models on onnxruntime and time them in turns; the first is what the others are compared with."""
    backend = BACKENDS[BACKEND]
    runners = {name: backend.build(model, inputs, threads=THREADS) for name, model in models.items()}
    calls = {name: lambda runner=runner: runner.run(*inputs) for name, runner in runners.items()}  # type: ignore[misc, unused-ignore]
    return compare(calls, reference=next(iter(models)), repeats=rounds, warmup=2)


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
    """Prune MiniLM to each share of its work; print the table, keep the smallest, return its ONNX file."""
    console.rule("all-MiniLM-L6-v2, pruned by magnitude")
    console.print(
        "A pretrained sentence encoder. Channels, heads and hidden units with small weights go: no data, no "
        "calibration, no training afterwards. What that costs shows in the cosine similarity of each embedding to the "
        "dense model's."
    )
    dense = minilm.encoder()
    sentences = minilm.sentences(settings.sentences)
    inputs = minilm.tokenize(sentences[: settings.batch], length=settings.length)
    sizes = {0: "batch", 1: "sequence"}
    pruned = {}
    for share in settings.shares:
        with (
            console.status(f"pruning to {share:.0%} of the multiply-accumulates") if console.is_terminal else _nothing()
        ):
            pruned[share] = fxprune.compile(
                dense,
                inputs,
                target={"macs": share},
                dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            )
    batches = minilm.batches(sentences)
    cosines = {share: minilm.cosine(dense, result.module, batches) for share, result in pruned.items()}
    latency = timed(
        {"dense": dense, **{str(share): result.module for share, result in pruned.items()}}, inputs, settings.rounds
    )
    table = Table(
        title=f"{settings.sentences} sentences; onnxruntime, batch {settings.batch}, {settings.length} tokens, "
        f"{THREADS} threads, {settings.rounds} rounds",
        title_justify="left",
    )
    for column in ("MACs", "of dense", "parameters", "mean cosine", "ms", "speed-up (95 %)"):
        table.add_column(column, justify="right")
    report = pruned[settings.shares[0]].report
    ms = latency.latencies["dense"].median * 1e3
    table.add_row(count(report.macs.dense), "1.000", count(report.params.dense), "1.000", f"{ms:.1f}", "")
    for share, result in pruned.items():
        table.add_row(
            count(result.report.macs.pruned),
            f"{result.report.macs.ratio:.3f}",
            count(result.report.params.pruned),
            f"{cosines[share]:.3f}",
            f"{latency.latencies[str(share)].median * 1e3:.1f}",
            speed(latency.ratio(str(share))),
        )
    console.print(table)
    console.print(
        "Magnitude alone, without calibration or training, costs much accuracy: these encoders are where fine-tuning "
        "starts, not finished models. Half of the parameters are the vocabulary, which stays whole."
    )
    return keep(pruned[min(pruned)], out, "minilm", console)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# ---------------------------------------------------------------------- the ResNet
def prune_resnet(console: Console, out: Path, settings: Settings, data: digits.Digits | None = None) -> Path:
    """Train a ResNet, halve its work, train it on; print the table, keep it, return its ONNX file."""
    console.rule("ResNet on handwritten digits, pruned to half of its work, trained on")
    data = data or digits.digits()
    model = digits.resnet(widths=settings.widths)
    with training(console, "training the dense model") as advance:
        digits.train(model, settings.epochs, data=data, progress=advance)
    accuracies = [digits.accuracy(model, data)]
    pruned = fxprune.compile(model, data.train_images[: settings.images], target={"macs": 0.5})
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
    console.print(machine.stamp(), style="dim", highlight=False)
    show(console, files, batch=2)


if __name__ == "__main__":
    typer.run(main)
