"""Where a model is run and timed: `BACKENDS["onnxruntime"].build(module, args, {}, threads=2)`.

Importing this package registers the backends; no backend's library is imported before its first use.
"""

from fxprune.backends import aot, onnxruntime, tensorrt, torch
from fxprune.backends.base import BACKENDS, Backend, Runner, chosen

__all__ = ["BACKENDS", "Backend", "Runner", "aot", "chosen", "onnxruntime", "tensorrt", "torch"]
