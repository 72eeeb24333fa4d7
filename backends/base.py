"""What a backend is: `available`, `build` and what `build` returns, a `Runner`."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune.backends.dynamic import places
from fxprune.copies import copied
from fxprune.errors import BackendError, InputError
from fxprune.input_names import Dynamic
from fxprune.registry import Registry, nearest

#: The largest relative difference from torch (see `compare_outputs`) that a built model may show.
TOLERANCE = 1e-3


class Runner(abc.ABC):
    """A model built for one backend, ready to be called with the arguments of the module's `forward`."""

    #: The file that was built; None where the backend writes none, or wrote it to a temporary folder.
    path: Path | None = None

    @abc.abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the module's output tensors on the CPU, in the order in which they occur in the (nested) result.

        Raises BackendError where the backend rejects the arguments.
        """

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a call that runs the model on these arguments as often as it is timed.

        A backend that can lays the arguments out once and writes the outputs to one place, so that no call copies or
        allocates what a caller in its place would have ready. On a GPU, which is given work and left to it, the call
        returns once the outputs are there, so that any clock around it measures the work.
        """
        return functools.partial(self.run, *args, **kwargs)

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a reader of a measurement must know, as plain JSON values: device, threads, versions, parity."""


class Backend(abc.ABC):
    """One way to run a model.

    Subclasses set `name` and `OPTIONS`, and write `available`, `preferred_multiple` and `_build`.
    """

    name: str
    #: Option -> the values that it can have, the default first.
    OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType({})

    def __init__(self) -> None:
        self.options: dict[str, Any] = {option: values[0] for option, values in self.OPTIONS.items()}

    @property
    def key(self) -> str:
        """The name, and the options that are not the defaults."""
        said = [f"{k}={v}" for k, v in self.options.items() if v != self.OPTIONS[k][0]]
        return f"{self.name}({', '.join(said)})" if said else self.name

    def configured(self, **options: Any) -> Self:
        """Return this backend with options set.

        Raises BackendError where it has no such option, or the option no such value.
        """
        for option, value in options.items():
            if option not in self.OPTIONS:
                known = list(self.OPTIONS)
                raise BackendError(
                    f"backend '{self.name}' has no option '{option}'{nearest(option, known) or '.'} "
                    f"Known: {', '.join(known) or 'none'}"
                )
            if value not in self.OPTIONS[option]:
                allowed = ", ".join(map(str, self.OPTIONS[option]))
                raise BackendError(f"backend '{self.name}': {option} is one of {allowed}, not {value!r}")
        result = copy.copy(self)
        result.options = self.options | options
        return result

    @property
    @abc.abstractmethod
    def preferred_multiple(self) -> int:
        """The number that channel counts should be multiples of to run fast."""

    @abc.abstractmethod
    def available(self) -> str | None:
        """Return None where the backend can be used; else why not, with the command that mends it."""

    @abc.abstractmethod
    def _build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        threads: int,
        dynamic: Dynamic,
        path: Path | None,
    ) -> Runner:
        """Build `module`, which is in inference mode and private to the runner but for its parameters.

        `dynamic` names what may change from call to call; it was checked, and is empty where nothing may.
        """

    def build(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        threads: int,
        dynamic: bool | Dynamic = True,
        path: Path | None = None,
    ) -> Runner:
        """Build `module` for inference and check it against torch on `args` and `kwargs`.

        The module itself is left as it is, training mode included; its parameters are shared with the runner, not
        copied, where the backend keeps torch tensors. `threads` is the number of CPU threads that compute one
        operator. `dynamic` says which dimensions may change from call to call: input name -> dimension -> size name,
        as in `Plan.dynamic`; True is dimension 0 of every tensor that has the first tensor's size there, False none.
        The others keep the size that they have in `args` and `kwargs`. `path` is where the artefact is kept.

        Raises BackendError where the backend is not available, cannot build the module, or computes something else,
        and InputError where the arguments do not fit the module.
        """
        reason = self.available()
        if reason is not None:
            raise BackendError(f"backend '{self.name}' cannot be used here: {reason}")
        if threads < 1:
            raise BackendError(f"backend '{self.name}' was asked for {threads} threads; pass 1 or more")
        signature = forward_signature(module)
        arguments = bind_arguments(signature, args, kwargs or {})
        open_sizes = places(signature, *call_arguments(signature, arguments), dynamic)
        return self._build(inference_copy(module), args, dict(kwargs or {}), threads, open_sizes, path)

    def build_parts(self, parts: Sequence[tuple[nn.Module, Sequence[Tensor]]], *, threads: int) -> list[Runner]:
        """Build several modules, each with its tensors, to time them; a backend may have a faster way.

        Raises BackendError as `build` does.
        """
        return [self.build(module, tuple(tensors), threads=threads, dynamic=False) for module, tensors in parts]


BACKENDS: Registry[Backend] = Registry("backend", BackendError)


def chosen(setting: str | Mapping[str, Any]) -> Backend:
    """Return the backend that a recipe names, with its options.

    Raises BackendError where there is no such backend, option or value.

    >>> chosen({"name": "torch"}).key
    'torch'
    >>> chosen({"name": "torch", "dtpye": "bfloat16"})
    Traceback (most recent call last):
        ...
    fxprune.errors.BackendError: backend 'torch' has no option 'dtpye'; did you mean 'dtype'? Known: device, dtype, ...
    """
    given = {"name": setting} if isinstance(setting, str) else dict(setting)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise BackendError(f'backend is a name or {{"name": ..., option: value}}, not {setting!r}')
    return BACKENDS[name].configured(**given)


def inference_copy(module: nn.Module) -> nn.Module:
    """Return a copy of `module` in eval mode that shares its parameters and buffers.

    >>> layer = nn.Dropout().train()
    >>> inference_copy(layer).training, layer.training
    (False, True)
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    try:
        return copied(module, shared).eval()
    except Exception as error:
        raise BackendError(
            f"{type(module).__name__} cannot be copied: {error}. Tensors computed by an earlier forward pass and kept "
            "as attributes are the usual cause; delete or detach them."
        ) from error


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of the module's `forward`.

    >>> forward_signature(nn.ReLU())
    <Signature (input: torch.Tensor) -> torch.Tensor>
    """
    return inspect.signature(module.forward)


def bind_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by the name of the parameter that takes them.

    Raises InputError where they do not fit the signature.

    >>> bind_arguments(forward_signature(nn.Bilinear(2, 2, 2)), (1,), {"input2": 2})
    {'input1': 1, 'input2': 2}
    """
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InputError(f"the arguments do not fit forward{signature}: {error}") from error


