"""From a module and example inputs to one functional graph of whole operators, with dynamic sizes where asked.

Batch (and sequence) are made dynamic without symbolic shapes: the forward pass is recorded at two values of each
dynamic
size; integers that differ between the recordings depend on it, and an affine formula through them is put back into the
graph. A recording whose operators differ, or an integer that no such formula explains, keeps the size static, and says
so in the notes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import function as autograd_function
from torch.utils._mode_utils import no_dispatch

from fxprune.admit import refuse_inputs
from fxprune.axes import Size, tidy
from fxprune.errors import CaptureError, FxpruneError, InputError
from fxprune.higher_order import recorded_as_operators
from fxprune.input_names import input_names
from fxprune.model_state import ModelState, eval_with
from fxprune.record import Recorder

#: More dynamic sizes than this would need too many recordings.
MAX_SYMBOLS = 3
CHANNELS_LAST = torch.channels_last


@dataclass(frozen=True, slots=True)
class Varying:
    """An integer of the graph that depends on the dynamic sizes: its value in each recording."""

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dynamic size: its name, where it can be read off (placeholder, dimension), and its value in each recording."""

    name: str
    places: tuple[tuple[str, int], ...]
    values: tuple[int, ...]


@dataclass(slots=True)
class Captured:
    """A model as a functional graph of ATen operators.

    Attributes:
        graph: placeholders, get_attr nodes whose targets are keys of `tensors`, operators, one output.
            Node meta: `shape` (a tuple of sizes, or a list of them for several results), `dtype`, `path` (module),
            `source`.
        tensors: parameters, buffers and constants by name; the model's own tensors, not copies.
        aliases: further names of tied tensors -> the name in `tensors`.
        constants: names in `tensors` that are neither parameters nor buffers.
        transient: names of non-persistent buffers.
        in_spec, out_spec: pytree specifications of ((args, kwargs)) and of the result.
        symbols: the dynamic sizes; empty where everything is static.
        notes: what the user should know about the capture.
        types: module path -> the names of its class and of those that it derives from.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    constants: set[str]
    transient: set[str]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: list[Any]
    symbols: list[Symbol]
    notes: list[str] = field(default_factory=list)
    types: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _formulas: dict[Size, dict[tuple[str, ...], int]] = field(default_factory=dict)

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        """Input name -> dimension -> size name."""
        found: dict[str, dict[int, str]] = {}
        for symbol in self.symbols:
            for name, dim in symbol.places:
                found.setdefault(name, {})[dim] = symbol.name
        return found

    def affine(self, size: Size) -> dict[tuple[str, ...], int]:
        """Return a size as a sum of products of symbols: {(): constant, ("batch",): factor, ...}.

        Raises CaptureError where no such formula with integer factors passes through its values.
        """
        if isinstance(size, int):
            return {(): size}
        if size not in self._formulas:
            self._formulas[size] = self._fit(size)
        return self._formulas[size]

    def _fit(self, size: tuple[int, ...]) -> dict[tuple[str, ...], int]:
        names = [s.name for s in self.symbols]
        terms = [t for n in range(len(names) + 1) for t in itertools.combinations(names, n)]
        values = {s.name: s.values for s in self.symbols}
        rows = [[int(np.prod([values[n][i] for n in term])) for term in terms] for i in range(len(size))]
        solution = np.linalg.solve(np.array(rows, dtype=float), np.array(size, dtype=float))
        whole = np.rint(solution)
        largest = max(abs(whole[1:]), default=0)
        # 2 S - 1 is a table of relative positions; of the batch there are only multiples (its square may look affine)
        batched = any(v for term, v in zip(terms, whole, strict=True) if "batch" in term)
        allowed = 0 if batched else largest
        if np.abs(solution - whole).max() > 1e-6 or (largest != 1 and abs(whole[0]) > allowed):
            raise CaptureError(f"{size} is not a sum of products of {names}")
        return {term: int(v) for term, v in zip(terms, whole, strict=True) if v}


def example(inputs: Any, kwargs: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) from what a user passes: a tensor, a tuple of positional inputs, or a dict of keyword
    inputs.

    >>> example(torch.zeros(1))
    ((tensor([0.]),), {})
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), dict(kwargs or {})
    if isinstance(inputs, Tensor):
        return (inputs,), dict(kwargs or {})
    raise InputError(
        "example inputs are a tensor, a tuple of positional inputs or a dict of keyword inputs, not "
        f"{type(inputs).__name__}"
    )


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None = None,
) -> Captured:
    """Record the model in eval mode; the model itself is left exactly as it was.

    Args:
        dynamic_shapes: {input name: {dimension: size name}}; None makes dimension 0 of every tensor input that is as
            long as the first one's the dynamic size "batch", if the model allows it; False makes everything static.

    Raises:
        InputError: the inputs do not fit the forward signature, or `dynamic_shapes` names what is not there.
        CaptureError: the forward pass failed, or cannot be recorded; the text holds the user's source line.
    """
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    names = _input_names(model, args, kwargs)
    tensors = {n: x for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor)}
    notes = refuse_inputs(dict(zip(names, leaves, strict=True)))
    captured = _captured(_Session(model, names, leaves, in_spec), tensors, dynamic_shapes)
    captured.notes += notes
    return captured


def _captured(
    session: _Session, tensors: dict[str, Tensor], dynamic_shapes: Mapping[str, Mapping[int, Any]] | bool | None
) -> Captured:
    """Record with the sizes dynamic that are asked for, or with none where nobody insists and it does not work."""
    asked = _symbols(tensors, dynamic_shapes)
    if asked:
        try:
            return session.run(asked)
        except FxpruneError as error:
            if dynamic_shapes is not None:
                raise CaptureError(f"the sizes {sorted(asked)} cannot be dynamic: {error}") from error
            reason = str(error).splitlines()[0]
            captured = session.run({})
            captured.notes.append(f"the batch size is fixed at that of the example inputs, because {reason}")
            return captured
    return session.run({})


def _input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """One name for each leaf of the inputs, after the parameters of `forward`."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__}.forward{signature} does not take these inputs: {error}") from error
    return input_names(signature, args, kwargs)


