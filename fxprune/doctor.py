"""What is installed here and what of it works: versions, and each backend or the reason why it cannot be used."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fxprune
from fxprune.backends import BACKENDS
from fxprune.sources import failing_package, root_cause

#: Distribution -> what of fxprune needs it.
PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "networkx": "dependency graphs",
    "scipy": "allocation",
    "pydantic": "recipes",
    "PyYAML": "recipes",
    "safetensors": "saved models",
    "typer": "command line",
    "rich": "command line",
    "onnx": "backend onnxruntime",
    "onnxscript": "backend onnxruntime",
    "onnxruntime": "backend onnxruntime",
    "onnx_ir": "backends tensorrt and tensorrt-rtx",
    "tensorrt": "backend tensorrt",
    "tensorrt-rtx": "backend tensorrt-rtx",
    "matplotlib": "plots",
    "timm": "timm:NAME",
    "transformers": "hf:DIRECTORY",
}
#: Packages that often do not fit the torch beside them, and what to import of them to see that.
FRAGILE = {"timm": "timm", "transformers": "transformers.modeling_utils"}


@dataclass(frozen=True, slots=True)
class Package:
    """A package: its version (None: not installed), what needs it, and why it cannot be imported (None: it can)."""

    name: str
    version: str | None
    needed_by: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class BackendState:
    """A backend, one line on what it is, and the reason why it cannot be used (None: it can)."""

    name: str
    about: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The machine, the packages and the backends."""

    fxprune: str
    python: str
    system: str
    cpus: int
    threads: int
    gpu: str | None
    packages: tuple[Package, ...]
    backends: tuple[BackendState, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at everything; imports timm and transformers, where they are installed, to see whether that works."""
    return Diagnosis(
        fxprune=fxprune.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        packages=tuple(_package(name, needed_by) for name, needed_by in PACKAGES.items()),
        backends=backend_states(),
    )


def backend_states() -> tuple[BackendState, ...]:
    """Return every registered backend with what it is and whether it can be used here."""
    return tuple(
        BackendState(name, first_line(type(BACKENDS[name]).__doc__), BACKENDS[name].available()) for name in BACKENDS
    )


def first_line(doc: str | None) -> str:
    """Return the first line of a docstring without its full stop.

    >>> first_line(first_line.__doc__)
    'Return the first line of a docstring without its full stop'
    """
    return (doc or "").strip().partition("\n")[0].rstrip(".")


def first_sentence(doc: str | None) -> str:
    r"""Return the first sentence of a docstring, on one line and without its full stop.

    >>> first_sentence("Two lines of\n    text. Another sentence.")
    'Two lines of text'
    """
    paragraph = " ".join((doc or "").strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def _package(name: str, needed_by: str) -> Package:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, None, needed_by, None)
    return Package(name, version, needed_by, _problem(FRAGILE[name]) if name in FRAGILE else None)


def _problem(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # anything can go wrong while a package of somebody else is imported
        cause = root_cause(error)
        text = str(cause).strip().splitlines()
        culprit = failing_package(cause) or name
        return f"cannot be imported: {type(cause).__name__} in {culprit}: {text[0] if text else 'no message'}"
    return None