def call_arguments(
    signature: inspect.Signature, arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn what `bind_arguments` returned into `args, kwargs` again.

    >>> call_arguments(forward_signature(nn.Bilinear(2, 2, 2)), {"input1": 1, "input2": 2})
    ((1, 2), {})
    """
    bound = signature.bind_partial()
    bound.arguments.update(arguments)
    return bound.args, bound.kwargs


def tensors_of(value: object) -> list[Tensor]:
    """Return the tensors in a nested structure, in order.

    >>> [tensor.item() for tensor in tensors_of({"a": torch.tensor(1), "b": [None, torch.tensor(2)]})]
    [1, 2]
    """
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a backend's outputs are from torch's: the largest over all output tensors.

    `max_abs` is the largest absolute difference; `max_rel` is an output tensor's largest absolute difference divided by
    the largest finite magnitude of torch's tensor.
    """

    max_abs: float
    max_rel: float

    def to_json(self) -> dict[str, float]:
        """Return the two figures by name."""
        return asdict(self)


def compare_outputs(expected: list[Tensor], actual: list[Tensor]) -> Parity:
    """Compare two lists of output tensors, in float64.

    Equal infinities and NaN in the same places are no difference; a NaN or an infinity on one side only is an infinite
    one. Raises BackendError where the number of tensors or their shapes differ.

    >>> compare_outputs([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -3.0])])
    Parity(max_abs=1.0, max_rel=0.25)
    """
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise BackendError(f"the outputs have other shapes than torch's: {shapes[1]} instead of {shapes[0]}")
    max_abs = max_rel = 0.0
    for want, got in zip(expected, actual, strict=True):
        if want.numel() == 0:
            continue
        left, right = want.detach().to("cpu", torch.float64), got.detach().to("cpu", torch.float64)
        same = (left == right) | (left.isnan() & right.isnan())
        gap = torch.where(same, 0.0, (left - right).abs())
        difference = torch.where(gap.isnan(), torch.inf, gap).max().item()
        scale = torch.where(left.isfinite(), left, 0.0).abs().max().item()
        max_abs = max(max_abs, difference)
        # Where torch gives nothing but zeros there is nothing to be relative to: any difference counts in full.
        max_rel = max(max_rel, difference / scale if scale else difference)
    return Parity(max_abs, max_rel)


def check_parity(
    name: str, module: nn.Module, arguments: Mapping[str, Any], actual: list[Tensor], tolerance: float = TOLERANCE
) -> Parity:
    """Compare `actual` with what `module` gives for `arguments` (as `bind_arguments` returns them).

    Raises BackendError where the relative difference is above `tolerance`.
    """
    args, kwargs = call_arguments(forward_signature(module), arguments)
    with torch.no_grad():
        expected = tensors_of(module(*args, **kwargs))
    parity = compare_outputs(expected, actual)
    # `not <=` so that a NaN cannot pass.
    if not parity.max_rel <= tolerance:
        raise BackendError(
            f"backend '{name}' does not compute what {type(module).__name__} computes: relative difference "
            f"{parity.max_rel:.3g}, absolute {parity.max_abs:.3g}, allowed {tolerance:g} relative. "
            "Check with another backend, and in float32."
        )
    return parity
