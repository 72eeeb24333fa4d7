"""Patterns of zeros inside weights: 2:4 and any n:m, blocks, single entries.

- `pattern`    what may stay: "2:4", "32x32", "unstructured" -> masks of scores
- `registry`   `METHODS`: ways to choose masks and weights, one file each (`magnitude`, `sparsegpt`, `admm`, `alps`)
- `support`    the exact least-squares weights on a given mask
- `permute`    the order of columns in which n:m keeps the most; `order` the same for all layers that share an axis
- `sparsify`   which layers get a pattern, and the masks of a pruned module
- `lock`       keeps zeros zero while the module is trained
"""

from fxprune.passes.patterns import admm, alps, magnitude, sparsegpt
from fxprune.passes.patterns.pattern import Pattern, pattern
from fxprune.passes.patterns.registry import METHODS, Method, Weight, method

__all__ = [
    "METHODS",
    "Method",
    "Pattern",
    "Weight",
    "admm",
    "alps",
    "magnitude",
    "method",
    "pattern",
    "sparsegpt",
]
