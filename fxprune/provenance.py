"""Where a result comes from: versions, machine, date, data, and the command that makes it again."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

#: What a result may depend on.
PACKAGES = ("torch", "numpy", "scipy", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result comes from.

    Attributes:
        versions: of fxprune, Python and the packages that are installed.
        processor, cores, threads: the machine, as `machine` says, and torch's threads.
        date: of the compilation, UTC.
        data: fingerprint of the calibration data, None without: see `fingerprint`.
        command: that makes the same again; "" where there was no command line.
    """

    versions: dict[str, str] = field(default_factory=dict)
    processor: str = ""
    cores: int = 0
    threads: int = 0
    date: str = ""
    data: str | None = None
    command: str = ""

    def line(self) -> str:
        """Return machine, versions and date in a sentence."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.processor}, {self.cores} cores, {self.threads} threads; {versions}; {self.date}"


def provenance(data: Any = None) -> Provenance:
    """Return where what is made now comes from.

    Args:
        data: what it is made of, tensors in lists, tuples and dicts; None where there is none.
    """
    import fxprune

    return Provenance(
        versions={"fxprune": fxprune.__version__, "python": platform.python_version(), **versions(PACKAGES)},
        processor=processor(),
        cores=cores(),
        threads=torch.get_num_threads(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        data=None if data is None else fingerprint(data),
    )


def fingerprint(value: Any) -> str:
    """Return the beginning of the SHA-256 of the values, shapes and types of all tensors in a structure, and the rest.

    >>> fingerprint([torch.arange(3), "a"]) == fingerprint([torch.arange(3), "a"])
    True
    >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(3, 2))
    False
    """
    digest = hashlib.sha256()
    leaves, spec = pytree.tree_flatten(value)
    digest.update(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, read from their metadata: nothing is imported."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the processor's model name as the system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
