"""The page as Markdown: tables for everything, bars and boxes as characters."""

from __future__ import annotations

from collections.abc import Iterator

from fxprune.page.parts import Bar, Boxes, Cell, Code, Figure, Page, Part, Table, Text

#: Characters of a bar.
_WIDTH = 10


def markdown(page: Page) -> str:
    """Return the page as Markdown.

    >>> from fxprune.page.parts import Section
    >>> table = Table(("", "#kept"), [("x", Bar(0.5, "4"))])
    >>> print(markdown(Page("A model", "Half.", [Section("r", "Result", [table])])))
    # A model
    <BLANKLINE>
    Half.
    <BLANKLINE>
    ## Result
    <BLANKLINE>
    |  | kept |
    |---|---:|
    | x | █████░░░░░ 4 |
    <BLANKLINE>
    """
    lines = [f"# {page.title}", "", page.lead, ""]
    for section in page.sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            lines += [*_part(part), ""]
    return "\n".join(lines)


def _part(part: Part) -> Iterator[str]:
    match part:
        case Text():
            yield part.text
        case Code():
            yield from ("```", part.text, "```")
        case Figure():
            yield f"{part.about}"
            yield ""
            yield from _table(part.table)
        case Table():
            yield from _table(part)


def _table(table: Table) -> Iterator[str]:
    yield "| " + " | ".join(column.removeprefix("#") for column in table.columns) + " |"
    yield "|" + "|".join("---:" if column.startswith("#") else "---" for column in table.columns) + "|"
    for row in table.rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        full = round(min(cell.share, 1.0) * _WIDTH)
        return f"{'█' * full}{'░' * (_WIDTH - full)} {cell.text}"
    text = cell.text if isinstance(cell, Boxes) else cell
    return text.replace("|", "\\|").replace("\n", " ")
