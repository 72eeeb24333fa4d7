"""What commands return, how it is printed, and how they fail.

Each command returns an `Answer`: what `--json` prints, and what a person reads. Standard output holds that and nothing
else; progress, warnings, and whatever models and libraries print, goes to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fxprune.errors import FxpruneError

#: Exit codes beside those of `fxprune.errors`: a defect, and Ctrl-C.
INTERNAL, INTERRUPTED = 70, 130
#: Columns of what is piped into a file.
WIDTH = 100
#: Where fxprune's own modules lie.
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(slots=True)
class Answer:
    """What a command found out.

    Attributes:
        data: for `--json`.
        show: for people.
        failure: an error that came after something worth printing; decides the exit code.
    """

    data: dict[str, Any]
    show: list[RenderableType]
    failure: FxpruneError | None = None


def _out() -> Console:
    """Standard output, wide enough for tables where it is not a terminal."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if fixed else WIDTH, highlight=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(answer.data, indent=1) + "\n")
        return
    console = _out()
    for item in answer.show:
        # Sentences wrap in the terminal itself, so that a command line in them can be copied.
        console.print(item, markup=False, soft_wrap=isinstance(item, str | Text))


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show fxprune's own warnings as one line each, without the place in its code that they come from."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
            if _PACKAGE in Path(filename).resolve().parents:
                _err().print(Text.assemble(("warning: ", "bold yellow"), str(message)), soft_wrap=True)
            else:
                usual(message, category, filename, *rest)

        warnings.showwarning = show  # type: ignore[assignment]  # the rest is handed on as it is
        yield


def _fail(error: FxpruneError, as_json: bool) -> typer.Exit:
    _err().print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    if as_json:
        data = {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        sys.stdout.write(json.dumps({"error": data}, indent=1) + "\n")
    return typer.Exit(error.exit_code)


def command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make of a function that returns an Answer one that prints it, or its error, and exits with the right code."""

    @functools.wraps(function)
    def run(*args: Any, as_json: bool, **kwargs: Any) -> None:
        try:
            # A model's own `print` must not end up between the braces of `--json`, nor in a table.
            with contextlib.redirect_stdout(sys.stderr), _plain_warnings():
                answer = function(*args, as_json=as_json, **kwargs)
            if not (as_json and answer.failure):
                _print(answer, as_json)
            if answer.failure is not None:
                raise answer.failure
        except FxpruneError as error:
            raise _fail(error, as_json) from None
        except KeyboardInterrupt:
            _err().print("stopped")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever reads has seen enough: typer ends quietly
            raise
        except Exception:
            traceback.print_exc()
            _err().print(
                "fxprune did not expect this error. Please report it with the traceback above and what "
                "`fxprune doctor` prints",
                soft_wrap=True,
            )
            raise typer.Exit(INTERNAL) from None

    return run


class Progress:
    """A spinner with the name of what runs, on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self._status: Any = None

    def __call__(self, stage: str) -> None:
        """Say that a stage begins."""
        if self._status is not None:
            self._status.update(stage)

    @contextlib.contextmanager
    def running(self) -> Iterator[Progress]:
        """Show the spinner while the block runs."""
        console = _err()
        if not console.is_terminal:
            yield self
            return
        with console.status("starting") as self._status:
            yield self
        self._status = None


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; columns that begin with `#` hold numbers. Long names are folded, never cut off."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for column in columns:
        number = column.startswith("#")
        result.add_column(
            column.removeprefix("#"), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return result
