"""What a page is made of, whatever it is written in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to be read or copied as they are."""

    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A share of a whole, drawn and said: 384 of 512."""

    share: float
    text: str


@dataclass(frozen=True, slots=True)
class Boxes:
    """Which of some things are still there, heads of a layer for example."""

    kept: tuple[bool, ...]

    @property
    def text(self) -> str:
        """Return them as squares, full where something stays.

        >>> Boxes((True, False)).text
        '■□'
        """
        return "".join("■" if kept else "□" for kept in self.kept)


Cell = str | Bar | Boxes


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells.

    Attributes:
        columns: their titles; those that begin with `#` hold numbers.
        folded: a summary under which the table is folded away, where it is long.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    folded: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing, and the same as a table for those who do not see it.

    Attributes:
        svg: the drawing, or "" where there is nothing to draw with.
        about: what it shows, in a sentence.
    """

    svg: str
    about: str
    table: Table


Part = Text | Code | Table | Figure


@dataclass(frozen=True, slots=True)
class Section:
    """A headed part of the page.

    Attributes:
        listed: what the list of contents calls it, "" where it is not in it.
    """

    name: str
    title: str
    parts: list[Part]
    listed: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """All of it.

    Attributes:
        title: of the page.
        lead: the result in a sentence or two.
    """

    title: str
    lead: str
    sections: list[Section] = field(default_factory=list)
