"""Where commands write: refused at once where it would fail after hours of work."""

from __future__ import annotations

from pathlib import Path

from fxprune.errors import InputError, SavedModelError
from fxprune.saved import PLAN


def check_places(out: Path, onnx: Path | None, overwrite: bool) -> None:
    """Refuse a folder for a saved model, or an ONNX file, that could not be written.

    Raises:
        SavedModelError: something is there already.
        InputError: the file's name has another ending.
    """
    if out.exists() and not (overwrite and (out / PLAN).is_file()):
        saved = (out / PLAN).is_file()
        what = "holds a saved model; pass --overwrite" if saved else "is not a model that fxprune saved; move it away"
        raise SavedModelError(f"'{out}' exists and {what}, or choose another name")
    if onnx is not None and onnx.suffix != ".onnx":
        raise InputError(f"--onnx {onnx}: the name must end in .onnx")
    if onnx is not None and onnx.exists() and not overwrite:
        raise SavedModelError(f"'{onnx}' exists; pass --overwrite, or choose another name")
