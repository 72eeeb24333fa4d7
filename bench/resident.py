"""Memory of a process as the system counts it, and work done in a fresh process so that nothing before it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status(field: str) -> int:
    """Return a field of the kernel's account of this process, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{STATUS} has no {field}")


def start() -> int:
    """Return the bytes that are resident now; where the kernel allows it, the peak is counted from now on."""
    if not STATUS.exists():
        return peak()
    _CLEAR.write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the most bytes that were resident since `start`; without Linux since the process began."""
    if STATUS.exists():
        return _status("VmHWM")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def child(module: str, *arguments: str) -> Any:
    """Run a program in a process of its own and return what it printed last, as JSON; an `error` where it failed."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])
