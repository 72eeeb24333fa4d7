"""Control flow and other operators that take functions, recorded as the operators that they come down to.

- `torch.cond`: both branches, and a `where` between their results. Both are computed then, so that neither may write in
  place to what was there before it.
- `scan`, `map`, `associative_scan`: one step after the other, over the length that the example has.
- `while_loop`: unrolled where the condition depends on constants only.
- `flex_attention`: the products, softmax and score functions that define it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan_op
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.flex_attention import flex_attention, math_attention
from torch._higher_order_ops.map import map_impl
from torch._higher_order_ops.scan import scan_op
from torch._higher_order_ops.while_loop import while_loop_op
from torch.utils._mode_utils import no_dispatch

from fxprune.errors import CaptureError
from fxprune.record import Recorder

#: A loop that has not ended after so many steps is not unrolled.
MAX_STEPS = 1000

_TORCH = Path(torch.__file__).parent
#: Where torch asks whether Dynamo is at work before it hands functions to an operator; else it would call Dynamo.
_ASKING = (str(_TORCH / "_higher_order_ops"), str(_TORCH / "nn" / "attention" / "flex_attention.py"))


@contextlib.contextmanager
def recorded_as_operators() -> Iterator[None]:
    """Let functions with control flow reach the recorder as operators; compiled modules run as they were written."""
    asked = torch.compiler.is_dynamo_compiling

    def is_dynamo_compiling() -> bool:
        return sys._getframe(1).f_code.co_filename.startswith(_ASKING) or asked()

    torch.compiler.is_dynamo_compiling = is_dynamo_compiling
    try:
        with _uncompiled() if "torch._dynamo" in sys.modules else contextlib.nullcontext():
            yield
    finally:
        torch.compiler.is_dynamo_compiling = asked


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Let compiled modules run as they were written; hooks, the recorder's among them, are welcome there."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile")
        yield


def _refuse(what: str) -> CaptureError:
    return CaptureError(f"{what}. Write it without torch's control flow operators, or move it out of `forward`.")


@cond_op.py_impl(Recorder)
def _cond(mode: Recorder, pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any) -> Any:
    """Compute both branches and take from one of them."""
    if not isinstance(pred, Tensor):
        with mode:
            return true_fn(*operands) if pred else false_fn(*operands)
    before = mode.written()
    with mode:
        yes, spec = pytree.tree_flatten(true_fn(*operands))
        no, other = pytree.tree_flatten(false_fn(*operands))
        after = mode.written()
        if any(after[storage] != times for storage, times in before.items()):
            raise _refuse("a branch of torch.cond writes in place to what was there before it")
        if spec != other or any(_kind(a) != _kind(b) for a, b in zip(yes, no, strict=True)):
            raise _refuse("the branches of torch.cond return different things")
        chosen = pred.reshape(())
        results = [torch.where(chosen, a, b) if isinstance(a, Tensor) else a for a, b in zip(yes, no, strict=True)]
    return pytree.tree_unflatten(results, spec)


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


@map_impl.py_impl(Recorder)
def _map(mode: Recorder, f: Callable[..., Any], xs: Sequence[Tensor], args: Sequence[Any]) -> Any:
    """Call the function for every entry of the first dimension."""
    with mode:
        return _stacked([f(*(x[i] for x in xs), *args) for i in range(len(xs[0]))])


@scan_op.py_impl(Recorder)
def _scan(mode: Recorder, f: Callable[..., Any], init: Any, xs: Sequence[Tensor], additional_inputs: Any) -> Any:
    """Call the function for every entry of the first dimension, each with what the last one carried over."""
    carried, steps = list(init), []
    with mode:
        for i in range(len(xs[0])):
            results = list(f(*carried, *(x[i] for x in xs), *additional_inputs))
            carried = results[: len(carried)]
            steps.append(results[len(carried) :])
        return [*carried, *_stacked(steps)]


@associative_scan_op.py_impl(Recorder)
def _associative_scan(mode: Recorder, f: Callable[..., Any], xs: Sequence[Tensor], additional_inputs: Any) -> Any:
    """Combine every entry of the first dimension with the result of those before it."""
    with mode:
        steps = [[x[0] for x in xs]]
        for i in range(1, len(xs[0])):
            steps.append(list(f(*steps[-1], *(x[i] for x in xs), *additional_inputs)))
        return _stacked(steps)


def _stacked(steps: Sequence[Any]) -> Any:
    """The results of all steps, each stacked along a new first dimension."""
    flat = [pytree.tree_flatten(s) for s in steps]
    stacked = [torch.stack(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    return pytree.tree_unflatten(stacked, flat[0][1])


@while_loop_op.py_impl(Recorder)
def _while_loop(
    mode: Recorder, cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Any, additional: Any, **_: Any
) -> Any:
    """Unroll a loop whose condition is known."""
    for _step in range(MAX_STEPS):
        with mode:
            going = cond_fn(*carried, *additional)
        if isinstance(going, Tensor):
            value = mode.known.value(mode.node_of(going))
            if value is None:
                raise _refuse("how often torch.while_loop runs depends on values")
            with no_dispatch():
                going = bool(value)
        if not going:
            return tuple(carried)
        with mode:
            carried = body_fn(*carried, *additional)
    raise _refuse(f"torch.while_loop runs more than {MAX_STEPS} times")


@flex_attention.py_impl(Recorder)
def _flex_attention(mode: Recorder, *args: Any, **kwargs: Any) -> Any:
    """Record the operators that define it."""
    with mode:
        return math_attention(*args, **kwargs)
