"""Where the time of an ONNX file goes: a table of its nodes, out of onnxruntime's own profile.

`import onnx` and `import onnxruntime` inside this module are the libraries: imports are absolute.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from fxprune.backends.onnx_session import SessionSettings, denormals_as_zero, session
from fxprune.errors import BackendError

if TYPE_CHECKING:
    import onnx
    from rich.table import Table

#: Runs before those that count.
WARMUP = 3
#: What the profile appends to the name of a node.
_SUFFIX = "_kernel_time"
#: Where the exporter writes the modules around a node, a list of paths whose last entry is the node itself.
_SCOPES = "pkg.torch.onnx.name_scopes"
#: Where what onnxruntime appends to a name begins: node_MatMul_1/MatMulScaleFusion/, conv2d_1_nchwc.
_APPENDED = re.compile(r"/|_nchwc")


@dataclass(frozen=True, slots=True)
class NodeTime:
    """One node of the graph that onnxruntime runs, after its fusions.

    Attributes:
        name: of the node.
        operator: its type, that of a fused one where it is one.
        module: path of the module that it came from; "" where the file does not say.
        microseconds: the median over the runs.
        share: of the sum over all nodes.
    """

    name: str
    operator: str
    module: str
    microseconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The nodes of a model, the slowest first, and how often each was run.

    Profiling costs time itself, some microseconds a node: compare nodes by it, and whole models by timing them.
    """

    nodes: tuple[NodeTime, ...]
    runs: int

    @property
    def microseconds(self) -> float:
        """The sum over all nodes."""
        return sum(node.microseconds for node in self.nodes)

    def by_operator(self) -> dict[str, float]:
        """Return the microseconds of each type of node, the most first."""
        total: dict[str, float] = {}
        for node in self.nodes:
            total[node.operator] = total.get(node.operator, 0.0) + node.microseconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "runs": self.runs,
            "microseconds": self.microseconds,
            "nodes": [asdict(node) for node in self.nodes],
            "by_operator": self.by_operator(),
        }

    def table(self, title: str | None = None, top: int | None = None) -> Table:
        """Return the slowest nodes as a table for a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
        for column in ("node", "operator", "module"):
            rows.add_column(column, overflow="fold")
        for column in ("us", "share"):
            rows.add_column(column, justify="right", no_wrap=True)
        for n in self.nodes[:top]:
            rows.add_row(Text(n.name), n.operator, Text(n.module), f"{n.microseconds:,.0f}", f"{n.share:.1%}")
        return rows


def profile(path: Path, feeds: Mapping[str, numpy.ndarray], settings: SessionSettings, runs: int = 50) -> Profile:
    """Run an ONNX file in a session that measures its nodes, and return what they take.

    Args:
        feeds: an array for each input, by name.
        runs: how often, beside WARMUP runs that do not count.

    Raises:
        BackendError: the file cannot be loaded or rejects the arrays, or `runs` is below 1.
    """
    if runs < 1:
        raise BackendError(f"a profile of {runs} runs has no median; take 1 or more")
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        opened = session(path, replace(settings, optimized=optimized, profile=Path(folder) / "profile"))
        try:
            with denormals_as_zero():
                for _ in range(WARMUP + runs):
                    opened.run(None, dict(feeds))
            events = json.loads(Path(opened.end_profiling()).read_text())
        except Exception as error:  # onnxruntime has a dozen unrelated exception classes
            raise BackendError(f"onnxruntime cannot run {path.name} on these arguments: {error}") from error
        modules = _Modules(path, optimized)
    return Profile(tuple(_nodes(events, modules)), runs)


@dataclass(frozen=True, slots=True)
class FileInput:
    """One input of an ONNX file: a size is a number, or the name of one that is open ("?" where it has none)."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype


def file_inputs(path: Path) -> list[FileInput]:
    """Return the inputs of an ONNX file.

    Raises BackendError where it is none, or an input is no tensor of a type that torch and numpy have.
    """
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
        weights = {w.name for w in graph.initializer}
        return [_file_input(value) for value in graph.input if value.name not in weights]
    except Exception as error:  # protobuf's, onnx's, numpy's and torch's own
        raise BackendError(f"'{path}' cannot be read as an ONNX file: {type(error).__name__}: {error}") from error


def _file_input(value: onnx.ValueInfoProto) -> FileInput:
    import onnx

    kind = value.type.tensor_type
    empty = numpy.empty(0, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
    return FileInput(value.name, shape, torch.from_numpy(empty).dtype)


def profile_file(
    path: Path, feeds: Mapping[str, numpy.ndarray], *, threads: int, provider: str = "cpu", runs: int = 50
) -> Profile:
    """Profile any ONNX file; see `profile`.

    Raises BackendError, too, where onnxruntime or its provider is not here.
    """
    from fxprune.backends.onnxruntime import BACKEND

    if (reason := BACKEND.configured(provider=provider).available()) is not None:
        raise BackendError(f"backend '{BACKEND.name}' cannot be used here: {reason}")
    return profile(path, feeds, SessionSettings(threads, provider), runs)


def _nodes(events: list[dict[str, Any]], modules: _Modules) -> list[NodeTime]:
    """The nodes of a profile, whose events come in the order in which they ran."""
    operators: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_SUFFIX):
            name = event["name"].removesuffix(_SUFFIX)
            operators[name] = event["args"]["op_name"]
            samples.setdefault(name, []).append(event["dur"])
    medians = {name: statistics.median(taken[WARMUP:] or taken) for name, taken in samples.items()}
    total = sum(medians.values()) or 1.0
    found = [NodeTime(name, operators[name], modules.of(name), us, us / total) for name, us in medians.items()]
    return sorted(found, key=lambda node: -node.microseconds)


class _Modules:
    """From a node of the optimised graph to the module that it came from.

    1. A node of the file has its name.
    2. It reads a weight: what comes before the last dot of the weight's name.
    3. A node of the file makes one of its outputs.
    4. Its name is one of a node or an output of the file with something appended, by a fusion or a change of layout.
    """

    def __init__(self, path: Path, optimized: Path) -> None:
        import onnx

        self._known: dict[str, str] = {}
        by_output: dict[str, str] = {}
        file = onnx.load(path, load_external_data=False).graph
        for node in file.node:
            if scope := _scope(node):
                self._known[node.name] = scope
                by_output.update(dict.fromkeys(node.output, scope))
        weights = {w.name: w.name.rpartition(".")[0] for w in file.initializer if "." in w.name}
        for node in onnx.load(optimized, load_external_data=False).graph.node:
            found = [weights[i] for i in node.input if i in weights]
            found += [by_output[o] for o in node.output if o in by_output]
            if found:
                self._known.setdefault(node.name, found[0])
        self._known = by_output | self._known

    def of(self, name: str) -> str:
        return self._known.get(name) or self._known.get(_APPENDED.split(name)[0], "")


def _scope(node: onnx.NodeProto) -> str:
    """The path of the innermost module around a node, by the exporter's note; "" where there is none."""
    told = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    try:
        scopes = ast.literal_eval(told)
    except (ValueError, SyntaxError):
        return ""
    path = str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
    return path.removeprefix("module").removeprefix(".")
