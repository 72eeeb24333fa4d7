"""What is known about a TensorRT engine: what it was built for, its layers, its sparsity; kept in a file beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxprune.errors import BackendError

#: The form of the file beside an engine.
FORMAT = 1
#: A dimension that a profile leaves open.
OPEN = -1
#: Names of element types that TensorRT uses in its messages, where they are not torch's.
_TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}
#: What TensorRT calls the three kinds of tensors of a layer.
_SIDES = ("Inputs", "Constants", "Outputs")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor that goes into or comes out of an engine or a layer; an open dimension is -1."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes of one input that an engine takes: the smallest, the one it is best at, the largest."""

    smallest: Shape
    best: Shape
    largest: Shape


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a built engine, usually several operators in one kernel.

    Attributes:
        kind: what TensorRT calls it: gemm, correlation (a convolution), kgen (generated code), ...
        nodes: the nodes of the ONNX file that it computes.
        constants: the weights that it holds.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[Port, ...]
    constants: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What of 2:4 sparsity came of a build.

    Attributes:
        asked: TensorRT was told to look for sparse weights.
        possible, held: how many weights 2:4 fits on, and how many hold it.
        eligible, picked: layers that TensorRT found fit for sparse kernels, and those that got one; None where it did
            not say, as TensorRT-RTX, which chooses kernels on the GPU that runs the engine.
        eligible_layers, picked_layers: their names, where TensorRT gives them.
    """

    asked: bool
    possible: int
    held: int
    eligible: int | None = None
    picked: int | None = None
    eligible_layers: tuple[str, ...] = ()
    picked_layers: tuple[str, ...] = ()

    def line(self) -> str:
        """Return all of it in a sentence.

        >>> Sparsity(asked=True, possible=8, held=6, eligible=6, picked=2).line()
        '2:4 weights in 6 of 8 layers, sparse kernels asked for: 6 layers eligible, 2 picked'
        """
        text = f"2:4 weights in {self.held} of {self.possible} layers"
        if not self.asked:
            return f"{text}, sparse kernels not asked for"
        if self.eligible is None and self.picked is None:
            return f"{text}, sparse kernels asked for; the builder did not say which layers use them"
        counts = ["?" if count is None else str(count) for count in (self.eligible, self.picked)]
        return f"{text}, sparse kernels asked for: {counts[0]} layers eligible, {counts[1]} picked"


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine: a file, and what it was built for.

    Attributes:
        library, version: `tensorrt` or `tensorrt_rtx`, and the version that alone can run the engine.
        compute_capability: of the GPUs that can run it, "8.9".
        dtype: of weights and activations; inputs and outputs have types of their own.
        inputs, outputs: in order; an open dimension is -1.
        profiles: shapes of each input with an open dimension.
        layers: of the engine, as TensorRT describes them; none where it did not.
        sha256, size: of the file, the size in bytes.
        seconds: that TensorRT took to build it.
        parity: the largest relative difference from torch of the ONNX file that it was built from, run on the CPU by
            onnxruntime; None where there is no module to compare with or onnxruntime does not run it.
        command: builds the same engine elsewhere, from the ONNX file.
    """

    path: Path
    library: str
    version: str
    compute_capability: tuple[str, ...]
    dtype: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    profiles: Mapping[str, Profile]
    sparsity: Sparsity
    layers: tuple[Layer, ...]
    sha256: str
    size: int
    seconds: float
    parity: float | None
    command: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"path": str(self.path)}))
        return result


def sidecar(path: Path) -> Path:
    """Return the name of the file that says what an engine was built for.

    >>> sidecar(Path("small.engine")).name
    'small.engine.json'
    """
    return path.with_name(f"{path.name}.json")


