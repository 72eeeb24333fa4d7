"""`python -m bench.gpu`: half the multiply-accumulates and 2:4 weights on a GPU, alone and together, in half precision.

BERT-base (128 tokens), ViT-L/16 and ResNet-50 with random weights, which take the same time as trained ones. Four
variants of each: dense; pruned to half of the multiply-accumulates, widths in multiples of 64; dense with 2:4 weights
in all linear layers, where `fxprune.backends.sparse` leaves those layers dense that would not be faster; pruned and
2:4. ResNet-50 has two, since torch has no 2:4 kernel for convolutions. They run as they are, from CUDA graphs, and
compiled by torch; all variants of one model, route and batch are timed in turns within one run.

A row is written as soon as it is measured, and a second call goes on where the first one stopped.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from bench import machine
from bench.shims import shim_torchvision

with contextlib.suppress(ModuleNotFoundError):  # without it no options are read, and these annotations neither
    from typer import Option

if TYPE_CHECKING:
    from fxprune.backends import Runner

RESULT = Path(__file__).parent / "results" / "gpu.json"
#: What `fxprune.compile` and this program import, beside torch; a machine that nothing can be installed on may lack it.
NEEDED = ("numpy", "networkx", "scipy", "pydantic", "yaml", "safetensors", "rich")
SHARE, MULTIPLE = 0.5, 64
#: Masks by magnitude, in the order that is there: what is timed does not depend on which weights stay.
_MASKS = {"sparsity": {"pattern": "2:4", "method": "asp", "permute": False}}
_SMALLER = {"target": {"macs": SHARE}, "round_to": MULTIPLE}
#: Each variant's recipe.
RECIPES: dict[str, dict[str, Any]] = {"pruned": _SMALLER, "2:4": _MASKS, "pruned + 2:4": {**_SMALLER, **_MASKS}}
ROUNDS, WARMUP = 20, 3
#: Seconds of one sample: many calls of a small batch, one or a few of a large one.
SAMPLE = 0.02
VARIANTS = ("dense", *RECIPES)
DEVICE = "cuda"
HALF = {"device": DEVICE, "dtype": "float16", "cuda_graphs": True}
#: Route -> the backend, its options, and the batches that it is timed at: compiling takes minutes, replaying does not.
ROUTES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "eager": ("torch", HALF, (1, 8, 32, 128)),
    "compile": ("torch-compile", HALF, (32,)),
}


class FirstOutput(nn.Module):
    """A transformers model that takes token numbers and gives a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return the first of the model's results."""
        result: Tensor = self.model(input_ids=ids, return_dict=False)[0]
        return result


@dataclass(frozen=True, slots=True)
class Subject:
    """A model: the package it needs, how it is made, its inputs for a batch, and whether 2:4 kernels exist for it."""

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    sparse: bool = True


def _bert() -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shim_torchvision()
    import transformers

    return FirstOutput(transformers.BertForSequenceClassification(transformers.BertConfig()))


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        shim_torchvision()
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False)
        return model

    return make


def _images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 224, 224),)


def _tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(3, 30522, (batch, 128)),)


SUBJECTS = (
    Subject("bert-base", "transformers", _bert, _tokens),
    Subject("resnet50", "timm", _timm("resnet50"), _images, sparse=False),
    Subject("vit-l16", "timm", _timm("vit_large_patch16_224"), _images),
)


