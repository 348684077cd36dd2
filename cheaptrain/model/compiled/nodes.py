"""Reading and changing the graph that torch.compile hands to its backend, a node at a time.

The traps. A node without an example value is no error and keeps the compiled graph from being stored on disk. And what
nobody uses is not therefore without effect: the nodes that choose the kernel of attention have no users, so a sweep
over dead code would take them away, and with them the choice. What a change leaves unused just stays; it is dropped
when the graph is traced. Example values are made without gradients: whoever keeps count of what the layer's forward
saves for the backward pass (activation checkpointing) would count theirs too, and miss them when the layer runs again.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx


@torch.no_grad()
def call(graph: fx.Graph, function: Callable[..., Any], *arguments: Any) -> fx.Node:
    """A new node with the example value that Dynamo gives each."""
    node = graph.call_function(function, arguments)
    node.meta["example_value"] = function(*fx.node.map_arg(arguments, value))
    return node


@torch.no_grad()
def cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node itself where it has the dtype, else a new one."""
    if value(node).dtype == dtype:
        return node
    new = graph.call_method("to", (node, dtype))
    new.meta["example_value"] = value(node).to(dtype)
    return new


def value(node: fx.Node) -> Any:
    """The example of what a node gives."""
    return node.meta["example_value"]


def argument(node: fx.Node, place: int, name: str) -> Any:
    """One argument of a call, None where it is not given."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Those of a call that are given by their place."""
    return node.args


def calls(node: Any, *names: str) -> TypeGuard[fx.Node]:
    """Whether this is a node that calls a function or method of one of these names."""
    return has_value(node) and _name(node) in names


def has_value(node: Any) -> TypeGuard[fx.Node]:
    """Whether this is a node that gives a tensor, or several."""
    return isinstance(node, fx.Node) and "example_value" in node.meta


def is_given(node: Any) -> TypeGuard[fx.Node]:
    """Whether this is a tensor that the graph is given: a weight or an input."""
    return has_value(node) and node.op in ("placeholder", "get_attr") and isinstance(value(node), Tensor)


def changes_something(node: fx.Node) -> bool:
    """Whether a call changes a tensor in place, or the modes that others run in."""
    if node.op not in ("call_method", "call_function"):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        return True
    name = _name(node)
    asked = node.kwargs.get("out") is not None or bool(node.kwargs.get("inplace"))
    return asked or name in _MODES or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")
_IN_PLACE = (
    "setitem",
    "iadd",
    "isub",
    "imul",
    "imatmul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
)


def _name(node: fx.Node) -> str:
    if node.op not in ("call_method", "call_function"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
