"""`python -m bench`: a page that lists the suites; `python -m bench SUITE ...` runs them, `--quick` a little of each.

Each program of a suite has a process of its own, so that none meets the memory, threads or imports of another, and a
crash ends nothing but itself. Results go to `bench/results`, those of a quick run to a folder of their own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.suites import RESULTS, SUITES, Suite

QUICK_RESULTS = Path("bench-quick")
#: Columns of what is piped into a file.
WIDTH = 120


def _minutes(number: float) -> str:
    """Return a duration as the page shows it.

    >>> _minutes(1.5), _minutes(20), _minutes(90), _minutes(0)
    ('1.5 min', '20 min', '1.5 h', '-')
    """
    if number >= 60:
        return f"{number / 60:g} h"
    return f"{number:g} min" if number else "-"


def page(console: Console) -> None:
    """Print what suites there are."""
    table = Table(title="suites: python -m bench SUITE ...", title_justify="left", show_lines=True)
    table.add_column("suite", no_wrap=True)
    table.add_column("measures")
    table.add_column("beside")
    table.add_column("file", overflow="fold")
    table.add_column("all", justify="right", no_wrap=True)
    table.add_column("quick", justify="right", no_wrap=True)
    table.add_column("GPU")
    for suite in SUITES.values():
        times = map(_minutes, suite.minutes)
        cells = (
            suite.name,
            suite.what,
            suite.peers,
            "\n".join(suite.files),
            *times,
            "needs one" if suite.gpu else "no",
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for suite in SUITES.values():
        for note in suite.notes:
            console.print(Text(f"{suite.name}: {note}"))
    quick = sum(suite.minutes[1] for suite in SUITES.values())
    console.print(
        "Times are estimates for two idle cores. Files lie in bench/results. `--quick` runs a little of all that "
        f"need no GPU, in about {_minutes(quick)}, and writes to {QUICK_RESULTS}/ (`--out`). `--resume` goes on from "
        "an interruption. `python -m bench.NAME --help` has each program's own options; `python -m bench.readme` puts "
        "the figures into README.md.",
        highlight=False,
        markup=False,
    )


def run(suite: Suite, folder: Path, quick: bool, resume: bool, console: Console) -> str | None:
    """Run a suite's programs one after the other; return why it failed, None where it did not."""
    if (reason := suite.missing()) is not None:
        return f"not run: {reason}"
    failures = []
    for step in suite.steps:
        arguments = step.arguments(folder, quick, resume)
        console.print(Text(" ".join(["python", *arguments]), style="dim"), soft_wrap=True)
        last = ""
        with subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True) as program:
            assert program.stderr is not None
            for line in program.stderr:
                sys.stderr.write(line)
                last = line.strip(" \n╭─╮│╰╯") or last
        if program.returncode:
            failures.append(f"{step.module} ended with exit code {program.returncode}{': ' if last else ''}{last}")
    return "; ".join(failures) or None


def main(
    suites: Annotated[list[str] | None, typer.Argument(help="Names; without any, a page that lists them.")] = None,
    quick: Annotated[
        bool, typer.Option(help="A little of each: of all that need no GPU, where none is named.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the files that are there.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Folder of the results; by default bench/results, {QUICK_RESULTS} for a quick run."),
    ] = None,
) -> None:
    """List the benchmark suites, or run some of them."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    unknown = [name for name in suites or () if name not in SUITES]
    if unknown:
        raise typer.BadParameter(f"there is no suite {', '.join(map(repr, unknown))}; the suites: {', '.join(SUITES)}")
    if not suites and not quick:
        page(console)
        return
    folder = out or (QUICK_RESULTS if quick else RESULTS)
    if quick and folder.resolve() == RESULTS.resolve():
        raise typer.BadParameter("a quick run does not write over bench/results; name another folder with --out")
    chosen = [SUITES[name] for name in suites] if suites else [s for s in SUITES.values() if not s.gpu]
    table = Table(title=f"{'quick run' if quick else 'run'}: {folder}", title_justify="left")
    for column in ("suite", "result", "minutes"):
        table.add_column(column, justify="right" if column == "minutes" else "left", overflow="fold")
    failed = False
    for suite in chosen:
        console.rule(Text(suite.name), align="left")
        start = time.monotonic()
        try:
            reason = run(suite, folder, quick, resume, console)
        except KeyboardInterrupt:
            console.print(table)
            console.print(f"{suite.name} was interrupted; call again with --resume", markup=False)
            raise typer.Exit(130) from None
        failed |= reason is not None
        result = reason or ", ".join(str(folder / file) for file in suite.files)
        table.add_row(
            Text(suite.name), Text(result, style="red" if reason else ""), f"{(time.monotonic() - start) / 60:.1f}"
        )
    console.print(table)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
