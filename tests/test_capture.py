"""Capture: what is recorded equals the model, for every form of inputs and outputs, and the model stays as it was."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel

from fxprune import shortcuts
from fxprune.analyse import analyse
from fxprune.capture import Captured, Varying, capture
from fxprune.errors import CaptureError, InputError
from fxprune.kept import Kept
from fxprune.rewrite import rewrite

aten = torch.ops.aten


def emitted(model: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> tuple[Captured, fx.GraphModule]:
    """The capture, and the module emitted from it with nothing removed."""
    captured = capture(model, args, kwargs, dynamic)
    return captured, rewrite(analyse(captured), Kept({}), model).module


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, and tensors that are equal but for rounding."""
    leaves, spec = pytree.tree_flatten(actual)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    assert spec == wanted_spec
    for a, b in zip(leaves, wanted, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b and type(a) is type(b)


def assert_equal_to_eager(model: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> Captured:
    """What is emitted gives the model's own outputs on the example inputs; inputs written to are cloned before."""
    captured, module = emitted(model, *args, dynamic=dynamic, **kwargs)
    copies = [pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs)) for _ in range(2)]
    with torch.no_grad():
        assert_same(module(*copies[0][0], **copies[0][1]), model(*copies[1][0], **copies[1][1]))
    return captured


class Forward(nn.Module):
    """A small layer, and a forward pass given as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def targets(captured: Captured) -> list[str]:
    return [str(n.target) for n in captured.graph.nodes if n.op == "call_function"]


# ---------------------------------------------------------------------- inputs and outputs
class Nested(nn.Module):
    """Positional, keyword and nested inputs; numbers, None and booleans among them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, more: Any = None, *, scale: float = 1.0, twice: bool = False, bias: Tensor | None = None
    ) -> Any:
        x = self.linear(x) * scale
        if more is not None:
            x = x + more["a"] + more["list"][0] * more["list"][1]
        if bias is not None:
            x = x + bias
        return {"out": x * 2 if twice else x, "both": [x, (x + 1, None)], "flag": twice, "number": 3}


def test_positional_and_keyword_inputs() -> None:
    """A keyword input is passed by keyword, and each makes a placeholder named after the parameter."""
    x, bias = torch.randn(2, 4), torch.randn(2, 4)
    captured = assert_equal_to_eager(Nested(), x, bias=bias)
    assert [n.name for n in captured.graph.nodes if n.op == "placeholder"] == ["x", "bias"]
    assert_equal_to_eager(Nested(), x=x, bias=bias)


def test_nested_inputs() -> None:
    """Dicts and lists are flattened; leaves are named by the keys that lead to them."""
    more = {"a": torch.randn(2, 4), "list": [torch.randn(2, 4), torch.randn(2, 1)]}
    captured = assert_equal_to_eager(Nested(), torch.randn(2, 4), more)
    placeholders = [n.name for n in captured.graph.nodes if n.op == "placeholder"]
    assert placeholders == ["x", "more_a", "more_list_0", "more_list_1"]
    assert [n.dim() for n in captured.inputs] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "kwargs", [{"scale": 3}, {"scale": 0.5, "twice": True}, {"bias": None}, {"more": None, "twice": False}], ids=str
)
def test_numbers_none_and_booleans_are_part_of_the_graph(kwargs: dict[str, Any]) -> None:
    """Inputs that are not tensors keep their place in the signature, and the value of the example."""
    assert_equal_to_eager(Nested(), torch.randn(2, 4), **kwargs)


def test_inputs_with_equal_names_stay_apart() -> None:
    """A dict key may spell the name of another input."""

    class Clash(nn.Module):
        def forward(self, x_a: Tensor, x: dict[str, Tensor]) -> Tensor:
            return x_a - x["a"]

    assert_equal_to_eager(Clash(), torch.randn(2, 3), {"a": torch.randn(2, 3)})


def test_variable_arguments() -> None:
    """`*args` and `**kwargs` in the signature of forward."""

    class Variable(nn.Module):
        def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
            return xs[0] + xs[1] * named["scale"]

    assert_equal_to_eager(Variable(), torch.randn(2, 3), torch.randn(2, 3), scale=torch.randn(2, 3))


def test_model_output_of_transformers() -> None:
    """A dataclass-like ModelOutput comes back as its own class, at other batch sizes too."""
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config).eval()
    ids = torch.randint(0, 30, (2, 6))
    captured, module = emitted(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert [s.name for s in captured.symbols] == ["batch"]
    other = torch.randint(0, 30, (5, 6))
    mask = torch.ones_like(other)
    mask[1, 4:] = 0
    with torch.no_grad():
        found, wanted = module(input_ids=other, attention_mask=mask), model(input_ids=other, attention_mask=mask)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)
    torch.testing.assert_close(found["pooler_output"], wanted.pooler_output)


def test_an_output_that_is_no_tensor_is_noted() -> None:
    """What cannot be part of a graph comes back as None, and the notes say so."""
    model = Forward(lambda m, x: (m.linear(x), torch.Size([3]), {1, 2}))
    captured, module = emitted(model, torch.randn(2, 8))
    assert captured.notes == ["an output of type set is not a tensor; the pruned module returns None there"]
    assert module(torch.randn(2, 8))[2] is None


def test_a_model_without_tensor_outputs_is_refused() -> None:
    model = Forward(lambda m, x: m.linear(x).shape[0])
    with pytest.raises(CaptureError, match="Forward returns no tensor, so there is nothing to keep equal"):
        capture(model, (torch.randn(2, 8),), {})


def test_wrong_inputs_are_an_input_error() -> None:
    """Inputs that forward does not take: the text has the signature and Python's reason."""
    with pytest.raises(InputError) as caught:
        capture(Nested(), (torch.randn(2, 4),), {"scalle": 3})
    assert str(caught.value).startswith("Nested.forward(x: ")
    assert str(caught.value).endswith("does not take these inputs: got an unexpected keyword argument 'scalle'")
    with pytest.raises(InputError, match="does not take these inputs: missing a required argument: 'x'"):
        capture(Nested(), (), {})


