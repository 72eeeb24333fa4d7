"""Python objects by name: `FILE.py:NAME` or `MODULE:NAME`, as the command line takes models, data and functions."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fxprune.errors import InputError
from fxprune.registry import nearest

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:\w*")


def is_name(text: str) -> bool:
    """Whether a text is a name that `load` reads, or a Python file without one.

    >>> is_name("nets.py:net"), is_name("nets.py"), is_name("torch.nn.functional:mse_loss"), is_name("data.npz")
    (True, True, True, False)
    """
    return text.rpartition(":")[0].endswith(".py") or text.endswith(".py") or _MODULE.fullmatch(text) is not None


def load(text: str, wanted: str, seed: int = 0) -> Any:
    """Return what a name stands for; the file or module is run once, with the random state left as it was.

    Args:
        wanted: what it should be, for messages: "a function that returns a module".
        seed: of what the file draws while it is run.

    Raises:
        InputError: there is no such file, module or name, or running it fails.

    >>> load("math:pi", "a number")
    3.141592653589793
    """
    place, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    path = Path(place) if place.endswith(".py") else None
    if path is not None and not path.is_file():
        raise InputError(f"there is no file '{path}'")
    if not name:
        raise InputError(f"'{place}' needs the name of {wanted}: {place}:NAME. {_defined(path)}".removesuffix(". "))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _module(place) if path is None else _file(path.resolve(), path, path.stat().st_mtime_ns, seed)
    if not hasattr(module, name):
        known = _names(path) if path is not None else [n for n in vars(module) if not n.startswith("_")]
        raise InputError(f"'{place}' has no '{name}'{nearest(name, known) or '.'} {_defined(path)}".rstrip(". "))
    return getattr(module, name)


def call(text: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what `load` gave, with its errors as InputError: the user's code and not fxprune's has failed."""
    try:
        return function(*arguments)
    except Exception as error:
        raise InputError(failed(text, error)) from error


def failed(text: str, error: BaseException) -> str:
    """Return that a name's code failed, and where, in one line."""
    place = text.rpartition(":")[0]
    return f"'{text}' failed: {_where(error, Path(place) if place.endswith('.py') else None)}"


def function(text: str, wanted: str, seed: int = 0) -> Callable[..., Any]:
    """Return the function that a name stands for.

    Raises:
        InputError: see `load`; or it is no function.

    >>> function("math:pi", "a function (output, labels) -> loss")
    Traceback (most recent call last):
        ...
    fxprune.errors.InputError: 'math:pi' is of type float, not a function (output, labels) -> loss
    """
    if not is_name(text):
        raise InputError(f"'{text}' does not name {wanted}: write FILE.py:NAME or MODULE:NAME")
    found = load(text, wanted, seed)
    if isinstance(found, type) or not callable(found):
        kind = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise InputError(f"'{text}' is {kind}, not {wanted}")
    result: Callable[..., Any] = found
    return result


@functools.lru_cache(maxsize=64)
def _file(path: Path, given: Path, _changed: int, _seed: int) -> ModuleType:
    """Run a file; once for a model, its data and its loss together, so that they share their classes."""
    # Under a name of its own, so that a file called torch.py hides nothing.
    name = f"fxprune_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    # Its neighbours can be imported, as when Python runs the file; also later, from inside a function.
    _importable(path.parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"'{given}' cannot be imported: {_where(error, path)}") from error
    return module


def _module(name: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"there is no module '{error.name}' here or among the installed ones") from None
        raise InputError(f"'{name}' cannot be imported: {_where(error, None)}") from error
    except Exception as error:
        raise InputError(f"'{name}' cannot be imported: {_where(error, None)}") from error


def _importable(folder: Path) -> None:
    if (text := str(folder.resolve())) not in sys.path:
        sys.path.append(text)


def _names(path: Path) -> list[str]:
    """What a file defines, without running it."""
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return [n for n in dict.fromkeys(found) if not n.startswith("_")]


def _defined(path: Path | None) -> str:
    if path is None:
        return ""
    names = _names(path)
    return f"It defines: {', '.join(names)}" if names else "It defines nothing"


def _where(error: BaseException, path: Path | None) -> str:
    """An exception in one line, with the last line of the user's file that it came through."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if path is not None and Path(frame.tb_frame.f_code.co_filename).resolve() == path.resolve():
            line = frame.tb_lineno
        frame = frame.tb_next
    at = f" (line {line})" if line else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}{at}"
