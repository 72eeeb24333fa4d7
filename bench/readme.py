"""`python -m bench.readme`: put the figures of bench/results into README.md and docs/, or with `--check` say where they
differ.

What stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` is made of the JSON files by the function of that
name in PARTS (`bench.readme_tables`), on the page that it names, and of nothing else. A part whose file is missing, or
lacks what it would show, is a line that says which command measures it.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from bench.readme_tables import PARTS
from bench.suites import RESULTS
from bench.tables import Missing, Part

ROOT = Path(__file__).parent.parent
PAGES = tuple(dict.fromkeys(part.page for part in PARTS.values()))
_BLOCK = re.compile(r"<!-- bench:(?P<name>\S+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?bench:(\S+) -->")


class MarkerError(ValueError):
    """The markers of a page are not what PARTS expects."""


def rendered(part: Part, results: Path) -> str:
    """Return what stands between a part's markers, with a line break at its end."""
    documents: dict[str, Any] = {}
    for name in part.files:
        file = results / name
        if file.exists():
            documents[name] = json.loads(file.read_text(encoding="utf-8"))
    try:
        lines = part.render(documents)
    except Missing as missing:
        lines = [f"*{missing}: `{part.command}` measures it.*"]
    return "\n".join(lines) + "\n"


def rewritten(text: str, page: str, results: Path) -> str:
    """Return the text of a page with each of its parts made anew.

    Raises:
        MarkerError: a part has no markers, or twice, or there are markers that belong to no part.
    """
    marks = _MARK.findall(text)
    parts = [name for name, part in PARTS.items() if part.page == page]
    wrong = [name for name in parts if marks.count(name) != 2] + [name for name in marks if name not in parts]
    names = [block["name"] for block in _BLOCK.finditer(text)]
    wrong += [name for name in marks if name not in names]
    if wrong:
        raise MarkerError(
            f"{page}: markers of {', '.join(dict.fromkeys(wrong))} are missing, doubled, crossed or unknown; every "
            f"part stands once between <!-- bench:NAME --> and <!-- /bench:NAME -->: {', '.join(parts)}"
        )
    return _BLOCK.sub(
        lambda block: (
            f"<!-- bench:{block['name']} -->\n{rendered(PARTS[block['name']], results)}<!-- /bench:{block['name']} -->"
        ),
        text,
    )


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 and a diff where it differs.")
    ] = False,
    root: Annotated[Path, typer.Option(help="The folder with the pages.")] = ROOT,
    results: Annotated[Path, typer.Option(help="The folder with the JSON files.")] = RESULTS,
) -> None:
    """Rewrite the generated parts of README.md and docs/ from the measured figures."""
    console = Console(soft_wrap=True)
    before = {page: (root / page).read_text(encoding="utf-8") for page in PAGES}
    try:
        after = {page: rewritten(text, page, results) for page, text in before.items()}
    except MarkerError as error:
        raise typer.BadParameter(str(error)) from error
    for page, text in after.items():
        old, new = before[page].splitlines(), text.splitlines()
        for line in difflib.unified_diff(old, new, page, f"{page} from {results.name}", "", "", 1, ""):
            console.print(Text(line, style={"+": "green", "-": "red"}.get(line[:1], "")))
        if before[page] == text:
            console.print(f"{page} says what the results say", markup=False)
        elif not check:
            (root / page).write_text(text, encoding="utf-8")
    if check and before != after:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