# ---------------------------------------------------------------------- dynamic sizes
class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.reshape(x.shape[0], 8, -1).mean(-1))


@pytest.mark.parametrize("example", [1, 2, 3])
def test_batch_is_dynamic_by_default(example: int) -> None:
    """Whatever the batch of the example, the emitted module takes any other."""
    model = ConvNet().eval()
    captured, module = emitted(model, torch.randn(example, 3, 8, 8))
    assert [(s.name, s.places) for s in captured.symbols] == [("batch", (("x", 0),))]
    assert not captured.notes
    for batch in (1, 2, 4, 9):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            assert_same(module(x), model(x))


def test_everything_static_when_asked() -> None:
    captured = capture(ConvNet(), (torch.randn(2, 3, 8, 8),), {}, False)
    assert captured.symbols == [] and captured.notes == []
    assert all(isinstance(s, int) for n in captured.graph.nodes for s in n.meta.get("shape", ()))


class Sequence(nn.Module):
    """A token mixer whose literals hold batch and length, and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t = ids.shape
        x = self.embed(ids) + torch.arange(t).unsqueeze(-1)
        q, k, v = self.qkv(x.view(b * t, 8)).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
        return x.transpose(1, 2).reshape(b, t, 8)


BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=512)


@pytest.mark.parametrize(
    "dynamic",
    [
        {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}},
        {"ids": {0: BATCH, 1: LENGTH}, "mask": {0: BATCH, 1: LENGTH}},
    ],
    ids=["names", "torch.export.Dim"],
)
def test_dynamic_sequence(dynamic: Any) -> None:
    """Batch and length at once: shapes and literals follow both, and their product."""
    model = Sequence().eval()
    mask = torch.ones(2, 6, dtype=torch.bool)
    captured, module = emitted(model, torch.randint(0, 20, (2, 6)), mask=mask, dynamic=dynamic)
    assert [s.name for s in captured.symbols] == ["batch", "length"]
    for batch, length in ((1, 1), (3, 4), (2, 6), (4, 11)):
        ids, mask = torch.randint(0, 20, (batch, length)), torch.rand(batch, length) > 0.3
        mask[:, 0] = True
        with torch.no_grad():
            assert_same(module(ids, mask=mask), model(ids, mask=mask))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.linear(x)[:, :3].reshape(4, -1), "shape '[4, -1]' is invalid for input of size 33"),
        (lambda m, x: m.linear(x)[: x.shape[0] // 2], "is not a sum of products"),
        (lambda m, x: torch.relu(m.linear(x)) if x.shape[0] > 6 else m.linear(x), "depends on the sizes"),
        (lambda m, x: torch.cat(list(m.linear(x))), "the number of operators depends on the sizes"),
    ],
    ids=["reshape(4, -1)", "half the batch", "branch", "loop"],
)
def test_a_batch_that_cannot_be_dynamic_is_static_with_a_note(function: Any, reason: str) -> None:
    """The model is captured at the example's batch, where it equals eager, and the notes say why."""
    model = Forward(function)
    captured = assert_equal_to_eager(model, torch.randn(4, 8))
    assert captured.symbols == []
    assert len(captured.notes) == 1
    assert captured.notes[0].startswith("the batch size is fixed at that of the example inputs, because ")
    assert reason in captured.notes[0]


@pytest.mark.parametrize("example", [2, 4, 5, 8])
def test_a_branch_between_the_example_and_other_batches(example: int) -> None:
    """A forward that treats the example's batch unlike larger ones is captured as it runs on the example."""
    model = Forward(lambda m, x: m.linear(x) * 2 if x.shape[0] > example else m.linear(x))
    captured = assert_equal_to_eager(model, torch.randn(example, 8))
    assert captured.symbols == []
    (note,) = captured.notes
    assert "the number of operators depends on the sizes" in note


@pytest.mark.parametrize("example", [1, 2, 3, 4, 6, 8, 9, 16])
@pytest.mark.parametrize(
    "size",
    [lambda b: b // 2, lambda b: (b + 1) // 2, lambda b: b // 3, lambda b: b * b, lambda b: 2**b],
    ids=["half", "half up", "third", "square", "power"],
)
def test_sizes_that_are_no_multiples_are_not_taken_for_such(example: int, size: Callable[[int], int]) -> None:
    """A length that depends on the batch, but not as a sum of multiples, keeps the batch static."""
    model = Forward(lambda m, x: m.linear(x).new_zeros(size(x.shape[0])) + m.linear(x).mean())
    assert capture(model, (torch.randn(example, 8),), {}).symbols == []


def test_channels_last_inputs() -> None:
    """The memory layout of the example is that of other batch sizes too."""
    model = Forward(lambda m, x: m.linear(x if x.is_contiguous() else x.permute(0, 2, 3, 1)))
    x = torch.randn(2, 8, 4, 3).to(memory_format=torch.channels_last)
    captured = assert_equal_to_eager(model, x)
    assert [s.name for s in captured.symbols] == ["batch"]


def test_dynamic_sizes_asked_for_that_cannot_be() -> None:
    """What was asked for explicitly is not given up silently."""
    model = Forward(lambda m, x: m.linear(x)[:, :3].reshape(4, -1))
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(4, 8),), {}, {"x": {0: "batch"}})
    first, *_ = str(caught.value).splitlines()
    assert first.startswith("the sizes ['batch'] cannot be dynamic: the forward pass of Forward cannot be recorded: ")
    assert "shape '[4, -1]' is invalid" in first


