"""Where a module runs and in what type: on another device, cast, or with its channels last; its arguments with it.

A graph holds devices, types and fill values as literals, which `Module.to` does not reach: they follow here.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxprune.backends.base import TOLERANCE, tensors_of

#: The types that a cast replaces, in tensors and in literals; float64 is asked for by name and stays.
CASTED = frozenset({torch.float32, torch.float16, torch.bfloat16})
HALF = frozenset({torch.float16, torch.bfloat16})
#: The largest relative difference from the uncast module (see `compare_outputs`). Rounding to 11 and 8 significant bits
#: is off by 0.0005 and 0.004 at every operator, which adds up over the depth of a model.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: Of a module that is not cast, on CUDA: its convolutions there round their factors to 11 bits (TF32), as float16 does.
TOLERANCE_TF32 = 1e-2
#: Operators that write a number into a tensor, which has to hold it: others compute with it in float32.
_FILLS = frozenset(
    {"clamp", "constant_pad_nd", "fill", "fill_", "full", "full_like", "masked_fill", "masked_fill_"}
    | {"new_full", "pad", "scalar_tensor", "where"}
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a module runs.

    Attributes:
        device: a torch device, "cpu" or "cuda".
        dtype: what the tensors of `CASTED` types become; None leaves them.
        channels_last: whether images and the weights of two-dimensional convolutions lie with their channels last.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False

    @property
    def tolerance(self) -> float:
        """The largest relative difference from the module as it was that its outputs may show.

        >>> Placement(torch.device("cpu")).tolerance, Placement(torch.device("cpu"), torch.bfloat16).tolerance
        (0.001, 0.05)
        """
        if self.dtype is not None:
            return TOLERANCES[self.dtype]
        return TOLERANCE if self.device.type == "cpu" else TOLERANCE_TF32

    def module(self, module: nn.Module) -> nn.Module:
        """Return `module` itself where nothing has to change, else a copy.

        The copy has tensors of its own for those that change and shares the others with `module`; what is one tensor
        under two names stays one.

        >>> layer = nn.Linear(2, 2)
        >>> Placement(torch.device("cpu")).module(layer) is layer
        True
        >>> Placement(torch.device("cpu"), torch.bfloat16).module(layer).weight.dtype, layer.weight.dtype
        (torch.bfloat16, torch.float32)
        """
        images = _convolution_weights(module) if self.channels_last else frozenset[int]()
        own: dict[int, Any] = {}
        changed = False
        for tensor in [*module.parameters(), *module.buffers()]:
            source = tensor.detach()
            placed = self._tensor(source, id(tensor) in images)
            changed |= placed is not source
            own[id(tensor)] = tensor if placed is source else _like(tensor, placed)
        if not changed and not any(isinstance(part, fx.GraphModule) for part in module.modules()):
            return module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # copyreg about torch's own pytree specifications
            module = copy.deepcopy(module, own)
        for part in module.modules():
            if isinstance(part, fx.GraphModule):
                _retarget(part, self.device, self.dtype)
        return module

    def arguments(self, arguments: Any) -> Any:
        """Return nested arguments with every tensor on the device, cast, and with channels last where it has four
        dimensions and floating-point numbers; each where it has to be.
        """
        # What is one tensor stays one: some modules ask whether two inputs are.
        placed: dict[int, Tensor] = {}

        def place(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in placed:
                image = self.channels_last and leaf.dim() == 4 and leaf.is_floating_point()
                placed[id(leaf)] = self._tensor(leaf, image)
            return placed[id(leaf)]

        with torch.no_grad():
            return pytree.tree_map(place, arguments)

    def _tensor(self, tensor: Tensor, image: bool) -> Tensor:
        dtype = self.dtype if self.dtype is not None and tensor.dtype in CASTED else tensor.dtype
        if dtype != tensor.dtype:
            tensor = _within(tensor, dtype)
        tensor = tensor.to(self.device, dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if image else tensor


def home(module: nn.Module, arguments: object = ()) -> torch.device:
    """Return the device of the module's first tensor, or where it has none that of the first argument, else the CPU.

    >>> home(nn.Linear(2, 2)), home(nn.ReLU())
    (device(type='cpu'), device(type='cpu'))
    """
    tensors = [*module.parameters(), *module.buffers()] or tensors_of(arguments)
    return tensors[0].device if tensors else torch.device("cpu")


def as_float32(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in float32, any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


def _like(tensor: Tensor, placed: Tensor) -> Tensor:
    return nn.Parameter(placed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else placed


def _convolution_weights(module: nn.Module) -> frozenset[int]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return frozenset(id(part.weight) for part in module.modules() if isinstance(part, kinds))


def _within(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor with what the type cannot hold moved to its bounds; infinities stay.

    The least float32 number, which masks are made of, would become an infinity, and a row of them NaN in a softmax.
    """
    bounds = torch.finfo(dtype)
    return torch.where(tensor.isinf(), tensor, tensor.clamp(bounds.min, bounds.max))


def _retarget(module: fx.GraphModule, device: torch.device, dtype: torch.dtype | None) -> None:
    """Let the literals of a graph follow its tensors: devices, types, and numbers that are written into tensors."""
    changed = False

    def follow(fills: bool, value: Any) -> Any:
        if isinstance(value, torch.device) and value.type != "meta":
            return device
        if dtype is not None and isinstance(value, torch.dtype) and value in CASTED:
            return dtype
        if dtype is not None and fills and isinstance(value, float) and math.isfinite(value):
            bounds = torch.finfo(dtype)
            return min(max(value, bounds.min), bounds.max)
        return value

    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        fills = _name(node.target) in _FILLS
        before = (node.args, dict(node.kwargs))
        after: Any = fx.node.map_aggregate(before, functools.partial(follow, fills))
        if after != before:
            (node.args, node.kwargs), changed = after, True
    if changed:
        module.recompile()


def _name(target: object) -> str:
    """Return an operator's name without its namespace and overload."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", ""))
