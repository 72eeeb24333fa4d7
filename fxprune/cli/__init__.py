"""The command line: `fxprune compile MODEL --target macs=0.5 --out small/`.

One file for each family of commands; `options` has what they take and `console` what they print, and neither imports a
command.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import fxprune
from fxprune.cli import bench, compile, explain, export, lists, profile, report, sweep, train
from fxprune.cli.console import INTERNAL, INTERRUPTED
from fxprune.doctor import first_line
from fxprune.errors import FxpruneError, RecipeError
from fxprune.sources import FORMS

EXIT_CODES = {
    0: "done",
    **{e.exit_code: first_line(e.__doc__) for e in FxpruneError.__subclasses__()},
    2: f"{first_line(RecipeError.__doc__)}; or the command line is wrong",
    INTERNAL: "An error that fxprune did not expect; its traceback is printed",
    INTERRUPTED: "Stopped with Ctrl-C",
}
_EPILOG = "\n\n".join(
    [
        f"MODEL is one of: {', '.join(FORMS)}",
        "\n".join(["Exit codes:", *(f"{code:>4}  {EXIT_CODES[code]}." for code in sorted(EXIT_CODES))]),
    ]
)

app = typer.Typer(
    help="A pruning compiler for PyTorch: a smaller model of real layers, proved equal to the masked dense one.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# In the order of the help.
for _command in (
    compile.compile,
    sweep.sweep,
    train.train,
    report.report,
    explain.explain,
    explain.ops,
    bench.bench,
    profile.profile,
    export.export,
    lists.criteria,
    lists.backends,
    lists.doctor,
):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"fxprune {fxprune.__version__}\n")
        raise typer.Exit


def main() -> None:
    """Run the command line; what the script `fxprune` calls."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
