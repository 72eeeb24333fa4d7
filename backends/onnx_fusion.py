"""onnxruntime's transformer optimizer: whole patterns of a transformer as one operator each.

`import onnxruntime` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxprune.backends import onnxfile
from fxprune.backends.quiet import quiet
from fxprune.errors import BackendError

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def plain_attention(program: torch.export.ExportedProgram) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return how to write attention so that the optimizer recognises it, where all of a model's is of that kind.

    As the exporter writes attention it never does: that divides queries and keys before their product, which divides
    what may grow large, and takes care of rows that are wholly masked. Without a mask neither says more than
    softmax(q k^T / c) v, the pattern that is looked for. With one, the patterns are those of mask code that current
    models no longer have. The operator that is put in divides by the root of the head size whatever c was, so that
    another `scale`, as of a model whose head dimensions were pruned, has to stay in pieces, too.
    """
    layers = [node for node in program.graph.nodes if node.target is _ATTENTION]
    for node in layers:
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
        said = named | dict(node.kwargs)
        usual = 1 / math.sqrt(named["query"].meta["val"].shape[-1])
        plain = math.isclose(said.get("scale") or usual, usual, rel_tol=1e-6)
        if not plain or said.get("attn_mask") is not None or said.get("is_causal") or said.get("enable_gqa"):
            return {}
    return {_ATTENTION: _unmasked} if layers else {}


def _unmasked(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k^T / c) v, of (batch, heads, length, head) each; c is the root of the head size."""
    from onnxscript import opset20 as op

    divisor = math.sqrt(query.shape[-1])
    products = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(op.Div(products, op.Constant(value_float=divisor)), axis=-1), value)


def fuse(path: Path) -> dict[str, int]:
    """Rewrite an ONNX file in place; return operator -> how many were put in, without those of which there are none.

    No number of heads is given, so that it is inferred for each layer, of which a pruned model has unequal ones. The
    patterns are those of BERT, whose optimizer the others build upon: layer norm with its skip, GELU with its bias,
    attention.

    Raises BackendError where the optimizer fails.
    """
    from onnxruntime import transformers

    # Its modules import one another by bare names, from a path that is added once and may be gone by now.
    folder = str(Path(transformers.__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    from onnxruntime.transformers.optimizer import optimize_model

    data = onnxfile.beside(path)
    external = data.exists()
    try:
        with quiet():
            # Level 0: onnxruntime's own fusions come when the file is opened, fitted to the machine that opens it.
            optimized = optimize_model(str(path), "bert", num_heads=0, hidden_size=0, opt_level=0)
            data.unlink(missing_ok=True)  # what is there would be appended to
            optimized.save_model_to_file(str(path), use_external_data_format=external)
    except Exception as error:  # it has no exceptions of its own
        raise BackendError(
            f"onnxruntime's transformer optimizer fails on {path.name}: {type(error).__name__}: {error}; build with "
            "fusion='graph'"
        ) from error
    return {k: int(n) for k, n in optimized.get_fused_operator_statistics().items() if n}
