"""`fxprune report`: what was asked, what was reached and why, as one HTML page and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from fxprune.cli.console import Answer, command
from fxprune.cli.options import Json
from fxprune.errors import InputError, SavedModelError
from fxprune.page import html, markdown, page, read


@command
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIRECTORY...", help="What `fxprune compile` or `fxprune sweep` saved.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="The page; by default report.html in the first directory."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE.md", help="The same as Markdown; by default beside the page."),
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Write a page about saved models: one file that opens in any browser, and the same as Markdown."""
    target = out or directories[0] / "report.html"
    beside = text or target.with_suffix(".md")
    for flag, file, ending in (("--out", target, ".html"), ("--markdown", beside, ".md")):
        if file.suffix != ending:
            raise InputError(f"{flag} {file}: the name must end in {ending}")
    found = page(*read(directories))
    written = {target: html(found), beside: markdown(found)}
    for file, content in written.items():
        try:
            file.write_text(content, encoding="utf-8")
        except OSError as error:
            raise SavedModelError(f"'{file}' cannot be written: {error.strerror}") from error
    files = {str(file): file.stat().st_size for file in written}
    return Answer({"files": files}, [found.lead, *(f"wrote  {f} ({decimal(n)})" for f, n in files.items())])