@pytest.mark.parametrize(
    ("dynamic", "text"),
    [
        ({"y": {0: "batch"}}, "dynamic_shapes names 'y', but the tensor inputs are x"),
        ({"x": {2: "batch"}}, "dynamic_shapes names dimension 2 of 'x', which has 2"),
        ({"x": {0: "a", 1: "b"}, "y": {0: "c", 1: "d"}}, "at most 3 sizes can be dynamic at once, not 4: a, b, c, d"),
    ],
)
def test_dynamic_shapes_that_name_what_is_not_there(dynamic: Any, text: str) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x if y is None else x + y

    args = (torch.randn(2, 2), torch.randn(2, 2))[: 2 if len(dynamic) > 1 else 1]
    with pytest.raises(InputError) as caught:
        capture(Two(), args, {}, dynamic)
    assert str(caught.value).startswith(text)


def test_sizes_become_affine_formulas() -> None:
    """A literal that holds the batch is a `Varying`, and its formula passes through both recordings."""
    captured = capture(Forward(lambda m, x: m.linear(x).reshape(x.shape[0] * 2 + 0, 4)), (torch.randn(2, 8),), {})
    (literal,) = [a for n in captured.graph.nodes for a in pytree.tree_leaves(n.args) if isinstance(a, Varying)]
    assert captured.affine(literal.values) == {("batch",): 2}
    assert captured.affine(7) == {(): 7}
    with pytest.raises(CaptureError, match=r"is not a sum of products of \['batch'\]"):
        captured.affine((2, 3))


# ---------------------------------------------------------------------- kinds of models and weights
def test_meta_model_and_meta_inputs() -> None:
    """A model without values is captured: shapes are all that is needed."""
    with torch.device("meta"):
        model = ConvNet()
    captured = capture(model, (torch.empty(2, 3, 8, 8, device="meta"),), {})
    assert [n.meta["shape"][1:] for n in captured.graph.nodes if n.op == "call_function"][-1] == (5,)
    assert captured.tensors["conv.weight"] is model.conv.weight
    assert captured.tensors["conv.weight"].is_meta


def test_symbolically_traced_model() -> None:
    """An fx.GraphModule made by torch.fx.symbolic_trace is a module like any other."""
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    captured = assert_equal_to_eager(traced, torch.randn(2, 3, 8, 8))
    assert [n.meta["path"] for n in captured.graph.nodes if n.op == "call_function"] == ["0", "1", "2"]


def test_weights_made_in_inference_mode() -> None:
    """Inference tensors have no version counter; they are captured and their kept parts are ordinary tensors."""
    with torch.inference_mode():
        model = ConvNet().eval()
    captured, module = emitted(model, torch.randn(2, 3, 8, 8))
    assert captured.tensors["conv.weight"].is_inference()
    assert not any(p.is_inference() for p in [*module.parameters(), *module.buffers()])
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert_same(module(x), model(x))


def test_capture_under_inference_mode() -> None:
    """The caller's inference mode does not reach into the graph."""
    model = ConvNet().eval()
    x = torch.randn(2, 3, 8, 8)
    outside = targets(capture(model, (x,), {}))
    with torch.inference_mode():
        assert targets(capture(model, (x,), {})) == outside
    with torch.no_grad():
        assert targets(capture(model, (x,), {})) == outside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    """Half and double precision weights keep their type."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype).eval()
    captured = assert_equal_to_eager(model, torch.randn(3, 8, dtype=dtype))
    assert {n.meta["dtype"] for n in captured.graph.nodes if n.op == "call_function"} == {dtype}


def test_tied_weights_are_one_tensor_with_two_names() -> None:
    """The second name is an alias, and the emitted module's two names are one parameter."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(ids)))

    model = Tied().eval()
    captured, module = emitted(model, torch.randint(0, 10, (2, 3)))
    assert captured.aliases == {"head.weight": "embed.weight"}
    assert [n.target for n in captured.graph.nodes if n.op == "get_attr"] == ["embed.weight"]
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")


