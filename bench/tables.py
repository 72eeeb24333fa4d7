"""What parts of pages are made of: the documents that `bench` writes, and Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markdown import Markdown

Documents = dict[str, dict[str, Any]]
"""The contents of the result files that are there, by their names."""


class Missing(LookupError):
    """What a part would show has not been measured."""


@dataclass(frozen=True, slots=True)
class Part:
    """A generated part: the files it is made of, the command that writes them, how it is made, and where it stands."""

    files: tuple[str, ...]
    command: str
    render: Callable[[Documents], list[str]]
    page: str = "README.md"


def required(documents: Documents, name: str) -> dict[str, Any]:
    """Return a document.

    Raises:
        Missing: it is not there.
    """
    if name not in documents:
        raise Missing(f"`bench/results/{name}` is not there")
    return documents[name]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table.

    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    return [f"| {' | '.join(row)} |" if row else "|" + "---|" * len(head) for row in [head, [], *rows]]


def shown(lines: Sequence[str]) -> Markdown:
    """Return what a terminal shows of a part of a page."""
    return Markdown("\n".join(lines))


def plural(number: int, what: str) -> str:
    """Return a number of things.

    >>> plural(1, "seed"), plural(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
