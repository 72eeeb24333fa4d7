"""The machine and the versions that figures were measured with: what stands under every table."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("torch", "onnxruntime", "timm", "transformers")
#: Tools that are compared with.
_PEERS = ("torch-pruning", "nvidia-modelopt", "onnxsim")


def _processor() -> str:
    """Return the processor's model name as the system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Return how many logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str | int]:
    """Return the processor, the cores this process may use, torch's threads, the versions and today's date (UTC).

    No host name and no path. Versions are read from the installed packages' metadata, so nothing heavy is imported.

    >>> set(describe()) >= {"cores", "date", "processor", "python", "threads", "timm", "torch", "torch-pruning"}
    True
    """
    return {
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in (*_PACKAGES, *_PEERS)},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def stamp() -> str:
    """Return `describe()` as one line; packages that are not installed are left out."""
    about = describe()
    versions = [f"{name} {about[name]}" for name in ("python", *_PACKAGES, *_PEERS) if about[name] != "not installed"]
    size = f"{about['cores']} cores, {about['threads']} threads"
    return f"{about['processor']}, {size}; {', '.join(versions)}; {about['date']}"