def test_shared_module_keeps_all_its_names() -> None:
    """One layer used under two paths: both names work afterwards."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    captured, module = emitted(model, torch.randn(2, 4))
    assert captured.aliases == {"2.weight": "0.weight", "2.bias": "0.bias"}
    assert set(module.state_dict()) == set(model.state_dict())
    assert_equal_to_eager(model, torch.randn(2, 4))


def test_buffers_and_plain_attributes() -> None:
    """Buffers, non-persistent buffers, plain tensor attributes and tensors out of nowhere become attributes."""
    elsewhere = torch.randn(4)

    class Attributes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.randn(4))
            self.register_buffer("transient", torch.randn(4), persistent=False)
            self.plain = torch.randn(4)
            self.inner = nn.Module()
            self.inner.plain = torch.randn(4)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.kept + self.transient * self.plain + self.inner.plain - elsewhere

    model = Attributes()
    captured = assert_equal_to_eager(model, torch.randn(2, 4))
    assert captured.constants == {"plain", "inner.plain", "_constant_2"}
    assert captured.transient == {"transient"}
    assert captured.tensors["plain"] is model.plain
    _, module = emitted(model, torch.randn(2, 4))
    assert set(module.state_dict()) == {"kept"}


def test_numbers_become_tensors_inside_forward() -> None:
    """`torch.tensor(...)` and creation operators in forward."""
    assert_equal_to_eager(
        Forward(
            lambda m, x: (
                m.linear(x) * torch.tensor(0.5)
                + torch.tensor([1.0, 2.0] * 4)
                + torch.linspace(0, 1, 8)
                + x.new_ones(x.shape[0], 8)
                + torch.as_tensor(3)
            )
        ),
        torch.randn(2, 8),
    )


# ---------------------------------------------------------------------- in-place operators
def _through(view: Callable[[Tensor], Tensor], write: Callable[[Tensor], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        y = module.linear(x)
        write(view(y))
        return y * 2

    return forward


def _assign(key: Any, value: Any) -> Callable[[Tensor], None]:
    def write(x: Tensor) -> None:
        x[key] = value

    return write


def _augmented(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    y += x
    y *= 2
    y -= 1
    y /= 3
    y[:, 2:4] += x[:, :2]
    y[0] *= 5
    return y


def _two_views(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    left, right = y[:, :4], y[:, 2:]
    left.add_(1)
    right.mul_(3)  # sees what was written through the other view
    return left.sum(1) + right.sum(1) + y.sum(1)


def _view_of_view(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    y.view(-1, 2, 4)[:, 1].t().mul_(2)
    return y


def _views_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    before = y[:, 2:]
    row = y[0]
    y.t_().unsqueeze_(0)  # views taken before keep their shape, and see what is written later
    y[:, 3:5] *= 10
    row.add_(1)
    return torch.cat([before.flatten(), row, y.transpose_(0, 2).flatten()])


def _before_and_after(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    before = y * 1
    y.relu_()
    return before + y * 10


def _put(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    y.index_put_((torch.tensor([0, 1]), torch.tensor([2, 3])), torch.tensor([5.0, 6.0]))
    y.index_put_((torch.tensor([0, 0]),), torch.ones(8), accumulate=True)
    y[:, torch.tensor([1, 5])] = 0
    y[y > 0.5] = 0.25
    return y


def _into_zeros(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 3, 8)
    out[:, 0] = m.linear(x)
    out[:, 1:] = x.unsqueeze(1)
    out.select(1, 2).copy_(x * 2)
    return out


def _input_written(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x.clamp_(min=-0.1)
    return m.linear(x).sigmoid_()


IN_PLACE: dict[str, Callable[[Any, Tensor], Any]] = {
    "slice": _through(lambda y: y[:, 1:], lambda v: v.fill_(2.0)),
    "slice assigned a tensor": _through(lambda y: y, _assign((slice(None), slice(1, 4)), torch.ones(3))),
    "step": _through(lambda y: y[:, ::2], lambda v: v.zero_()),
    "negative slice": _through(lambda y: y[:, -3:-1], lambda v: v.mul_(2)),
    "ellipsis": _through(lambda y: y, _assign((..., 0), 4.0)),
    "select": _through(lambda y: y.select(1, -2), lambda v: v.add_(1)),
    "transpose": _through(lambda y: y.t(), lambda v: v.add_(1)),
    "transpose row": _through(lambda y: y.t()[2:5], lambda v: v.add_(1)),
    "mT": _through(lambda y: y.unsqueeze(0).mT, lambda v: v[:, 1].add_(1)),
    "permute": _through(lambda y: y.view(-1, 2, 4).permute(2, 0, 1), lambda v: v[1].mul_(3)),
    "movedim": _through(lambda y: y.view(-1, 2, 4).movedim(0, 2), lambda v: v[1].mul_(3)),
    "diagonal": _through(lambda y: y.diagonal(), lambda v: v.fill_(7.0)),
    "narrow": _through(lambda y: y.narrow(1, 2, 3), lambda v: v.neg_()),
    "view": _through(lambda y: y.view(-1, 2, 4), lambda v: v[:, 1].exp_()),
    "flatten": _through(lambda y: y.flatten(), lambda v: v[1:3].fill_(1.0)),
    "unflatten": _through(lambda y: y.unflatten(1, (4, 2)), lambda v: v[:, 1].fill_(1.0)),
    "squeeze": _through(lambda y: y.unsqueeze(1).squeeze(1), lambda v: v.tanh_()),
    "detach": _through(lambda y: y.detach(), lambda v: v.mul_(2)),
    "chunk": _through(lambda y: y.chunk(2, 1)[1], lambda v: v.mul_(2)),
    "split": _through(lambda y: y.split([3, 5], 1)[0], lambda v: v.mul_(2)),
    "unbind": _through(lambda y: y.view(-1, 2, 4).unbind(1)[1], lambda v: v.mul_(2)),
    "expand": _through(lambda y: y.expand(-1, 8), lambda v: v.mul_(2)),
    "masked_fill": _through(lambda y: y, lambda v: v.masked_fill_(v > 0, -1.0)),
    "masked_fill tensor": _through(lambda y: y, lambda v: v.masked_fill_(v > 0, torch.tensor(-1.0))),
    "clamp": _through(lambda y: y[:, :4], lambda v: v.clamp_(0, 1)),
    "copy with broadcast": _through(lambda y: y[:, 1:3], lambda v: v.copy_(torch.ones(2))),
    "copy with cast": _through(lambda y: y[:, 1:3], lambda v: v.copy_(torch.ones(2, dtype=torch.int64))),
    "index_fill": _through(lambda y: y, lambda v: v.index_fill_(1, torch.tensor([1]), 3.0)),
    "index_add": _through(lambda y: y, lambda v: v.index_add_(1, torch.tensor([1, 0]), torch.ones(2, 2))),
    "scatter": _through(lambda y: y, lambda v: v.scatter_(1, torch.zeros(2, 1, dtype=torch.int64), 3.0)),
    "addcmul": _through(lambda y: y, lambda v: v.addcmul_(v, v, value=0.5)),
    "lerp": _through(lambda y: y, lambda v: v.lerp_(torch.ones(8), 0.5)),
    "pow": _through(lambda y: y, lambda v: v.pow_(2)),
    "functional": lambda m, x: F.relu(F.silu(m.linear(x), inplace=True) - 0.1, inplace=True),
    "dropout": lambda m, x: F.dropout(m.linear(x), 0.5, training=False, inplace=True) + 1,
    "leaky": lambda m, x: F.leaky_relu(m.linear(x), 0.2, inplace=True),
    "unsqueeze_": lambda m, x: m.linear(x).unsqueeze_(1),
    "transpose_": lambda m, x: m.linear(x).transpose_(0, 1),
    "pow tensor": _through(lambda y: y.abs_(), lambda v: v.pow_(torch.tensor(0.5))),
    "views in place": _views_in_place,
    "augmented": _augmented,
    "two views": _two_views,
    "view of a view": _view_of_view,
    "before and after": _before_and_after,
    "index_put": _put,
    "into zeros": _into_zeros,
    "input": _input_written,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators_equal_eager(name: str) -> None:
    """Writes, through views too, are recorded as functional operators with the same result, and leave no mutation."""
    captured = assert_equal_to_eager(Forward(IN_PLACE[name]), torch.randn(2, 8))
    for node in captured.graph.nodes:
        assert not (node.op == "call_function" and hasattr(node.target, "_schema") and node.target._schema.is_mutable)


def _data(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    y.data.add_(1)
    return y * 2


def _overlapping(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    y.as_strided((2, 2), (1, 1)).mul_(2)
    return y * 2


def _unfolded(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    y.unfold(1, 4, 4)[:, 0] = 1.0
    return y


def _set(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y.resize_(4)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (_data, "shares memory with a tensor that is written in place, in a way that cannot be followed ({}:{} in "),
        (_overlapping, "a write in place through 'as_strided' cannot be followed ({}:{} in _overlapping)"),
        (_unfolded, "a write in place through 'unfold' cannot be followed ({}:{} in _unfolded)"),
        (_set, "aten.resize_.default changes a tensor in place in a way that cannot be followed ({}:{} in _set)"),
    ],
)  # fmt: skip
def test_aliasing_that_cannot_be_followed_is_refused(function: Any, text: str) -> None:
    """A write that would have to be guessed is refused, with the line that is to be changed."""
    lines, first = inspect.getsourcelines(function)
    number = first + len(lines) - (1 if function in (_data, _set) else 2)
    with pytest.raises(CaptureError) as caught:
        capture(Forward(function), (torch.randn(4, 8),), {})
    assert text.format(__file__, number) in str(caught.value)


def test_state_written_by_forward_is_functional() -> None:
    """A counter in a buffer: the graph computes with the new value, the model's own stays as it was."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.linear(x) * self.count

    model = Counter().eval()
    _, module = emitted(model, torch.randn(2, 4))
    assert model.count == 0
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert_same(module(x), model(x))