def _symbols(
    tensors: dict[str, Tensor], spec: Mapping[str, Mapping[int, Any]] | bool | None
) -> dict[str, list[tuple[str, int]]]:
    """Size name -> the (input, dimension) pairs that have it."""
    if spec is False:
        return {}
    if spec is None or spec is True:
        shaped = {n: x for n, x in tensors.items() if x.dim()}
        if not shaped:
            return {}
        batch = next(iter(shaped.values())).shape[0]
        return {"batch": [(n, 0) for n, x in shaped.items() if x.shape[0] == batch]}
    found: dict[str, list[tuple[str, int]]] = {}
    for name, dims in spec.items():
        if name not in tensors:
            raise InputError(f"dynamic_shapes names '{name}', but the tensor inputs are {', '.join(tensors) or 'none'}")
        for dim, label in (dims or {}).items():
            if not 0 <= dim < tensors[name].dim():
                raise InputError(f"dynamic_shapes names dimension {dim} of '{name}', which has {tensors[name].dim()}")
            found.setdefault(getattr(label, "__name__", str(label)), []).append((name, dim))
    if len(found) > MAX_SYMBOLS:
        raise InputError(f"at most {MAX_SYMBOLS} sizes can be dynamic at once, not {len(found)}: {', '.join(found)}")
    return found


def _probes(name: str, size: int) -> tuple[int, int]:
    """Two values to record at, the example's own among them where that says enough: a forward may branch on its size.

    A batch of 1 does not: many models skip a no-op there. That such a graph is right for it, the full proof checks.

    A second batch size is far away, so that halves or squares of it are not taken for multiples; other
    sizes stay at or below the example's, which the model takes.
    """
    if name == "batch":
        return (size, 2 * size + 3) if size > 1 else (5, 7)
    return (size, size - 2) if size >= 6 else (size + 2, size)


#: (the graph that is being recorded, the model's modules by path) -> what to run the forward pass in.
Inside = Callable[[fx.Graph, Mapping[str, nn.Module]], contextlib.AbstractContextManager[Any]]


def record(model: nn.Module, captured: Captured, inside: Inside | None = None) -> fx.Graph:
    """Record once more, at the first of the sizes that `captured` was: the same graph for the same code.

    Args:
        model: the model that was captured, or one that takes the same inputs.
        inside: makes a context to run the forward pass in; attributes of modules it changes are put back.
    """
    names = [str(n.target) for n in captured.graph.nodes if n.op == "placeholder"]
    sizes = {place: symbol.values[0] for symbol in captured.symbols for place in symbol.places}
    return _Session(model, names, captured.inputs, captured.in_spec)._record(sizes, inside)[0]