# ---------------------------------------------------------------------- the variants
def variants(subject: Subject) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Yield the name of each variant, its module on the CPU in float32, and what is known of it before it is timed."""
    import fxprune

    torch.manual_seed(0)
    dense = subject.make().eval()
    yield "dense", dense, {"macs": 1.0, "params": 1.0}
    for name, recipe in RECIPES.items():
        if "sparsity" in recipe and not subject.sparse:
            continue
        start = time.perf_counter()
        pruned = fxprune.compile(dense, subject.inputs(2), recipe, proof="quick", seed=0)
        seconds, report = time.perf_counter() - start, pruned.report
        known = {"macs": report.macs.ratio, "params": report.params.ratio, "compile_s": round(seconds, 2)}
        yield name, pruned.module.eval(), known | {"masked": len(pruned.plan.masks)}


# ---------------------------------------------------------------------- one row
def measure(
    modules: dict[str, nn.Module], inputs: tuple[Tensor, ...], backend: str, options: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Build each variant on the backend and time them in turns; return figures by variant, an `error` where it fails.

    Times are milliseconds for one call, medians with their 95 % intervals; a speed-up is over "dense".
    """
    from fxprune.backends.timing import compare, median_interval

    figures: dict[str, Any] = {}
    runners: dict[str, Runner] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, module in modules.items():
        try:
            runners[name] = _build(name, module, inputs, backend, options)
            calls[name] = runners[name].bind(*inputs)
        except Exception as error:  # of a size that does not fit, or an operator that cannot be recorded
            figures[name] = _failed(error)
    if "dense" not in calls:
        return figures
    try:
        timed = compare(calls, reference="dense", repeats=rounds, warmup=WARMUP, min_time=SAMPLE)
    except Exception as error:  # a GPU that fails while it is timed
        return figures | {name: _failed(error) for name in calls}
    for name in calls:
        milliseconds = median_interval([1e3 * second for second in timed.latencies[name].samples])
        told = runners[name].describe()
        figures[name] = {
            "ms": milliseconds.to_json(),
            "speedup": timed.ratio(name).to_json(),
            "samples_per_s": 1e3 * len(inputs[0]) / milliseconds.median,
            "parity": told["parity"],
            **({"sparse": told["sparse"]} if "sparse" in told else {}),
        }
    return figures


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _build(name: str, module: nn.Module, inputs: tuple[Tensor, ...], backend: str, options: dict[str, Any]) -> Runner:
    from fxprune.backends import BACKENDS

    sparse = {"sparse": "auto"} if "2:4" in name and options["device"] == "cuda" else {}
    chosen = BACKENDS[backend].configured(**options, **sparse)
    return chosen.build(module, inputs, threads=torch.get_num_threads(), dynamic=False)


# ---------------------------------------------------------------------- what is left to do
def keys(subject: Subject, batches: tuple[int, ...] = ()) -> list[tuple[str, str, int]]:
    """Return (row, route, batch) for everything that is timed of a model."""
    return [
        (f"{subject.name}/{route}/{batch}", route, batch)
        for route, (_, _, usual) in ROUTES.items()
        for batch in usual
        if not batches or batch in batches
    ]


def missing_packages(names: tuple[str, ...] = NEEDED) -> list[str]:
    """Return those of the packages that are not installed.

    >>> missing_packages(("torch", "no_such_package"))
    ['no_such_package']
    """
    return [name for name in names if importlib.util.find_spec(name) is None]