# ---------------------------------------------------------------------- gradients
def _statistics(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    with torch.no_grad():
        scale = y.abs().mean()
    return y / scale


def _weight_norm(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        norm = m.linear.weight.norm()
    return F.linear(x, m.linear.weight / norm, m.linear.bias)


def _target_network(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = torch.tanh(m.linear(x))
        with torch.enable_grad():
            inside = m.linear(x).sigmoid()
    return (m.linear(x) - target) ** 2 + inside


def _straight_through(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y + (y.round() - y).detach()


@torch.no_grad()
def _helper(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.linear(x).softmax(-1).chunk(2, -1)


def _decorated(m: Any, x: Tensor) -> Tensor:
    left, right = _helper(m, x)
    return m.linear(x) * torch.cat([right, left], -1)


def _indices(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        best = m.linear(x).argmax(-1)
    return m.linear(x).gather(-1, best[:, None])


@pytest.mark.parametrize(
    "function", [_statistics, _weight_norm, _target_network, _straight_through, _decorated, _indices]
)
def test_gradients_equal_those_of_the_original(function: Any) -> None:
    """What is computed under `torch.no_grad()`, or detached, passes no gradient on in the emitted module either."""
    model = Forward(function)
    _, module = emitted(model, torch.randn(2, 8))
    for model_or_module in (model, module):
        model_or_module.zero_grad()
    x = torch.randn(3, 8)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    weight = torch.randn(3, 8)
    for run, given in zip((model, module), inputs, strict=True):
        out = run(given)
        (out * weight[:, : out.shape[1]]).sum().backward()
    assert_same(inputs[1].grad, inputs[0].grad)
    found, wanted = dict(module.named_parameters()), dict(model.named_parameters())
    assert set(found) == set(wanted)
    for name, parameter in wanted.items():
        assert_same(found[name].grad, parameter.grad)


def test_an_output_without_gradient() -> None:
    """A forward that runs without gradients as a whole gives outputs that need none."""
    model = Forward(torch.no_grad()(lambda m, x: m.linear(x)))
    _, module = emitted(model, torch.randn(2, 8))
    x = torch.randn(2, 8)
    assert not model(x).requires_grad
    assert not module(x).requires_grad


# ---------------------------------------------------------------------- the model is left as it was
class Stateful(nn.Module):
    """Writes to whatever a forward pass can write to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.cache: Any = None
        self.caches: dict[Any, Any] = {"nested": {"old": torch.ones(1)}, "list": [1, [2]], "set": {1}}
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.cache = x
        self.new_attribute = x * 2
        self.caches["nested"]["new"] = x
        self.caches["list"][1].append(x)
        self.caches["set"].add(x.shape)
        self.caches[x.shape] = self.caches.pop("nested")
        self.caches["nested"] = {}
        x = self.drop(self.norm(x.transpose(1, 2)).transpose(1, 2))
        x = self.attention(x, x, x)[0] + torch.rand(8)
        self.linear.last = x
        if self.fails:
            x.view(-1, 7, 3)
        return self.frozen(self.linear(x))


def _everything(model: nn.Module) -> list[Any]:
    """All state of a model, by identity where it is an object and by value where it is a tensor's content."""

    def look(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value._version, value.tolist(), value.requires_grad, id(value.is_leaf and value.grad)
        if isinstance(value, dict):
            return id(value), [(k, look(v)) for k, v in value.items()]
        if isinstance(value, list | tuple | set):
            return id(value), [look(v) for v in value]
        return id(value)

    return [(path, look(vars(module))) for path, module in model.named_modules()]


def _global_state() -> list[Any]:
    hooks = nn.modules.module
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.compiler.is_compiling(),
        torch.compiler.is_exporting(),
        torch.utils._python_dispatch._get_current_dispatch_mode(),
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_pre_hooks),
        len(hooks._global_forward_hooks_always_called),
    ]


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("fastpath", [True, False], ids=["fastpath", "no_fastpath"])
def test_the_model_is_left_as_it_was(fails: bool, grad: bool, fastpath: bool) -> None:
    """Parameters, buffers, modes, hooks, attributes, caches, gradients and global state: after a failure too."""
    model = Stateful().train()
    model.norm.eval()
    model.fails = fails
    model(torch.randn(2, 5, 8)).sum().backward() if not fails else None
    model.norm.training = True
    calls: list[str] = []
    model.norm.register_forward_hook(lambda *_: calls.append("after"))
    model.norm.register_forward_pre_hook(lambda *_: calls.append("before"))
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        with torch.set_grad_enabled(grad):
            before, world = _everything(model), _global_state()
            if fails:
                with pytest.raises(CaptureError, match="shape '\\[-1, 7, 3\\]' is invalid"):
                    capture(model, (torch.randn(2, 5, 8),), {})
            else:
                x = torch.randn(2, 5, 8)
                world = _global_state()
                capture(model, (x,), {})
            assert _everything(model) == before
            if not fails:
                assert _global_state() == world
            else:
                assert _global_state()[:3] + _global_state()[4:] == world[:3] + world[4:]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert calls  # the hooks are part of the forward pass, and were seen
    assert [m.training for m in model.children()] == [True] * len(list(model.children()))


def test_hooks_are_part_of_the_model() -> None:
    """A forward hook that changes a layer's output is recorded like the layer's own code."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda module, args, out: out * 3)
    assert_equal_to_eager(model, torch.randn(2, 4))


def test_weights_are_not_copied() -> None:
    """A capture holds the model's own tensors, whatever their size."""
    model = ConvNet().eval()
    captured = capture(model, (torch.randn(2, 3, 8, 8),), {})
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    used = {n.target for n in captured.graph.nodes if n.op == "get_attr"}
    assert {"conv.weight", "norm.running_var", "head.bias"} <= used
    for name, tensor in captured.tensors.items():
        assert tensor is own[name]
    assert captured.inputs[0].untyped_storage().data_ptr() == captured.inputs[0].data_ptr()


def test_the_emitted_module_shares_nothing_with_the_model() -> None:
    model = ConvNet().eval()
    _, module = emitted(model, torch.randn(2, 3, 8, 8))
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not own & {t.data_ptr() for t in [*module.parameters(), *module.buffers()] if t.numel()}


# ---------------------------------------------------------------------- what cannot be captured
def _item(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y * y.sum().item()


def _branch(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y if y.sum() > 0 else -y


def _numpy(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x).detach()
    return torch.as_tensor(y.numpy())


def _boolean_mask(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y[y > 0]


def _integer(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y[:, : int(y.max())]


@pytest.mark.parametrize("function", [_item, _branch, _numpy, _boolean_mask, _integer])
def test_data_dependent_code_is_refused_with_its_line(function: Any) -> None:
    """The message has the user's file, line and source text, and what to do."""
    lines, first = inspect.getsourcelines(function)
    with pytest.raises(CaptureError) as caught:
        capture(Forward(function), (torch.randn(4, 8),), {})
    head, where, advice = str(caught.value).splitlines()
    assert head.startswith("the forward pass of Forward cannot be recorded: ")
    assert where == f"  at {__file__}:{first + len(lines) - 1} in {function.__name__}: {lines[-1].strip()}"
    assert advice.startswith("  Shapes are known there, values are not: ")
    assert advice.endswith("cannot be followed. Move that line out of `forward`.")


def test_a_failing_forward_names_its_line(caplog: pytest.LogCaptureFixture) -> None:
    """Example inputs of the wrong size: torch's own reason and the line of the model's code, and no log beside it."""
    model = Forward(lambda m, x: m.linear(x))
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(4, 9),), {})
    head, where, advice = str(caught.value).splitlines()
    assert head.startswith("the forward pass of Forward cannot be recorded: RuntimeError: ")
    assert advice == "  Check that the model runs on the example inputs."
    assert where.startswith(f"  at {__file__}:") and "m.linear(x)" in where
    assert caplog.text == ""
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


# ---------------------------------------------------------------------- shortcuts
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _layouts(*shape: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Tensors of one shape laid out in memory in every way that models make."""

    def new(*sizes: int) -> Tensor:
        return torch.ones(sizes, dtype=dtype)

    yield new(*shape)
    if len(shape) == 4:
        yield new(*shape).to(memory_format=torch.channels_last)
    if len(shape) > 1:
        yield new(*shape[::-1]).permute(*reversed(range(len(shape))))  # transposed
        yield new(*shape[:-1], shape[-1] + 1)[..., 1:]  # sliced
        yield new(1, *shape[1:]).expand(*shape)


CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
IMAGES = ((2, 4, 6, 5), (1, 4, 1, 1), (2, 4, 1, 7), (0, 4, 3, 3))
SHAPES = (*IMAGES, (2, 4), (1, 4), (3, 2, 4), (2, 0, 4), (2, 4, 3, 2, 2))


def _unary(*extra: Any) -> Callable[[], Iterator[tuple[Any, ...]]]:
    def samples() -> Iterator[tuple[Any, ...]]:
        for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float16, torch.int64)):
            for x in _layouts(*shape, dtype=dtype):
                yield (x, *extra)

    return samples


def _binary() -> Iterator[tuple[Any, ...]]:
    for shape, dtype, other in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16, torch.int64), (torch.float32, torch.float16)
    ):
        layouts = list(_layouts(*shape, dtype=other))
        for x, y in zip(_layouts(*shape, dtype=dtype), [layouts[-1], *layouts], strict=False):
            yield x, y
        x = torch.ones(shape, dtype=dtype)
        yield x, torch.ones(shape[-1:], dtype=other)
        yield x, torch.ones((), dtype=other)
        yield torch.ones((), dtype=other), x
        yield x, x
        yield x, 2.5


def _softmax() -> Iterator[tuple[Any, ...]]:
    for (x,), dim, dtype in itertools.product(_unary()(), (-1, 1), (None, torch.float32)):
        yield x, dim, dtype


def _batch_norm() -> Iterator[tuple[Any, ...]]:
    for shape, dtype, weights in itertools.product(SHAPES[:6], FLOATS, (None, *FLOATS)):
        for x in _layouts(*shape, dtype=dtype):
            vectors = [torch.ones(4, dtype=weights or dtype) for _ in range(2)]
            affine = vectors if weights else [None, None]
            yield (x, *affine, *vectors, False, 0.1, 1e-5, False)


def _layer_norm() -> Iterator[tuple[Any, ...]]:
    for shape, dtype, weights in itertools.product(((2, 4), (3, 2, 4), (2, 3, 5, 4)), FLOATS, (None, *FLOATS)):
        for x in _layouts(*shape, dtype=dtype):
            weight = None if weights is None else torch.ones(4, dtype=weights)
            yield x, [4], weight, weight, 1e-5
            yield x, [4], weight, None, 1e-5


def _rms_norm() -> Iterator[tuple[Any, ...]]:
    for x, shape, weight, *_ in _layer_norm():
        yield x, shape, weight, None


def _group_norm() -> Iterator[tuple[Any, ...]]:
    for shape, dtype, weights in itertools.product((*IMAGES, (2, 4, 3)), FLOATS, (None, *FLOATS)):
        for x in _layouts(*shape, dtype=dtype):
            weight = None if weights is None else torch.ones(4, dtype=weights)
            yield x, 2, weight, weight, 1e-5


def _linear() -> Iterator[tuple[Any, ...]]:
    for shape, dtype, weights in itertools.product(((4,), (2, 4), (1, 4), (3, 2, 4), (2, 3, 5, 4)), FLOATS, FLOATS):
        for x, w in itertools.product(_layouts(*shape, dtype=dtype), _layouts(6, 4, dtype=weights)):
            yield x, w
            yield x, w, torch.ones(6, dtype=weights)
    yield torch.ones(2, 4), torch.ones(4)
    yield torch.ones(2, 3), torch.ones(6, 4)


def _convolution(rank: int) -> Callable[[], Iterator[tuple[Any, ...]]]:
    def samples() -> Iterator[tuple[Any, ...]]:
        options: list[tuple[Any, ...]] = [
            (), ([1] * rank,), ([2] * rank, [1] * rank), ([1], [2], [2]), ([1], [1], [1], 2), ([2] * rank, [0], [1], 4),
        ]  # fmt: skip
        kernels = ((3, 1), (1, 1), (5, 2), (1, 4))
        for (size, channels), (kernel, per_group), option in itertools.product(
            ((6, 4), (1, 4), (6, 1)), kernels, options
        ):
            for dtype in FLOATS:
                weight = torch.ones(8, per_group, *[kernel] * rank, dtype=dtype)
                for x in _layouts(2, channels, *[size] * rank, dtype=dtype):
                    yield (x, weight, None, *option)
                if rank == 2:
                    x = torch.ones(2, channels, size, size, dtype=dtype)
                    yield (x, weight.to(memory_format=torch.channels_last), torch.ones(8, dtype=dtype), *option)
        yield torch.ones(4, *[6] * rank), torch.ones(8, 4, *[3] * rank)  # not batched
        yield torch.ones(2, 4, *[6] * rank), torch.ones(8, 4, *[3] * rank, dtype=torch.float64)

    return samples


def _on(*extra: Any, least: int = 1, most: int = 9) -> Callable[[], Iterator[tuple[Any, ...]]]:
    """A tensor of `least` to `most` dimensions before the other arguments."""

    def samples() -> Iterator[tuple[Any, ...]]:
        for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.int64)):
            if least <= len(shape) <= most:
                for x in _layouts(*shape, dtype=dtype):
                    yield (x, *extra)

    return samples


def _either(*kinds: Callable[[], Iterator[tuple[Any, ...]]]) -> Callable[[], Iterator[tuple[Any, ...]]]:
    return lambda: itertools.chain.from_iterable(kind() for kind in kinds)


def _permute() -> Iterator[tuple[Any, ...]]:
    for (x,) in _on()():
        yield x, list(reversed(range(x.dim())))
        yield x, [-1, *range(x.dim() - 1)]


def _expand() -> Iterator[tuple[Any, ...]]:
    for (x,) in _on()():
        yield x, [3, *x.shape]
        yield x.narrow(-1, 0, min(1, x.shape[-1])), [*[-1] * (x.dim() - 1), 5]


def _cat() -> Iterator[tuple[Any, ...]]:
    for shape, dtype in itertools.product(SHAPES, FLOATS):
        layouts = list(_layouts(*shape, dtype=dtype))
        for x, y, dim in zip(layouts, reversed(layouts), (0, 1, -1, 0, 1), strict=False):
            yield [x, y], dim
            yield [x, y, x.float()], dim
    yield [torch.ones(0), torch.ones(2, 3)], 1  # the one that torch allows not to fit


def _matmul() -> Iterator[tuple[Any, ...]]:
    for (x,) in _unary()():
        if x.dtype in FLOATS:
            yield x, x.mT
            yield x, torch.ones(x.shape[-1], dtype=x.dtype)
            yield x, torch.ones(x.shape[-1], 3, dtype=x.dtype)
            yield torch.ones(x.shape[-2], dtype=x.dtype), x
            yield torch.ones(7, 1, 1, 3, x.shape[-2], dtype=x.dtype), x


def _mask() -> Iterator[tuple[Any, ...]]:
    for (x,) in _unary()():
        yield x, torch.ones(x.shape, dtype=torch.bool), 0
        yield x, torch.ones(x.shape[-1:], dtype=torch.bool), 0


#: Operator -> the arguments to try it on.
GRID: dict[Any, Callable[[], Iterator[tuple[Any, ...]]]] = {
    **dict.fromkeys(
        [
            *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default),
            *(aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.relu6.default),
            *(aten.relu_.default, aten.silu_.default, aten.sigmoid_.default, aten.hardswish_.default),
            *(aten.hardtanh_.default, aten.hardsigmoid_.default, aten.relu6_.default, aten.leaky_relu_.default),
            aten.zero_.default,
        ],
        _unary(),
    ),
    aten.fill_.Scalar: _unary(2),
    aten.dropout_.default: _unary(0.5, False),
    aten.clamp_.default: _unary(0, 1),
    aten.softmax.int: _softmax,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    **dict.fromkeys([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor], _binary),
    aten.view.default: _either(_on([-1]), _on([2, -1]), _on([2, 4, -1])),
    aten.reshape.default: _either(_on([-1]), _on([2, -1]), _on([2, 4, -1])),
    aten.flatten.using_ints: _either(_on(), _on(1), _on(0, 1), _on(1, -2)),
    aten.permute.default: _permute,
    aten.transpose.int: _either(_on(0, 1), _on(-1, -2), _on(1, 1)),
    aten.unsqueeze.default: _either(_on(0), _on(-1), _on(1)),
    aten.squeeze.dim: _either(_on(0), _on(-1), _on(1)),
    aten.expand.default: _expand,
    aten.slice.Tensor: _either(_on(-1, 0, 1), _on(0, 1), _on(1, 0, 2**63 - 1, 2), _on(1, -3, -1)),
    aten.select.int: _either(_on(0, 0), _on(1, -1), _on(-1, 0)),
    aten.unbind.int: _either(_on(), _on(1), _on(-1)),
    aten.split.Tensor: _either(_on(2), _on(3, 1), _on(1, -1)),
    aten.chunk.default: _either(_on(2), _on(3, 1), _on(2, -1)),
    aten.t.default: _on(most=2),
    aten.unflatten.int: _either(_on(1, [2, 2]), _on(1, [-1, 2]), _on(-1, [1, -1])),
    aten.cat.default: _cat,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    **dict.fromkeys([aten.neg.default, aten.rsqrt.default], _unary()),
    aten.pow.Tensor_Scalar: _either(_unary(2), _unary(0.5)),
    aten.mean.dim: _either(_unary([-1]), _unary([0, 1], True), _unary(None)),
    aten.roll.default: _either(_on([1], [0]), _on([1, -1], [1, 0]), _on([2])),
    **dict.fromkeys([aten.add_.Tensor, aten.mul_.Tensor, aten.sub_.Tensor, aten.div_.Tensor], _binary),
    aten.copy_.default: _binary,
    aten.masked_fill_.Scalar: _mask,
    aten.linear.default: _linear,
    **{op: _convolution(rank) for op, rank in CONVOLUTIONS.items()},
}


def test_every_shortcut_is_compared() -> None:
    assert set(GRID) == set(shortcuts._RULES) | shortcuts._IN_PLACE | shortcuts._DIRECT


@pytest.mark.parametrize("operator", GRID, ids=str)
def test_shortcuts_equal_the_fake_kernels(operator: Any) -> None:
    """Where a shortcut answers, shapes, strides, dtypes, devices and aliasing are those of torch's own kernel."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    in_place = operator in shortcuts._IN_PLACE
    answered = 0
    for sample in GRID[operator]():
        fakes = pytree.tree_map_only(Tensor, mode.from_tensor, sample)
        with mode:
            short = _described(lambda f=fakes: shortcuts.shortcut(operator, f, {}), fakes)
            if short is None:
                continue
            full = _described(lambda f=fakes: operator(*f), fakes)
        if short == "rejected":  # the fake kernel of `view` lets pass what the real one does not
            full = _described(lambda s=sample: operator(*s), sample)
        if full == "rejected" and in_place:
            continue  # where the model cannot run, its own kernel says so later
        assert short == full, _shapes(sample)
        answered += short != "rejected"
    assert answered


def _described(run: Callable[[], Any], inputs: Any) -> Any:
    """What matters of an operator's results: None without any, "rejected" where it cannot run."""
    try:
        result = run()
    except (RuntimeError, TypeError, ValueError, IndexError):
        return "rejected"
    if result is None:
        return None
    given = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    storages = {x.untyped_storage()._cdata for x in given}
    return [
        (
            type(t),
            t.shape,
            _strides(t),
            t.storage_offset() * bool(t.numel()),
            t.dtype,
            t.device,
            t.numel() > 0 and t.untyped_storage()._cdata in storages,
            any(t is x for x in given),
        )
        for t in (result if isinstance(result, list | tuple) else [result])
    ]


def _strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions along which there is a next element."""
    return (
        []
        if not tensor.numel()
        else [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    )


def _shapes(sample: tuple[Any, ...]) -> str:
    return str([(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in sample])


def test_shortcuts_need_plain_arguments() -> None:
    """Keyword arguments, ordinary tensors and unknown operators go to the kernel."""
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.ones(2, 3))
    assert shortcuts.shortcut(aten.add.Tensor, (x, x), {"alpha": 2}) is None
    assert shortcuts.shortcut(aten.add.Tensor, (x, torch.ones(3)), {}) is None
    assert shortcuts.shortcut(aten.relu.default, (torch.ones(2),), {}) is None
    assert shortcuts.shortcut(aten.relu_.default, (torch.ones(2),), {}) is None
    assert shortcuts.shortcut(aten.cos.default, (x,), {}) is None
    assert shortcuts.shortcut(aten.relu.default, (x,), {}).shape == (2, 3)
