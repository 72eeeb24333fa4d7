"""Result files: JSON that is written after every row, and gone on from where a run was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def opened(file: Path, resume: bool, **settings: Any) -> dict[str, Any]:
    """Return what a file holds, to go on from, or a new document with these settings.

    Raises:
        typer.BadParameter: the file was measured with other settings; its rows would be passed off as made with these.

    >>> opened(Path("no such file.json"), True, rounds=3)
    {'rounds': 3}
    """
    found: dict[str, Any] = json.loads(file.read_text()) if resume and file.exists() else {}
    for name, value in settings.items():
        if found.setdefault(name, value) != value:
            said = f"{file.name} was measured with {name} {found[name]!r}, not {value!r}"
            raise typer.BadParameter(f"{said}: name another file, or do not resume")
    return found


def write(file: Path, document: dict[str, Any]) -> None:
    """Write a document; a reader, or a run that is interrupted meanwhile, finds the old file or all of the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(file)
