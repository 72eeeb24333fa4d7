"""`python -m bench.readme`: put the figures of bench/results into README.md, or with `--check` say where it differs.

What stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` is made of the JSON files by the function of that
name in PARTS (`bench.readme_tables`), and of nothing else. A part whose file is missing, or lacks what it would show,
is a line that says which command measures it.
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

from bench.readme_tables import PARTS, Missing, Part
from bench.suites import RESULTS

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"<!-- bench:(?P<name>\S+) -->\n(?P<body>.*?)<!-- /bench:(?P=name) -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?bench:(\S+) -->")


class MarkerError(ValueError):
    """The markers of README.md are not what PARTS expects."""


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


def rewritten(text: str, results: Path) -> str:
    """Return a README with every part made anew.

    Raises:
        MarkerError: a part has no markers, or twice, or there are markers that belong to no part.
    """
    marks = _MARK.findall(text)
    wrong = [name for name in PARTS if marks.count(name) != 2] + [name for name in marks if name not in PARTS]
    names = [block["name"] for block in _BLOCK.finditer(text)]
    wrong += [name for name in marks if name not in names]
    if wrong:
        raise MarkerError(
            f"markers of {', '.join(dict.fromkeys(wrong))} are missing, doubled, crossed or unknown; every part stands "
            f"once between <!-- bench:NAME --> and <!-- /bench:NAME -->: {', '.join(PARTS)}"
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
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = README,
    results: Annotated[Path, typer.Option(help="The folder with the JSON files.")] = RESULTS,
) -> None:
    """Rewrite the generated parts of README.md from the measured figures."""
    console = Console(soft_wrap=True)
    before = readme.read_text(encoding="utf-8")
    try:
        after = rewritten(before, results)
    except MarkerError as error:
        raise typer.BadParameter(f"{readme.name}: {error}") from error
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), readme.name, f"{readme.name} from {results.name}", "", "", 1, ""
    )
    for line in lines:
        console.print(Text(line, style={"+": "green", "-": "red"}.get(line[:1], "")))
    if before == after:
        console.print(f"{readme.name} says what the results say", markup=False)
    elif check:
        raise typer.Exit(1)
    else:
        readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
