"""Write modules as ONNX files, through `torch.onnx.export`.

`import onnx` and `import torch` inside this module are the libraries: imports are absolute.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxprune.backends import onnxfile
from fxprune.backends.base import bind_arguments, call_arguments, forward_signature, inference_copy, tensors_of
from fxprune.backends.dynamic import named_leaves, places, resized, sizes, sizes_to_trace
from fxprune.backends.flat import FlatModule
from fxprune.backends.onnx_session import SessionSettings, session
from fxprune.backends.quiet import quiet
from fxprune.errors import BackendError
from fxprune.input_names import Dynamic

if TYPE_CHECKING:
    import onnx_ir

#: The ONNX operator set of a file, and that of one with attention: from 23 on that is one operator, which onnxruntime
#: runs in about half the time of its pieces, with zeros where a row is wholly masked, as torch has it.
OPSET, ATTENTION_OPSET = 20, 23
#: Lines of what the exporter printed and warned about that a failure repeats.
NOISE_LINES = 12
#: What a file says of each node beside its module: the exporter's notes, which hold the paths of whoever exported it.
_SCOPES, _STACK = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"


@dataclass(frozen=True, slots=True)
class FileSettings:
    """What is written.

    Attributes:
        dtype: "float32"; "float16" or "bfloat16" compute in it, inputs and outputs stay as they are.
        fusion: "graph", what onnxruntime fuses when it opens the file; "transformer", its transformer optimizer before.
        provider: on which a file with attention as one operator has to open.
    """

    dtype: str = "float32"
    fusion: str = "graph"
    provider: str = "cpu"


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written.

    Attributes:
        fused: operator -> how many the transformer optimizer put into the file; None where it was not asked.
    """

    path: Path
    opset: int
    fused: Mapping[str, int] | None = None


def export(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    path: Path,
    dynamic: bool | Dynamic = True,
    settings: FileSettings | None = None,
) -> Written:
    """Write `module`, in inference mode, to `path` as an ONNX file.

    Tensors among the arguments become inputs, named by `fxprune.input_names`; everything else is baked in.
    Outputs are the module's output tensors in the order in which they occur. `dynamic` is that of `Backend.build`;
    open dimensions bear their size names. Large weights go beside it: see `onnxfile.save`.

    Raises BackendError where the export fails, with what the exporter said, and InputError where the arguments do not
    fit the module.
    """
    signature = forward_signature(module)
    args, kwargs = call_arguments(signature, bind_arguments(signature, args, kwargs or {}))
    dynamic = places(signature, args, kwargs, dynamic)
    traced = sizes_to_trace(sizes(signature, args, kwargs, dynamic))
    args, kwargs = resized(signature, args, kwargs, dynamic, traced)
    flat = FlatModule(inference_copy(module), args, kwargs).eval()
    tensors = {n: leaf for n, leaf in named_leaves(signature, args, kwargs).items() if isinstance(leaf, Tensor)}
    shapes = {"tensors": tuple(dynamic.get(name) for name in tensors)} if dynamic else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet() as noise, _without_attention_fastpath(), torch.no_grad():
        try:
            return _write(
                flat,
                list(tensors.values()),
                path,
                settings or FileSettings(),
                dynamic_shapes=shapes,
                input_names=list(tensors),
            )
        except BackendError:
            raise
        except Exception as error:  # whatever a model's own code raises arrives here
            raise BackendError(_failure(module, error, noise(), bool(dynamic))) from error


@dataclass(frozen=True, slots=True)
class Parts:
    """Several modules in one file, to be cut out of it again.

    Attributes:
        inputs, outputs: the names of each module's.
    """

    inputs: list[list[str]] = field(default_factory=list)
    outputs: list[list[str]] = field(default_factory=list)


def export_parts(parts: Sequence[tuple[nn.Module, Sequence[Tensor]]], path: Path) -> Parts:
    """Write several modules, each with its tensors, side by side into one file; sizes are fixed.

    Raises whatever the export of one of them raises.
    """
    together = _Together([inference_copy(module) for module, _ in parts], [len(tensors) for _, tensors in parts])
    # Copies: one tensor that is given to two parts would be one input of both.
    tensors = [tensor.detach().clone() for _, some in parts for tensor in some]
    with torch.no_grad():
        counts = [len(outputs) for outputs in together.each(*tensors)]
    inputs, outputs = (
        [[f"{kind}{i}_{j}" for j in range(n)] for i, n in enumerate(counted)]
        for kind, counted in (("input", together.counts), ("output", counts))
    )
    names = {k: list(chain.from_iterable(v)) for k, v in (("input_names", inputs), ("output_names", outputs))}
    with quiet(), _without_attention_fastpath(), torch.no_grad():
        _write(together, tensors, path, FileSettings(), **names)
    return Parts(inputs, outputs)


