"""What a model's layers return, looked at while it runs: by hooks, or in the graph of a pruned module by its nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxprune.errors import InputError
from fxprune.passes.training.distill import first_tensor

#: Path of a layer, what it returned.
See = Callable[[str, Tensor], None]


class Tap(nn.Module):
    """Returns what goes in, and shows it.

    Args:
        path: of the layer whose output it is.
    """

    def __init__(self, path: str, see: See) -> None:
        super().__init__()
        self.path, self._see = path, see

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        self._see(self.path, x)
        return x


class Taps:
    """Shows what layers return, until `remove`.

    A pruned module is a graph in which layers made of others are no modules that are called. There the last node of the
    layer that others read is followed by a `Tap`, until it is taken out again.

    Args:
        model: that has the layers.
        paths: of the layers.
        see: called with the path and the first tensor of what the layer returns, each time it runs.

    Raises:
        InputError: the model has no such layer.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], see: See) -> None:
        self._hooks: list[Any] = []
        self._nodes: list[fx.Node] = []
        self._graph = model if isinstance(model, fx.GraphModule) else None
        found = {path: result_of(model, path) for path in paths}
        for path, where in found.items():
            if isinstance(where, nn.Module):
                self._hooks.append(where.register_forward_hook(_hook(path, see)))
            else:
                assert self._graph is not None
                self._nodes.append(_inserted(self._graph, where, path, see, len(self._nodes)))
        if self._nodes and self._graph is not None:
            self._graph.recompile()

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for node in self._nodes:
            assert self._graph is not None
            node.replace_all_uses_with(node.all_input_nodes[0])
            node.graph.erase_node(node)
            self._graph.delete_submodule(str(node.target))
        if self._nodes and self._graph is not None:
            self._graph.recompile()
        self._hooks, self._nodes = [], []


def _hook(path: str, see: See) -> Callable[..., None]:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        found = first_tensor(output)
        if found is not None:
            see(path, found)

    return look


def _inserted(graph_module: fx.GraphModule, node: fx.Node, path: str, see: See, number: int) -> fx.Node:
    name = f"_tap_{number}"
    graph_module.add_submodule(name, Tap(path, see))
    with node.graph.inserting_after(node):
        tap = node.graph.call_module(name, (node,))
    node.replace_all_uses_with(tap, delete_user_cb=lambda user: user is not tap)
    tap.meta = dict(node.meta)
    return tap


def result_of(model: nn.Module, path: str) -> nn.Module | fx.Node:
    """Return the module at a path, or in a graph that does not call it the node that it returns.

    Raises:
        InputError: there is none.
    """
    if not isinstance(model, fx.GraphModule):
        try:
            return model.get_submodule(path)
        except AttributeError:
            raise InputError(f"{type(model).__name__} has no module '{path}'") from None
    if any(n.op == "call_module" and n.target == path for n in model.graph.nodes):
        return model.get_submodule(path)
    inside = {n for n in model.graph.nodes if _within(n.meta.get("path"), path)}
    leaving = [n for n in model.graph.nodes if n in inside and any(u not in inside for u in n.users)]
    if not leaving:
        raise InputError(f"the pruned module has no layer '{path}'; it may be removed, or folded into another")
    last: fx.Node = leaving[-1]
    return last


def _within(own: str | None, path: str) -> bool:
    return own is not None and (own == path or own.startswith(f"{path}."))