def gpu() -> dict[str, Any]:
    """Return what the figures depend on beside the machine: the GPU, and the versions of what runs on it."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cusparselt": torch.backends.cusparselt.version(),
    }


def table(rows: dict[str, Any]) -> Any:
    """Return the results as a rich table."""
    from rich.table import Table

    result = Table(title="float16: milliseconds for a batch; times as fast as dense, in turns within one run (95 %)")
    for column in ("model", "route", "batch", *VARIANTS, "layers 2:4"):
        result.add_column(column, justify="left" if column in ("model", "route") else "right")
    for key, row in rows.items():
        cells = [_cell(row["variants"].get(name)) for name in VARIANTS]
        result.add_row(*key.split("/"), *cells, _layers(row["variants"].get("2:4", {})))
    return result


def _cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    if "error" in figures:
        return "failed"
    faster = figures["speedup"]
    return f"{figures['ms']['median']:.2f}\n{faster['median']:.2f} ({faster['low']:.2f}-{faster['high']:.2f})"


def _layers(figures: dict[str, Any]) -> str:
    """Return how many layers were given a sparse weight, of those that could have been."""
    choices = figures.get("sparse")
    return f"{sum(c['kernel'] is not None for c in choices)} of {len(choices)}" if choices else ""


def run(
    subject: Subject, wanted: list[tuple[str, str, int]], save: Callable[[str, dict[str, Any]], None], left: Any
) -> None:
    """Time what is wanted of one model and hand over each row; `left()` says whether there is time for another."""
    made = {name: (_moved(module), known) for name, module, known in variants(subject)}
    for key, route, batch in wanted:
        if not left():
            return
        backend, options, _ = ROUTES[route]
        if subject.library == "timm" and not subject.sparse:
            options = options | {"channels_last": True}  # what tensor cores read convolutions in
        torch.manual_seed(0)
        inputs = tuple(tensor.to(DEVICE) for tensor in subject.inputs(batch))
        figures = measure({name: module for name, (module, _) in made.items()}, inputs, backend, options, ROUNDS)
        for name, (_, known) in made.items():
            figures[name] = known | figures.get(name, {})
        save(key, {"backend": backend, "options": options, "rounds": ROUNDS, "variants": figures})
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _moved(module: nn.Module) -> nn.Module:
    """Return a copy on the GPU; what is compared with it is computed there too, in float32."""
    from fxprune.backends.base import inference_copy
    from fxprune.backends.place import Placement

    return Placement(torch.device(DEVICE)).module(inference_copy(module))


def main(
    file: Annotated[Path, Option("--json", help="The file that rows are added to.")] = RESULT,
    seconds: Annotated[float, Option(help="No row is begun after as many; call again for the rest.")] = 480.0,
    models: Annotated[list[str] | None, Option(help="Of bert-base, resnet50 and vit-l16; by default all.")] = None,
    batches: Annotated[list[int] | None, Option(help="Of 1, 8, 32 and 128; by default all, compiled 32.")] = None,
    fresh: Annotated[bool, Option("--fresh", help="Forget what the file has.")] = False,
) -> None:
    """Time the models on the GPU."""
    if not torch.cuda.is_available():
        print(f"nothing measured: torch {torch.__version__} finds no CUDA device")
        return
    if absent := missing_packages():
        raise SystemExit(f"bench.gpu needs {', '.join(absent)}, which this Python lacks; pip install fxprune")
    start = time.monotonic()
    data: dict[str, Any] = json.loads(file.read_text()) if file.exists() and not fresh else {}
    here = {"gpu": gpu(), "machine": machine.describe()}
    if data.get("rows") and data["gpu"] != here["gpu"]:
        raise SystemExit(f"{file.name} holds figures of {data['gpu']}, and this is {here['gpu']}; name another file")
    data |= here | {"share": SHARE, "round_to": MULTIPLE}
    rows: dict[str, Any] = data.setdefault("rows", {})

    def save(key: str, row: dict[str, Any]) -> None:
        rows[key] = row
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n")
        print(f"{time.monotonic() - start:5.0f} s  {key}", flush=True)

    for subject in SUBJECTS:
        wanted = [key for key in keys(subject, tuple(batches or ())) if key[0] not in rows]
        if (models and subject.name not in models) or not wanted or time.monotonic() - start > seconds:
            continue
        if missing_packages((subject.library,)):
            print(f"{subject.name} left out: {subject.library} is not installed")
            continue
        run(subject, wanted, save, lambda: time.monotonic() - start <= seconds)
    _show(rows)


def _show(rows: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(table(rows))
    console.print(f"{torch.cuda.get_device_name()}; {machine.stamp()}", style="dim", highlight=False)
    left = [key for subject in SUBJECTS for key, _, _ in keys(subject) if key not in rows]
    if left:
        console.print(f"{len(left)} rows are left; call again to go on: {', '.join(left)}")


if __name__ == "__main__":
    if missing_packages(("typer",)):
        print("typer is not installed: options are not read, the defaults hold")
        main()
    else:
        import typer

        typer.run(main)