class _Session:
    """Records one model at several input sizes and merges the recordings."""

    def __init__(self, model: nn.Module, names: list[str], leaves: list[Any], in_spec: pytree.TreeSpec) -> None:
        self.model, self.names, self.leaves, self.in_spec = model, names, leaves, in_spec
        self.state = ModelState(model)
        self.paths = {id(m): n for n, m in model.named_modules()}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.transient: set[str] = set()
        self._by_id: dict[int, str] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.fakes: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        for name, tensor in itertools.chain(
            model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        ):
            first = self._by_id.setdefault(id(tensor), name)
            if first != name:
                self.aliases[name] = first
            else:
                self.tensors[name] = tensor
                self.fakes[name] = self._fake(tensor, tensor.shape)
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            self.transient |= {prefix + n for n in module._non_persistent_buffers_set}
            for key, value in vars(module).items():
                if isinstance(value, Tensor):
                    self._by_id.setdefault(id(value), prefix + key)

    def _fake(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        strides = tensor.stride() if list(shape) == list(tensor.shape) else None
        if strides is None:
            rows = tensor.dim() != 4 or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=CHANNELS_LAST)
            order = torch.contiguous_format if rows else CHANNELS_LAST
            meta = torch.empty(shape, dtype=tensor.dtype, device="meta", memory_format=order)
        else:
            meta = torch.empty_strided(tuple(shape), strides, dtype=tensor.dtype, device="meta")
        device = tensor.device if tensor.device.type != "meta" else torch.device("cpu")
        return FakeTensor(self.mode, meta, device)

    def run(self, asked: dict[str, list[tuple[str, int]]]) -> Captured:
        grids = [_probes(s, self._size(places[0])) for s, places in asked.items()]
        points = [dict(zip(asked, values, strict=True)) for values in itertools.product(*grids)]
        graphs = [self._record({p: point[s] for s, places in asked.items() for p in places}) for point in points]
        graph, out_spec, notes = graphs[0]
        _merge([g for g, _, _ in graphs])
        symbols = [Symbol(s, tuple(places), tuple(pt[s] for pt in points)) for s, places in asked.items()]
        captured = Captured(
            graph=graph,
            tensors=self.tensors | self.constants,
            aliases=self.aliases,
            constants=set(self.constants),
            transient=self.transient,
            in_spec=self.in_spec,
            out_spec=out_spec,
            inputs=self.leaves,
            symbols=symbols,
            notes=notes,
            types=_class_names(self.state.modules),
        )
        for node in graph.nodes:
            for size in _varying(node.meta.get("shape")) if symbols else ():
                captured.affine(size)
        return captured

    def _size(self, place: tuple[str, int]) -> int:
        return int(self.leaves[self.names.index(place[0])].shape[place[1]])

    def _record(
        self, sizes: dict[tuple[str, int], int], inside: Inside | None = None
    ) -> tuple[fx.Graph, pytree.TreeSpec, list[str]]:
        graph, stack, notes = fx.Graph(), [""], list[str]()
        found: dict[int, str] = {}
        recorder = Recorder(graph, lambda t: self._constant(t, found), lambda: stack[-1])
        fakes = []
        for name, leaf in zip(self.names, self.leaves, strict=True):
            node = graph.placeholder(name)
            if isinstance(leaf, Tensor):
                leaf = self._fake(leaf, [sizes.get((name, d), n) for d, n in enumerate(leaf.shape)])
                recorder.bind(leaf, node)
                node.meta["val"] = leaf
            fakes.append(leaf)
        for name, fake in self.fakes.items():
            recorder.bind_attribute(fake, name)
            recorder.bind_attribute(self.tensors[name], name)
        args, kwargs = pytree.tree_unflatten(fakes, self.in_spec)
        try:
            with eval_with(self.state, self._swapped()), _module_stack(self.paths, stack), _whole_operators():
                around = inside(graph, self.state.modules) if inside else contextlib.nullcontext()
                with _autograd_functions(notes), self.mode, enable_python_dispatcher(), recorder, around:
                    out = self.model(*args, **kwargs)
                leaves, out_spec = pytree.tree_flatten(out)
        except FxpruneError:
            raise
        except Exception as error:
            raise CaptureError(_explain(self.model, error)) from error
        results: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                results.append(recorder.node_of(leaf))
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                results.append(leaf)
            else:
                notes.append(
                    f"an output of type {type(leaf).__name__} is not a tensor; the pruned module returns None there"
                )
                results.append(None)
        if not any(isinstance(r, fx.Node) for r in results):
            record = next((type(x).__name__ for x in leaves if dataclasses.is_dataclass(x)), None)
            hint = f"; let torch.utils._pytree.register_dataclass({record}) say what is in it" if record else ""
            raise CaptureError(
                f"{type(self.model).__name__} returns no tensor, so there is nothing to keep equal{hint}"
            )
        graph.output(results)
        _detach_no_grad(graph, {n for n, t in self.tensors.items() if isinstance(t, nn.Parameter)})
        graph.eliminate_dead_code()
        for node in graph.nodes:
            _shape(node)
        return graph, out_spec, notes

    def _swapped(self) -> dict[str, Tensor]:
        return self.fakes | {alias: self.fakes[name] for alias, name in self.aliases.items()}

    def _constant(self, tensor: Tensor, found: dict[int, str]) -> str:
        if isinstance(tensor, FakeTensor):
            raise CaptureError(
                "a tensor appears that no recorded operator made (`.data`, or a cache from another trace)"
            )
        name = self._by_id.get(id(tensor)) or f"_constant_{len(found)}"
        found[id(tensor)] = name
        known = self.constants.get(name)
        with no_dispatch():  # the values themselves, not their fakes
            same = known is None or known is tensor or torch.equal(known, tensor)
        if not same:
            raise CaptureError(f"the constant '{name}' differs between two recordings")
        self.constants[name] = tensor
        return name


