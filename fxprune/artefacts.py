"""What can be timed: a saved directory, a model, an ONNX file, an engine of TensorRT, a package of compiled code.

Each is read once, without building anything, and opened as a `Runner` for every backend and batch that it is timed on.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxprune.backends import engines
from fxprune.backends.aot import BACKEND as PACKAGES
from fxprune.backends.aot import is_package
from fxprune.backends.base import Backend, Runner, bind_arguments, call_arguments, forward_signature
from fxprune.backends.dynamic import named_leaves, split
from fxprune.backends.onnx_profile import FileInput, file_inputs
from fxprune.backends.onnxruntime import BACKEND as ONNXRUNTIME
from fxprune.errors import BackendError, InputError
from fxprune.export import engine_backend
from fxprune.input_names import Dynamic, input_names, renamed
from fxprune.pruned import Pruned, rebatch
from fxprune.registry import nearest
from fxprune.saved import GRAPH, PLAN, WEIGHTS, load_pruned
from fxprune.sources import InputSpec, parse_input, resolve

Kind = Literal["saved", "model", "onnx", "engine", "package"]
#: What an artefact is made of: a path, what the command line calls MODEL, a module, or what `compile` returned.
What = str | os.PathLike[str] | nn.Module | Pruned

#: Forms of files that are run as they are, beside those of `fxprune.sources.FORMS`.
FILES = ("FILE.onnx", "FILE.engine", "FILE.pt2 of compiled code")
#: The options of the backend "onnxruntime" that say how a file is run, not how it is written.
_FILE_OPTIONS = {"provider"}
#: Backend -> the ending of the file that it builds.
_ENDINGS = {"onnxruntime": ".onnx", "torch-aot": ".pt2", "tensorrt": ".engine", "tensorrt-rtx": ".engine"}


@dataclass(frozen=True, slots=True)
class Artefact:
    """Something that can be timed.

    Attributes:
        name: what it is called in tables and messages.
        module: of a saved directory or a model, to be built on a backend; None for a file that is run as it is.
        path: of the directory or file.
        args, kwargs: example inputs; empty where it comes without.
        pruned: plan and report of what fxprune pruned.
    """

    name: str
    kind: Kind
    module: nn.Module | None = None
    path: Path | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    pruned: Pruned | None = None

    @property
    def has_inputs(self) -> bool:
        """Whether there are example inputs."""
        return bool(self.args or self.kwargs)


def read(what: What, name: str | None = None) -> Artefact:
    """Find out what an artefact is, and read it; nothing is built, and no file that is run as it is is opened.

    Raises:
        InputError: there is no such file or model.
        SavedModelError: a saved directory is damaged.

    >>> read(nn.Linear(2, 2)).kind, read(nn.Linear(2, 2), "dense").name
    ('model', 'dense')
    """
    if isinstance(what, Pruned):
        return _saved(name or f"pruned {what.report.model}", what, None)
    if isinstance(what, nn.Module):
        return Artefact(name or type(what).__name__, "model", module=what)
    text = os.fspath(what)
    path = Path(text)
    kind = _kind_of_file(path)
    if kind is not None:
        return Artefact(name or text, kind, path=path)
    if (path / PLAN).is_file():
        return _saved(name or text, load_pruned(path), path)
    source = resolve(text, needs_inputs=False)
    return Artefact(name or text, "model", source.module, None, source.args, source.kwargs)


def _saved(name: str, pruned: Pruned, path: Path | None) -> Artefact:
    return Artefact(name, "saved", pruned.graph_module(), path, pruned.args, pruned.kwargs, pruned)


def _kind_of_file(path: Path) -> Kind | None:
    if path.suffix not in (".onnx", ".engine", ".pt2"):
        return None
    if not path.is_file():
        raise InputError(f"'{path}' does not exist")
    if path.suffix == ".pt2":  # torch.export.save writes such files, too: models that have to be built
        return "package" if is_package(path) else None
    return "onnx" if path.suffix == ".onnx" else "engine"


# ---------------------------------------------------------------------- inputs
@dataclass(frozen=True, slots=True)
class Inputs:
    """What every artefact is called with.

    Attributes:
        signature: of the module that the arguments are for; None where they come from a file, or from nothing but
            shapes.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: inspect.Signature | None = None

    @property
    def batch(self) -> int:
        """The size of the first tensor's first dimension, 1 where it has none."""
        first = next(iter(self.tensors().values()), None)
        return int(first.shape[0]) if first is not None and first.dim() else 1

    def rebatched(self, batch: int | None) -> Inputs:
        """Return the inputs with rows repeated or left out, as they are for None."""
        args, kwargs = rebatch(self.args, self.kwargs, batch)
        return replace(self, args=args, kwargs=kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order of the signature; those without a name are called by number.

        >>> signature = inspect.signature(lambda x, mask: 0)
        >>> list(Inputs((), {"mask": torch.ones(1), "x": torch.ones(1)}, signature).tensors())
        ['x', 'mask']
        """
        if self.signature is None:
            unnamed = {str(i): value for i, value in enumerate(self.args)}
            return {name: v for name, v in (unnamed | self.kwargs).items() if isinstance(v, Tensor)}
        arguments = bind_arguments(self.signature, self.args, self.kwargs)
        return split(named_leaves(self.signature, *call_arguments(self.signature, arguments)))[0]

    def for_module(self, module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as a module takes them: as they are, or in order where it has other names for them.

        Raises InputError where they do not fit its `forward`.

        >>> Inputs((), {"x": torch.ones(1)}).for_module(nn.ReLU())
        ((tensor([1.]),), {})
        """
        signature = forward_signature(module)
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError:
            ordered = tuple(self.tensors().values())
            bind_arguments(signature, ordered, {})
            return ordered, {}
        return self.args, self.kwargs

    def for_names(self, names: Sequence[str], what: str) -> dict[str, Tensor]:
        """Return the tensors that the inputs of a file are: those of its names, or in order where it has other names.

        Raises InputError where there are neither those names nor as many tensors.

        >>> list(Inputs((torch.ones(1),), {}).for_names(["image"], "'a.onnx'"))
        ['image']
        """
        found = self.tensors()
        if set(names) <= set(found):  # an exporter leaves out what the model does not use
            return {name: found[name] for name in names}
        if len(names) == len(found):
            return dict(zip(names, found.values(), strict=True))
        raise InputError(
            f"{what} takes {', '.join(names) or 'nothing'}, and the inputs are {', '.join(found) or 'none'}; give "
            "those of the file, for example --input NAME=1x3x224x224"
        )


def example_inputs(artefacts: Sequence[Artefact], given: Sequence[str] = (), batch: int | None = None) -> Inputs:
    """Return the inputs for all artefacts: those given, else those that the first comes with, else made up for a file.

    A file is given random numbers of the types and sizes of its own description; an open first size is the batch.

    Args:
        given: as for `--input`.
        batch: for the open sizes of files; 1 for None.

    Raises:
        InputError: a text in `given` has another form or names no input, an open size is not said, or nothing comes
            with inputs.
        BackendError: the one file that could say what it takes cannot be read.
    """
    modules = [a for a in artefacts if a.module is not None]
    files = [a for a in artefacts if a.kind in ("onnx", "engine")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if given and not (files and not modules):
            return _given(given, [a.module for a in modules if a.module is not None])
        for a in modules:
            if a.has_inputs and a.module is not None:
                return Inputs(a.args, a.kwargs, forward_signature(a.module))
        if files:
            return _described(files, given, batch)
    names = ", ".join(dict.fromkeys(a.name for a in artefacts))
    raise InputError(
        f"there are no example inputs with {names}; give their shapes, for example --input 1x3x224x224 "
        "or --input input_ids=2x16:int64:0-30000"
    )


def _given(given: Sequence[str], modules: Sequence[nn.Module]) -> Inputs:
    specs = list(map(parse_input, given))
    args = tuple(spec.make() for spec in specs if not spec.name)
    kwargs = {spec.name: spec.make() for spec in specs if spec.name}
    for module in modules:
        signature = forward_signature(module)
        try:
            signature.bind(*args, **kwargs)
        except TypeError:  # of a file, or of another model
            continue
        return Inputs(args, kwargs, signature)
    return Inputs(args, kwargs)


def _described(files: Sequence[Artefact], given: Sequence[str], batch: int | None) -> Inputs:
    """Inputs for the first file that says what it takes."""
    errors: list[BackendError] = []
    for file in files:
        assert file.path is not None
        try:
            ports = file_inputs(file.path) if file.kind == "onnx" else engine_inputs(file.path)
        except BackendError as error:
            errors.append(error)
            continue
        return Inputs((), file_tensors(file.name, ports, given, batch))
    raise errors[0]


def engine_inputs(path: Path) -> list[FileInput]:
    """Return the inputs of an engine, of the shapes that it is best at.

    Raises BackendError where the engine or the file beside it is missing or altered.
    """
    engine = engines.read(path)
    shapes = {port.name: port.shape for port in engine.inputs} | {n: p.best for n, p in engine.profiles.items()}
    return [FileInput(port.name, shapes[port.name], getattr(torch, port.dtype)) for port in engine.inputs]


def file_tensors(
    name: str, ports: Sequence[FileInput], given: Sequence[str], batch: int | None = None
) -> dict[str, Tensor]:
    """Return random tensors for the inputs of a file, of the sizes that it says or the user does.

    Raises InputError where `given` names no input of the file, or a size is open and not given.

    >>> ports = [FileInput("x", ("batch", 3), torch.float32)]
    >>> {name: tuple(t.shape) for name, t in file_tensors("a.onnx", ports, [], batch=4).items()}
    {'x': (4, 3)}
    """
    specs = [parse_input(text) for text in given]
    if len(specs) == len(ports) and not any(spec.name for spec in specs):
        specs = [replace(spec, name=port.name) for spec, port in zip(specs, ports, strict=True)]
    said = {spec.name: spec for spec in specs}
    unknown = [n or "without a name" for n in said if n not in {port.name for port in ports}]
    if unknown:
        known = ", ".join(port.name for port in ports)
        raise InputError(f"--input {', '.join(unknown)}: the inputs of '{name}' are {known}")
    return {port.name: (said.get(port.name) or _spec(port, batch)).make() for port in ports}


def _spec(port: FileInput, batch: int | None) -> InputSpec:
    """A spec for an input that the user says nothing of; the first size is taken for the batch."""
    sizes = [(batch or 1) if i == 0 and isinstance(n, str) else n for i, n in enumerate(port.shape)]
    unknown = [n for n in sizes if isinstance(n, str)]
    if unknown:
        raise InputError(
            f"the sizes {', '.join(unknown)} of the input '{port.name}' are open; give its shape, for example --input "
            f"{port.name}={'x'.join(str(16) if isinstance(n, str) else str(n) for n in sizes)}:"
            f"{str(port.dtype).removeprefix('torch.')}"
        )
    return InputSpec(port.name, tuple(n for n in sizes if isinstance(n, int)), port.dtype)


def open_sizes(module: nn.Module, inputs: Inputs, artefacts: Sequence[Artefact]) -> Dynamic | bool:
    """Return which sizes of a model's inputs stay open when it is built: those of the first saved model among all.

    So what is compared is built alike. Where nothing was saved, every size is fixed.
    """
    saved = next((a for a in artefacts if a.pruned is not None), None)
    if saved is None or saved.pruned is None or saved.module is None:
        return False
    dynamic = saved.pruned.plan.dynamic
    own, theirs = (input_names(forward_signature(m), *inputs.for_module(m)) for m in (saved.module, module))
    return dynamic if own == theirs else renamed(dynamic, own, theirs)


# ---------------------------------------------------------------------- runners
def check_options(options: Mapping[str, Any], backends: Sequence[Backend], artefacts: Sequence[Artefact]) -> None:
    """Refuse an option that nothing has which runs, or a value that the runtime of ONNX files does not have.

    Raises BackendError.

    >>> check_options({"dtyp": "float16"}, [ONNXRUNTIME], [])
    Traceback (most recent call last):
        ...
    fxprune.errors.BackendError: onnxruntime has no option 'dtyp'; did you mean 'dtype'? Known: dtype, fusion, ...
    """
    known = {option for backend in backends for option in backend.OPTIONS}
    if any(a.kind == "onnx" for a in artefacts):
        known |= _FILE_OPTIONS
        ONNXRUNTIME.configured(**{k: v for k, v in options.items() if k in _FILE_OPTIONS})
    for option in options:
        if option not in known:
            names = " and ".join(b.name for b in backends) or "what runs these files"
            raise BackendError(
                f"{names} has no option '{option}'{nearest(option, sorted(known)) or '.'} "
                f"Known: {', '.join(sorted(known)) or 'none'}"
            )


@dataclass(frozen=True, slots=True)
class Opened:
    """An artefact that can be run: what runs it, with the arguments that it takes.

    Attributes:
        runs_on: the backend, with its options.
        size: of the file that is run, in bytes; None where there is no file.
    """

    runner: Runner
    runs_on: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int | None

    def call(self) -> Callable[[], object]:
        """Return a call that runs it, laid out for timing."""
        return self.runner.bind(*self.args, **self.kwargs)

    def outputs(self) -> list[Tensor]:
        """Return what it computes."""
        return self.runner.run(*self.args, **self.kwargs)


def open_module(
    artefact: Artefact, inputs: Inputs, backend: Backend, threads: int, dynamic: Dynamic | bool, file: Path
) -> Opened:
    """Build an artefact's module on a backend, in `file` (without its ending) where the backend writes one.

    Raises:
        BackendError: see `Backend.build`.
        InputError: the inputs do not fit.
    """
    assert artefact.module is not None
    args, kwargs = inputs.for_module(artefact.module)
    path = file.with_name(file.name + _ENDINGS.get(backend.name, ""))
    runner = backend.build(artefact.module, args, kwargs, threads=threads, dynamic=dynamic, path=path)
    size = size_of(runner.path) if runner.path is not None else None
    if size is None and artefact.path is not None:  # the weights are all that a backend without files reads
        size = size_of(artefact.path)
    return Opened(runner, backend.key, args, kwargs, size)


def open_file(artefact: Artefact, inputs: Inputs, threads: int, options: Mapping[str, Any] | None = None) -> Opened:
    """Open a file on the one runtime that it is for.

    Args:
        options: of which an ONNX file takes `provider`; the others say how a model is built.

    Raises:
        BackendError: the runtime is not here, or the file is not one that it takes.
        InputError: the inputs are not those of the file.
    """
    assert artefact.path is not None
    what, size = f"'{artefact.name}'", size_of(artefact.path)
    if artefact.kind == "onnx":
        backend = ONNXRUNTIME.configured(**{k: v for k, v in (options or {}).items() if k in _FILE_OPTIONS})
        session = backend.load(artefact.path, threads)
        return Opened(session, backend.key, (), inputs.for_names(session.names, what), size)
    if artefact.kind == "engine":
        # A file beside the engine says whose it is: tensorrt_rtx is the library of the backend tensorrt-rtx.
        library = engine_backend(engines.read(artefact.path).library.replace("_", "-"))
        engine = library.load(artefact.path, threads)
        return Opened(engine, library.name, (), inputs.for_names(engine.names, what), size)
    package = PACKAGES.load(artefact.path, threads)
    tensors = inputs.tensors()
    missing = [name for name in package.keywords if name not in tensors]
    if missing:
        raise InputError(f"{what} takes {', '.join(missing)} by name, and the inputs are {', '.join(tensors)}")
    named = {name: tensors.pop(name) for name in package.keywords}
    return Opened(package, PACKAGES.name, tuple(tensors.values()), named, size)


def size_of(path: Path) -> int:
    """Return the bytes of a file, with the weights that lie beside an ONNX file, or of a saved directory."""
    if path.is_dir():
        return sum((path / name).stat().st_size for name in (WEIGHTS, GRAPH, PLAN))
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
