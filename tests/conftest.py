"""What every test gets: as many threads as it has cores, the same seed, and model libraries that can be imported."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from bench.shims import shim_torchvision
from fxprune.backends import BACKENDS
from fxprune.backends.base import Runner
from fxprune.backends.timing import LEAST_REPEATS, Comparison, Latency

# Examples drawn anew each run belong into `make fuzz`; a test that fails must fail again. The machine may be busy, so
# that the time an example takes says nothing.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")

# Two processes with two threads each, on two cores, wait for one another in every small operator.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
shim_torchvision()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Make what a test draws the same in every run and whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def global_state_kept() -> Iterator[None]:
    """Fail a test that leaves torch with another number of threads or another default type than it found."""
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == before


class Counted(Runner):
    """A clock that no other process disturbs: a call takes one microsecond and one nanosecond a weight."""

    def __init__(self, module: nn.Module) -> None:
        self.seconds = 1e-6 + 1e-9 * sum(p.numel() for p in module.parameters())

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        Counted.passed += self.seconds
        return []

    def describe(self) -> dict[str, Any]:
        return {}

    passed = 0.0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Counted]:
    """Backend torch on the counted clock; what makes a runner of a module."""

    def compare(runs: dict[str, Callable[[], object]], *, reference: str, **_: Any) -> Comparison:
        latencies = {}
        for name, run in runs.items():
            before = Counted.passed
            run()
            latencies[name] = Latency((Counted.passed - before,) * LEAST_REPEATS, 1)
        return Comparison(reference, latencies, 0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fxprune.passes.meet.compare", compare)
    monkeypatch.setattr("fxprune.passes.latency.compare", compare)
    monkeypatch.setattr(type(BACKENDS["torch"]), "_build", lambda self, module, *rest: Counted(module))
    return Counted
