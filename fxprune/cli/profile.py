"""`fxprune profile`: what each node of the graph that onnxruntime really runs takes, beside that of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import RenderableType

from fxprune.artefacts import file_tensors
from fxprune.backends import BACKENDS
from fxprune.backends.base import forward_signature
from fxprune.backends.onnx_profile import Profile, file_inputs, profile_file
from fxprune.cli.console import Answer, Progress, command, table
from fxprune.cli.options import MODEL_HELP, Batch, Inputs, Json, Threads, parse_options
from fxprune.errors import InputError
from fxprune.input_names import input_names, renamed
from fxprune.pruned import rebatch
from fxprune.saved import PLAN, load_pruned
from fxprune.sources import Source, resolve

#: What is profiled: the file of another tool, too.
_WHAT = f"FILE.onnx; or {MODEL_HELP}"


@command
def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_WHAT, show_default=False)],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model on the same inputs, node types side by side.")
    ] = None,
    inputs: Inputs = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help=f"Of the backend, {', '.join(BACKENDS['onnxruntime'].OPTIONS)}: dtype=float16. Repeat for several.",
        ),
    ] = None,
    threads: Threads = None,
    batch: Batch = None,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="How often the model is run.")] = 50,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="How many nodes are shown; --json has all.")] = 20,
    as_json: Json = False,
) -> Answer:
    """Show where the time of MODEL goes on onnxruntime, node by node."""
    how = _How(parse_options(option or ()), threads or torch.get_num_threads(), batch, runs)
    found: dict[str, Profile] = {}
    with Progress().running() as progress:
        first: Source | None = None
        for name in [model, *([against] if against else [])]:
            progress(f"profile {name}")
            if name.endswith(".onnx"):
                found[name] = how.file(Path(name), inputs or ())
                continue
            source = how.source(name, inputs or (), first)
            first = first or source
            found[name] = how.module(name, source, model)
    show: list[RenderableType] = [p.table(_title(name, p), top) for name, p in found.items()]
    if against and against != model:
        show.append(_side_by_side(model, found[model], against, found[against]))
    show.append("profiling itself takes some microseconds a node: time whole models with `fxprune bench`")
    data = {"model": model, "against": against, "profiles": {name: p.to_json() for name, p in found.items()}}
    return Answer(data, show)


class _How:
    """The options of the command that hold for every model."""

    def __init__(self, options: Mapping[str, Any], threads: int, batch: int | None, runs: int) -> None:
        self.backend = BACKENDS["onnxruntime"].configured(**options)
        self.threads, self.batch, self.runs = threads, batch, runs

    def source(self, name: str, inputs: Sequence[str], first: Source | None) -> Source:
        """A module with inputs: those of the first model where there is one."""
        source = resolve(name, inputs, needs_inputs=first is None)
        args, kwargs = (source.args, source.kwargs) if first is None else (first.args, first.kwargs)
        return Source(source.module, *rebatch(args, kwargs, self.batch), source.notes)

    def module(self, name: str, source: Source, saved: str) -> Profile:
        """Build as `Pruned.export` does, with the sizes open that the saved model has open; any other is fixed."""
        dynamic: dict[str, dict[int, str]] = {}
        if (Path(saved) / PLAN).is_file():
            pruned = load_pruned(saved)
            own, theirs = (
                input_names(forward_signature(m), source.args, source.kwargs)
                for m in (pruned.graph_module(), source.module)
            )
            dynamic = renamed(pruned.plan.dynamic, own, theirs)
        runner: Any = self.backend.build(
            source.module, source.args, source.kwargs, threads=self.threads, dynamic=dynamic or False
        )
        result: Profile = runner.profile(*source.args, runs=self.runs, **source.kwargs)
        return result

    def file(self, path: Path, inputs: Sequence[str]) -> Profile:
        """Run a file on random inputs of its types, of the sizes that it says or the user does."""
        if not path.is_file():
            raise InputError(f"'{path}' does not exist")
        tensors = file_tensors(str(path), file_inputs(path), inputs, self.batch)
        feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
        provider = self.backend.options["provider"]
        return profile_file(path, feeds, threads=self.threads, provider=provider, runs=self.runs)


def _title(name: str, found: Profile) -> str:
    return f"{name}: {found.microseconds:,.0f} us in {len(found.nodes)} nodes, medians of {found.runs} runs"


def _side_by_side(name: str, own: Profile, other_name: str, other: Profile) -> RenderableType:
    """Types of nodes, the slowest of either first."""
    ours, theirs = own.by_operator(), other.by_operator()
    rows = table("operator", f"#{name}, us", f"#{other_name}, us", "#times less", title="By type of node")
    for kind in sorted({*ours, *theirs}, key=lambda k: -max(ours.get(k, 0.0), theirs.get(k, 0.0))):
        us, them = ours.get(kind), theirs.get(kind)
        ratio = f"{them / us:.2f}" if us and them else ""
        rows.add_row(kind, *("" if n is None else f"{n:,.0f}" for n in (us, them)), ratio)
    return rows