def _class_names(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    known: dict[type, tuple[str, ...]] = {}
    for kind in {type(m) for m in modules.values()}:
        known[kind] = tuple(c.__name__ for c in kind.__mro__ if c is not nn.Module and c is not object)
    return {path: known[type(m)] for path, m in modules.items()}


@contextlib.contextmanager
def _module_stack(paths: dict[int, str], stack: list[str]) -> Iterator[None]:
    """Keep the path of the running module on top of `stack`, through torch's global forward hooks."""

    def enter(module: nn.Module, _args: Any) -> None:
        stack.append(paths.get(id(module), stack[-1]))

    def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
        stack.pop()

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextlib.contextmanager
def _whole_operators() -> Iterator[None]:
    """Attention layers run their own Python code, not one opaque fused operator; gradients are on, as for a user.

    Model code is told that it is being exported, as `torch.export` does, so that it takes its traceable branches.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    told = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.backends.mha.set_fastpath_enabled(False)
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it would print what the CaptureError says
    quiet, logger.disabled = logger.disabled, True
    try:
        with torch.enable_grad(), recorded_as_operators():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = told
        logger.disabled = quiet


@contextlib.contextmanager
def _autograd_functions(notes: list[str]) -> Iterator[None]:
    """Note each `torch.autograd.Function` that runs: its operators are recorded, what its `backward` says is not."""
    found: list[str] = []
    before = autograd_function._is_setup_context_defined

    def seen(setup_context: Any) -> bool:  # every `apply` asks, also one that was bound before this began
        frame = inspect.currentframe()
        caller = frame.f_back.f_locals.get("cls") if frame and frame.f_back else None
        if isinstance(caller, type) and not caller.__module__.startswith("torch.") and caller.__name__ not in found:
            found.append(caller.__name__)
        return bool(before(setup_context))  # type: ignore[no-untyped-call]

    autograd_function._is_setup_context_defined = seen
    try:
        yield
    finally:
        autograd_function._is_setup_context_defined = before
    if found:
        notes.append(f"gradients pass through the operators inside {', '.join(found)}, not through `backward` of it")


def _explain(model: nn.Module, error: Exception) -> str:
    """What failed, and the innermost line of the user's (or the model library's) code."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    torch_dir = torch.__file__.rsplit("/", 1)[0]
    here = __file__.rsplit("/", 1)[0]
    own = [f for f in frames if not f.filename.startswith((torch_dir, here))]
    where = (
        f"\n  at {own[-1].filename}:{own[-1].lineno} in {own[-1].function}: {(own[-1].code_context or [''])[0].strip()}"
        if own
        else ""
    )
    text = str(error).strip().splitlines()
    message = (
        f"the forward pass of {type(model).__name__} cannot be recorded: "
        f"{type(error).__name__}: {text[0] if text else ''}{where}\n"
    )
    if type(error).__name__ in _NEEDS_VALUES or ".numpy()" in str(error):
        return message + (
            "  Shapes are known there, values are not: a branch on a tensor's value, `.item()` or `.numpy()` cannot be "
            "followed. Move that line out of `forward`."
        )
    return message + "  Check that the model runs on the example inputs."


