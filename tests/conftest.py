"""What every test gets: as many threads as it has cores, the same seed, and model libraries that can be imported."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from bench.shims import shim_torchvision

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
