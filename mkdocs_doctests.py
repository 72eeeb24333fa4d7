"""An extension of griffe for the documentation site: doctests in docstrings become blocks of code.

Without a heading above them, griffe hands them on as text, in which `>>>` is a quotation in a quotation in a quotation.
"""

from __future__ import annotations

from typing import Any

import griffe


def fenced(text: str) -> str:
    r"""Return a docstring whose doctests, each up to the next empty line, are in fences.

    >>> print(fenced("Say so.\n\n>>> 1 + 1\n2\n\nEnd."))
    Say so.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    End.
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if not inside and line.startswith(">>>"):
            inside = True
            lines.append("```pycon")
        elif inside and not line.strip():
            inside = False
            lines.append("```")
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Doctests(griffe.Extension):
    """Puts the doctests of every object that is documented into fences."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