#: What torch raises where code asks a fake tensor for a value.
_NEEDS_VALUES = {
    *("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode"),
    *("UnsupportedFakeTensorException", "UnsupportedOperatorException"),
}


def _shape(node: fx.Node) -> None:
    """Replace the recorded tensor by its shape and dtype."""
    value = node.meta.pop("val", None)
    if isinstance(value, Tensor):
        node.meta["shape"], node.meta["dtype"] = tuple(int(n) for n in value.shape), value.dtype
    elif isinstance(value, list | tuple):
        node.meta["shape"] = [tuple(int(n) for n in v.shape) if isinstance(v, Tensor) else () for v in value]
        node.meta["dtype"] = next((v.dtype for v in value if isinstance(v, Tensor)), None)


def _varying(shape: Any) -> Iterator[Size]:
    if isinstance(shape, list):
        for s in shape:
            yield from _varying(s)
    elif shape:
        yield from (s for s in shape if isinstance(s, tuple))


def _merge(graphs: list[fx.Graph]) -> None:
    """Make the first graph hold what all say: sizes become tuples, differing integers become `Varying`."""
    if len(graphs) == 1:
        return
    columns = [list(g.nodes) for g in graphs]
    if len({len(c) for c in columns}) > 1:
        raise CaptureError(f"the number of operators depends on the sizes: {[len(c) for c in columns]}")
    for row in zip(*columns, strict=True):
        first = row[0]
        if len({str(n.target) for n in row}) > 1:
            raise CaptureError(
                f"the operators depend on the sizes: {[str(n.target) for n in row]} ({first.meta.get('source')})"
            )
        try:
            first.args = _merge_args([n.args for n in row])
            first.kwargs = _merge_args([n.kwargs for n in row])
        except ValueError as error:
            raise CaptureError(f"{first.target}: {error} ({first.meta.get('source')})") from None
        shapes = [n.meta.get("shape") for n in row]
        if isinstance(shapes[0], list):
            first.meta["shape"] = [_merge_shapes(s) for s in zip(*shapes, strict=True)]
        elif shapes[0] is not None:
            first.meta["shape"] = _merge_shapes(shapes)


def _merge_shapes(shapes: Sequence[Any]) -> tuple[Size, ...]:
    if len({len(s) for s in shapes}) > 1:
        raise CaptureError("the number of dimensions depends on the sizes")
    return tuple(tidy(values) for values in zip(*shapes, strict=True))


def _merge_args(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, fx.Node):
        if len({v.name if isinstance(v, fx.Node) else None for v in values}) > 1:
            raise ValueError("its operands depend on the sizes")
        return first
    if isinstance(first, list | tuple):
        if len({len(v) for v in values}) > 1:
            raise ValueError("the length of a list depends on the sizes")
        return (
            type(first)(_merge_args(v) for v in zip(*values, strict=True))
            if type(first) in (list, tuple)
            else [_merge_args(v) for v in zip(*values, strict=True)]
        )
    if isinstance(first, dict):
        return {k: _merge_args([v[k] for v in values]) for k in first}
    if all(type(v) is type(first) and (v == first or v is first) for v in values):
        return first
    if all(type(v) is int for v in values):
        return Varying(tuple(values))
    raise ValueError(f"the argument {first!r} depends on the sizes ({', '.join(repr(v) for v in values[1:])})")


def _detach_no_grad(graph: fx.Graph, parameters: set[str]) -> None:
    """What was computed under `torch.no_grad()` passes no gradient on: say so with `detach` where it leaves the region.

    Only values that depend on parameters or on floating-point inputs need it.
    """
    needs: set[fx.Node] = set()
    for node in list(graph.nodes):
        tensor = node.meta.get("val")
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if node.op in ("placeholder", "get_attr"):
            if floating and (node.op == "placeholder" or node.target in parameters):
                needs.add(node)
            continue
        if not any(a in needs for a in node.all_input_nodes):
            continue
        if node.op == "output" or node.meta.get("grad", True):
            needs.add(node)
            continue
        outside = [u for u in node.users if u.op == "output" or u.meta.get("grad", True)]
        if not floating:
            needs.add(node)
            continue
        needs.add(node)
        if outside:
            with graph.inserting_after(node):
                detached = graph.call_function(torch.ops.aten.detach.default, (node,))
            detached.meta = dict(node.meta, grad=False)
            for user in outside:
                user.replace_input_with(node, detached)
