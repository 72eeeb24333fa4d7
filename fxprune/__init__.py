"""fxprune: a pruning compiler for PyTorch.

>>> import fxprune, torch
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
>>> pruned = fxprune.compile(net, torch.randn(2, 8), target={"macs": 0.5})
>>> pruned.module(torch.randn(5, 8)).shape
torch.Size([5, 4])
"""

from fxprune.api import compile, dry_run
from fxprune.benchmark import bench
from fxprune.curves import sensitivity
from fxprune.errors import FxpruneError
from fxprune.passes.plots import plot_sensitivity
from fxprune.plan import Plan
from fxprune.pruned import Pruned
from fxprune.recipe import Recipe
from fxprune.report import Report
from fxprune.rules.core import register_rule
from fxprune.saved import load
from fxprune.sweep import Sweep, sweep
from fxprune.training.ladder import ladder
from fxprune.training.pruner import Pruner
from fxprune.training.run import train

__version__ = "0.1.0"
__all__ = [
    "FxpruneError",
    "Plan",
    "Pruned",
    "Pruner",
    "Recipe",
    "Report",
    "Sweep",
    "bench",
    "compile",
    "dry_run",
    "ladder",
    "load",
    "plot_sensitivity",
    "register_rule",
    "sensitivity",
    "sweep",
    "train",
]