def _write(flat: nn.Module, tensors: Sequence[Tensor], path: Path, settings: FileSettings, **options: Any) -> Written:
    """Write a module of tensors to a file, attention as one operator where onnxruntime then opens it."""
    first = settings.fusion == "graph" and _shows_attention(flat)  # then one export will do
    if first and _write_fused(flat, tensors, path, settings, args=tuple(tensors), **options):
        return Written(path, ATTENTION_OPSET)
    program = _export(flat, tuple(tensors), opset_version=OPSET, **options)
    captured = program.exported_program
    if settings.fusion == "transformer":
        from fxprune.backends.onnx_fusion import fuse, plain_attention

        plain = plain_attention(captured) if captured is not None else {}
        if plain:
            program = _export(captured, opset_version=OPSET, custom_translation_table=plain, **options)
        onnxfile.save(_prepared(program.model, settings), path)
        return Written(path, OPSET, fuse(path))
    onnxfile.save(_prepared(program.model, settings), path)
    attends = captured is not None and _attends(captured.graph)
    if attends and not first and _write_fused(captured, tensors, path, settings, **options):
        return Written(path, ATTENTION_OPSET)
    return Written(path, OPSET)


def _attends(graph: fx.Graph) -> bool:
    return any("scaled_dot_product_attention" in str(node.target) for node in graph.nodes)


def _shows_attention(module: nn.Module) -> bool:
    """Whether a graph module with attention is in there, so that this is known before any export."""
    return any(isinstance(part, fx.GraphModule) and _attends(part.graph) for part in module.modules())


def _write_fused(
    model: nn.Module | torch.export.ExportedProgram | None,
    tensors: Sequence[Tensor],
    path: Path,
    settings: FileSettings,
    **options: Any,
) -> bool:
    """Write a file with attention as one operator; returns whether onnxruntime runs it, else nothing is written."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fused = Path(folder) / path.name
        try:
            exported = _export(model, opset_version=ATTENTION_OPSET, **options).model
            _expand_masks(exported)
            onnxfile.save(_prepared(exported, settings), fused)
            opened = session(fused, SessionSettings(provider=settings.provider, silent=True))
            opened.run(None, {i.name: t.cpu().numpy() for i, t in zip(opened.get_inputs(), tensors, strict=True)})
        except Exception:
            # It stays in pieces: keys that broadcast over heads, operators that onnxruntime lacks in the later set.
            return False
        onnxfile.beside(path).unlink(missing_ok=True)
        for file in fused.parent.iterdir():
            file.replace(path.parent / file.name)
    return True


def _export(*args: Any, **options: Any) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(*args, dynamo=True, verbose=False, **options)
    assert program is not None  # only the exporter that dynamo=True replaces returns None
    return program


def _prepared(model: onnx_ir.Model, settings: FileSettings) -> onnx_ir.Model:
    """Give weights and nodes the names of the module's own parts, forget whose machine it was, and change the type."""
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("module.")
    for node in model.graph.all_nodes():
        node.metadata_props.pop(_STACK, None)
    if settings.dtype != "float32":
        from fxprune.backends.onnx_cast import compute_in

        compute_in(model, settings.dtype)
    return model


def _expand_masks(model: onnx_ir.Model) -> None:
    """Give masks of keys alone, (batch, 1, 1, keys), a row for each query.

    The definition of Attention lets them broadcast, but onnxruntime's kernel does not.
    """
    import onnx_ir as ir

    for node in [n for n in model.graph if n.op_type == "Attention" and n.domain == ""]:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or mask.shape is None or len(mask.shape) != 4 or mask.shape[2] != 1:
            continue
        one = ir.node("Constant", [], {"value_ints": [1]})
        queries = ir.node("Shape", [node.inputs[0]], {"start": 2, "end": 3})
        shape = ir.node("Concat", [one.outputs[0], one.outputs[0], queries.outputs[0], one.outputs[0]], {"axis": 0})
        rows = ir.node("Expand", [mask, shape.outputs[0]])
        rows.outputs[0].dtype = mask.dtype
        model.graph.insert_before(node, [one, queries, shape, rows])
        node.replace_input_with(3, rows.outputs[0])


class _Together(nn.Module):
    """Modules side by side, each with its own tensors."""

    def __init__(self, modules: Sequence[nn.Module], counts: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.counts = list(counts)

    def each(self, *tensors: Tensor) -> list[list[Tensor]]:
        """Return the output tensors of each module."""
        given = iter(tensors)
        return [
            tensors_of(module(*(next(given) for _ in range(count))))
            for module, count in zip(self.parts, self.counts, strict=True)
        ]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(chain.from_iterable(self.each(*tensors)))


@contextlib.contextmanager
def _without_attention_fastpath() -> Iterator[None]:
    """Make `nn.MultiheadAttention` and the layers around it run as ordinary operators instead of one opaque one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _failure(module: nn.Module, error: Exception, noise: str, dynamic: bool) -> str:
    """Say what failed and why, without the exporter's advice and colours, then what it printed before."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    reason = "\n".join(line for line in str(causes[-1]).splitlines() if line.strip())
    lines = [line for line in noise.splitlines() if line.strip()][-NOISE_LINES:]
    said = "\nThe exporter said:\n  " + "\n  ".join(lines) if lines else ""
    hint = "\nIf a dynamic size is what it stumbles over, build with dynamic=False." if dynamic else ""
    return f"torch.onnx.export failed for {type(module).__name__}: {type(causes[-1]).__name__}: {reason}{hint}{said}"