def checksum(data: bytes | memoryview) -> str:
    """Return the SHA-256 of an engine, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def write(engine: Engine, data: bytes | memoryview) -> None:
    """Write an engine and the file beside it, the engine last, so that a broken write leaves none that looks whole.

    Raises BackendError where the files cannot be written.
    """
    about = {"format": FORMAT, **engine.to_json()}
    del about["path"]  # the two files may be moved together
    try:
        engine.path.parent.mkdir(parents=True, exist_ok=True)
        _replace(sidecar(engine.path), json.dumps(about, indent=1).encode())
        _replace(engine.path, data)
    except OSError as error:
        raise BackendError(
            f"'{engine.path}' was not written: {error.strerror}. Free some space or choose another place"
        ) from error


def _replace(path: Path, data: bytes | memoryview) -> None:
    """Write a file beside its final name, then move it there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # temporary files are for their owner alone
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> Engine:
    """Read what an engine was built for, and make sure that the engine is the one described.

    Raises BackendError where a file is missing, damaged, altered, or of another format.
    """
    about = sidecar(path)
    for file in (path, about):
        if not file.is_file():
            raise BackendError(f"'{file}' is missing: an engine and its .json belong together; build it again")
    try:
        data = json.loads(about.read_text())
        if data["format"] != FORMAT:
            raise BackendError(f"'{about}' is of format {data['format']}; this fxprune reads {FORMAT}. Build it again")
        engine = _from_json(path, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackendError(
            f"'{about}' is truncated or altered: {type(error).__name__}: {error}. Build the engine again"
        ) from error
    if checksum(path.read_bytes()) != engine.sha256:
        raise BackendError(
            f"'{path}' is truncated or altered: its checksum is not the one in {about.name}. Build the engine again"
        )
    return engine


def _from_json(path: Path, data: Mapping[str, Any]) -> Engine:
    fields = {name: value for name, value in data.items() if name != "format"}
    names = ("eligible_layers", "picked_layers")
    sparsity = {**data["sparsity"], **{name: tuple(data["sparsity"][name]) for name in names}}
    return Engine(
        **{
            **fields,
            "path": path,
            "compute_capability": tuple(data["compute_capability"]),
            "inputs": _ports(data["inputs"]),
            "outputs": _ports(data["outputs"]),
            "profiles": {n: Profile(*(tuple(p[k]) for k in Profile.__slots__)) for n, p in data["profiles"].items()},
            "sparsity": Sparsity(**sparsity),
            "layers": tuple(
                Layer(
                    layer["name"],
                    layer["kind"],
                    tuple(layer["nodes"]),
                    *(_ports(layer[side]) for side in ("inputs", "constants", "outputs")),
                )
                for layer in data["layers"]
            ),
        }
    )


def _ports(found: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(port["name"], tuple(port["shape"]), port["dtype"]) for port in found)


# ------------------------------------------------------------------------------------- what TensorRT says of an engine


def layers_in_log(lines: Sequence[str]) -> tuple[Layer, ...]:
    """Return the layers of the engine that a builder's log describes; none where it does not.

    With detailed profiling verbosity the builder ends with one message: "Layers:" and a line for each layer,
    `Name: conv, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,3,8,8], ..., Datatype: Half, ... }],
    Constants: [...], Outputs: [...], ..., Metadata: [ONNX Layer: node_conv2d]`.
    """
    text = next((line for line in reversed(lines) if line.startswith("Layers:\n")), "")
    listed = text.partition("\n\n")[0].splitlines()[1:]
    return tuple(_layer_of_line(line) for line in listed if line.startswith("Name: "))


def _layer_of_line(line: str) -> Layer:
    head, *sides = re.split(r", (Inputs|Constants|Outputs): ", line, maxsplit=3)
    name, _, kind = head.removeprefix("Name: ").partition(", LayerType: ")
    ports = {side: _ports_of_text(text) for side, text in zip(sides[::2], sides[1::2], strict=True)}
    return Layer(name, kind, _nodes(line), *(ports.get(side, ()) for side in _SIDES))


def _ports_of_text(text: str) -> tuple[Port, ...]:
    pattern = r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d, ]*)\].*?Datatype: (?P<type>\w+)"
    return tuple(
        Port(m["name"], tuple(int(n) for n in m["shape"].split(",") if n.strip()), dtype_name(m["type"]))
        for m in re.finditer(pattern, text)
    )


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata)))


def dtype_name(name: str) -> str:
    """Return torch's name of an element type of TensorRT's.

    >>> dtype_name("Half"), dtype_name("INT64")
    ('float16', 'int64')
    """
    return _TYPES.get(name.lower(), name.lower())


