"""The machine and the versions that figures were measured with: what stands under every table."""

from __future__ import annotations

import datetime
import platform

import torch

from fxprune.provenance import cores, processor, versions

_PACKAGES = ("torch", "onnxruntime", "timm", "transformers")
#: Tools that are compared with.
_PEERS = ("torch-pruning", "nvidia-modelopt", "onnxsim")


def describe() -> dict[str, str | int]:
    """Return the processor, the cores this process may use, torch's threads, the versions and today's date (UTC).

    No host name and no path. Versions are read from the installed packages' metadata, so nothing heavy is imported.

    >>> set(describe()) >= {"cores", "date", "processor", "python", "threads", "timm", "torch", "torch-pruning"}
    True
    """
    return {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **dict.fromkeys((*_PACKAGES, *_PEERS), "not installed"),
        **versions((*_PACKAGES, *_PEERS)),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def stamp() -> str:
    """Return `describe()` as one line; packages that are not installed are left out."""
    about = describe()
    said = [f"{name} {about[name]}" for name in ("python", *_PACKAGES, *_PEERS) if about[name] != "not installed"]
    size = f"{about['cores']} cores, {about['threads']} threads"
    return f"{about['processor']}, {size}; {', '.join(said)}; {about['date']}"
