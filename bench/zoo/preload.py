"""Imported once before any process of `bench.coverage` is forked: the libraries, which take seconds to import."""

import importlib
import warnings

from bench.shims import shim_torchvision

shim_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for library in ("timm", "transformers", "torch_pruning", "fxprune"):
        importlib.import_module(library)
