"""Where a model is run and timed: `BACKENDS["onnxruntime"].build(module, args, {}, threads=2)`.

Importing this package registers the backends; no backend's library is imported before its first use.
"""

from fxprune.backends import onnxruntime, tensorrt, torch
from fxprune.backends.base import BACKENDS, Backend, Runner, chosen

__all__ = ["BACKENDS", "Backend", "Runner", "chosen", "onnxruntime", "tensorrt", "torch"]
