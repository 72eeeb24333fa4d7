"""Python's standard library as text: its sources, and the docstrings in them with the module each comes from.

Files are read and parsed, never executed. What there is depends on the version of the running Python.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Directories of the standard library that hold test data, other people's packages or sources of another Python.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
_WORD = re.compile(r"[A-Za-z]{2,}")
_FEWEST = 4  # words; shorter texts ("Return self.") say too little to tell them apart
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclass(frozen=True, slots=True)
class Docstring:
    """One docstring, white space reduced to single spaces.

    Attributes:
        module: the top-level module or package it is from: "asyncio" for asyncio/events.py.
        summary: its first paragraph.
        rest: the other paragraphs, often none.
    """

    module: str
    summary: str
    rest: str

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.summary} {self.rest}".rstrip()

    def halves(self) -> tuple[str, str]:
        """Return the first sentence and everything after it, which may be empty.

        >>> Docstring("m", "Open it. Twice.", "More.").halves()
        ('Open it.', 'Twice. More.')
        """
        first, *more = _SENTENCE.split(self.summary, maxsplit=1)
        return first, " ".join(filter(None, [*more, self.rest]))


def says_something(text: str) -> bool:
    """Whether a text has enough words to be told from others."""
    return len(_WORD.findall(text)) >= _FEWEST


def split(items: Sequence[T], share: float, seed: int = 0) -> tuple[list[T], list[T]]:
    """Shuffle and cut into two: the first has the given share of the items; the same cut for the same seed.

    >>> [len(part) for part in split(range(10), 0.2)]
    [2, 8]
    """
    mixed = list(items)
    random.Random(seed).shuffle(mixed)
    cut = round(len(mixed) * share)
    return mixed[:cut], mixed[cut:]


@functools.cache
def files() -> tuple[tuple[str, bytes], ...]:
    """Return (path from the library's directory, with forward slashes; content) of every source, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _SKIPPED.isdisjoint(inside.parts):
            found.append((inside.as_posix(), path.read_bytes()))
    return tuple(found)


def parse(source: str, module: str = "") -> Iterator[Docstring]:
    r"""Yield the docstrings of a module, its classes and their functions, in source order.

    Raises SyntaxError where the source does not parse.

    >>> [found.text for found in parse("def f():\n    '''One thing\n    and another.\n\n    More.'''")]
    ['One thing and another. More.']
    """
    waiting: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if text := ast.get_docstring(node):
            summary, _, rest = text.partition("\n\n")
            yield Docstring(module, " ".join(summary.split()), " ".join(rest.split()))
        # Only bodies are followed, not expressions: walking those too takes longer than all the rest.
        inner = (item for item in node.body if isinstance(item, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
        waiting.extend(reversed(list(inner)))


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """Parse many sources: no warnings about old ones, and no garbage collection, which would take half of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collecting:
            gc.enable()


@functools.cache
def docstrings() -> tuple[Docstring, ...]:
    """Return every docstring of the running Python's standard library, in the order of its files."""
    found: list[Docstring] = []
    with _parsing():
        for path, content in files():
            try:
                found.extend(parse(content.decode(), path.split("/")[0].removesuffix(".py")))
            except (SyntaxError, UnicodeDecodeError):
                continue  # templates and files in an old encoding
    return tuple(found)