def layers_in_json(text: str) -> tuple[Layer, ...]:
    """Return the layers that an engine inspector describes in JSON, of an engine built with detailed verbosity."""
    listed = json.loads(text).get("Layers", [])
    return tuple(_layer_of_json(layer) for layer in listed if isinstance(layer, dict))


def _layer_of_json(layer: Mapping[str, Any]) -> Layer:
    ports = [
        tuple(
            Port(str(p.get("Name", "")), tuple(p.get("Dimensions", ())), dtype_name(str(p.get("Datatype", ""))))
            for p in layer.get(side, [])
            if isinstance(p, dict)
        )
        for side in _SIDES
    ]
    name, kind, metadata = (str(layer.get(key, "")) for key in ("Name", "LayerType", "Metadata"))
    return Layer(name, kind, _nodes(metadata), *ports)


#: What builders say of sparsity: the number of layers, or their names, or both, as the version has it.
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics)"
    r"\s*:?\s*(?P<names>.*)"
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers"
    r"|Chose (?P<count>\d+) layer\(s\) using sparse tactics)\s*:?\s*(?P<names>.*)"
)


def sparsity_in_log(lines: Sequence[str], asked: bool, possible: int, held: int) -> Sparsity:
    """Return what a builder's log says of sparse kernels; the last word counts, that on the engine as it is.

    >>> log = [
    ...     "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b + c",
    ...     "(Sparsity) Chose 0 layer(s) using sparse tactics",
    ... ]
    >>> found = sparsity_in_log(log, asked=True, possible=3, held=2)
    >>> found.eligible, found.eligible_layers, found.picked
    (2, ('a', 'b + c'), 0)
    """
    eligible, eligible_layers = _last(_ELIGIBLE, lines)
    picked, picked_layers = _last(_PICKED, lines)
    return Sparsity(asked, possible, held, eligible, picked, eligible_layers, picked_layers)


def _last(pattern: re.Pattern[str], lines: Sequence[str]) -> tuple[int | None, tuple[str, ...]]:
    found = next((match for line in reversed(lines) if (match := pattern.search(line))), None)
    if found is None:
        return None, ()
    names = tuple(name.strip() for name in found["names"].split(", ") if name.strip())
    return int(found["count"]) if found["count"] else len(names), names


def command(
    tool: str,
    onnx: Path,
    path: Path,
    profiles: Mapping[str, Profile],
    *,
    sparse: bool,
    attention: bool = False,
    exact: bool = False,
    compute_capability: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> str:
    """Return the command line that builds an engine from an ONNX file without fxprune.

    Args:
        tool: `trtexec` or `tensorrt_rtx`.
        attention: the file has Attention operators, which may be taken apart where no kernel fits them.
        exact: multiply float32 without rounding it to TF32.
        compute_capability: of the GPUs to build for; none where the tool builds for the GPU at hand.

    >>> profiles = {"x": Profile((1, 3), (8, 3), (32, 3))}
    >>> print(command("trtexec", Path("a.onnx"), Path("a.engine"), profiles, sparse=True))
    trtexec --onnx=a.onnx --saveEngine=a.engine --minShapes=x:1x3 --optShapes=x:8x3 --maxShapes=x:32x3
      --profilingVerbosity=detailed --skipInference --sparsity=enable
    """
    words = [tool, f"--onnx={onnx}", f"--saveEngine={path}"]
    for option, side in (("min", "smallest"), ("opt", "best"), ("max", "largest")):
        shapes = [f"{name}:{'x'.join(map(str, getattr(profile, side)))}" for name, profile in profiles.items()]
        if shapes:
            words.append(f"--{option}Shapes={','.join(shapes)}")
    words += ["--profilingVerbosity=detailed", "--skipInference"]
    words += ["--sparsity=enable"] if sparse else []
    words += ["--noTF32"] if exact else []
    words += ["--decomposableAttentions=*"] if attention else []
    capabilities = ",".join(c.replace(".", "") for c in compute_capability)
    words += [f"--computeCapabilities={capabilities}"] if capabilities else []
    words += [f"--timingCacheFile={timing_cache}"] if timing_cache else []
    return shlex.join(words)
