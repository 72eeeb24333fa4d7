"""`fxprune bench`: saved models, models and files of other tools, timed in turns."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType

from fxprune.artefacts import FILES
from fxprune.backends.timing import LEAST_REPEATS
from fxprune.benchmark import bench as run
from fxprune.cli.console import Answer, Progress, command
from fxprune.cli.options import MODEL_HELP, Inputs, Json, parse_options

_WHAT = f"{MODEL_HELP.removesuffix('.')}; or {', '.join(FILES)}. Several are timed side by side."


@command
def bench(
    artefacts: Annotated[list[str], typer.Argument(metavar="MODEL", help=_WHAT, show_default=False)],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The reference, the dense model as a rule; by default the first MODEL."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="`fxprune backends`; repeat for several. By default the recipe's. Files run on their own.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of each backend that has it: dtype=float16. Repeat for several."),
    ] = None,
    inputs: Inputs = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="CPU threads; by default what torch uses. Repeat for several."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Batch size; by default that of the inputs. Repeat for several."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=LEAST_REPEATS, metavar="N", help="How often each MODEL is timed.")] = 30,
    as_json: Json = False,
) -> Answer:
    """Time models and files alternately, in one run, on the same inputs."""
    options = parse_options(option or ())
    with Progress().running() as progress:
        found = run(
            artefacts,
            against=against,
            backends=backend or (),
            options=options,
            inputs=inputs or (),
            threads=threads or (),
            batches=batch or (),
            rounds=rounds,
            progress=progress,
        )
    show: list[RenderableType] = [*(c.table() for c in found.combinations), *found.lines()]
    return Answer(found.to_json(), show)
