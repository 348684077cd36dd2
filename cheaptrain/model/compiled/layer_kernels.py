"""Norms, rotations of queries and keys, and gated activations of a decoder layer as operators written by hand.

torch.compile makes kernels of the plain code. To hold others against them, this puts given operators into the graph
that torch.compile hands to its backend: before there is a backward pass, so that theirs follows by itself. They are
found by what is computed, so one pass serves every class that computes it so (Qwen3, Llama, Llama 4). It comes after
`merge_linears`, whose gate and up side by side are what the gated activation reads.

The operators round less than the classes do: a norm is rounded once, behind its gain, and in the dtype that the product
after it reads; queries and keys are not rounded between norm and rotation.

The trap it avoids: a class that computes something in another way would keep its plain code without a word, and a
measurement would be one of nothing. So it says what it found (`Found`), and its caller knows what there must be.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from cheaptrain.model.compiled.nodes import (
    argument,
    arguments,
    call,
    calls,
    cast,
    changes_something,
    has_value,
    is_given,
    value,
)


class LayerKernels(NamedTuple):
    """Operators of torch, each with its gradient.

    `rms_norm(x, residual or None, gain, eps, dtype)`: the norm of their sum in `dtype`, the sum, and anything else;
    `rope(states, cosines, sines, gain or None, eps, interleaved)`: `[rows, seq, heads, dim]`, each head normed first
    where eps is above 0, then turned by its token's angles `[rows, seq, dim / 2]`, given in fp32;
    `swiglu(gate and up side by side)`: silu(gate) * up.
    """

    rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    swiglu: Callable[..., Any]


class Found(NamedTuple):
    """What an operator stands for now: norms with a gain, and how many of them with the addition before it; rotations,
    each with the norm beside it where there is one; gated activations."""

    norms: int = 0
    sums: int = 0
    rotations: int = 0
    gates: int = 0


def use_kernels(module: fx.GraphModule, kernels: LayerKernels) -> Found:
    """Put `kernels` into a graph, in place. A graph that changes a tensor or its modes on the way is left alone.

    A rotation of halves is taken to have the same angles in both, as one has: the graph does not say.
    """
    graph = module.graph
    before = list(graph.nodes)
    if any(changes_something(node) for node in before):
        return Found()
    norms = {norm.end: norm for node in before if (norm := _norm(node))}
    rotations = [rotation for node in before if (rotation := _rotation(node, norms))]
    turned = [rotation.norm for rotation in rotations]
    norms = {end: norm for end, norm in norms.items() if norm.gain is not None and norm not in turned}
    gates = {node: product for node in before if (product := _gate_and_up(node))}
    sums = sum(_addends(norm) is not None for norm in norms.values())
    found = Found(len(norms), sums, len(rotations), len(gates))
    tables: dict[tuple[fx.Node, int], fx.Node] = {}
    for rotation in rotations:
        _put_rotation(graph, rotation, kernels, tables)
    for norm in norms.values():
        _put_norm(graph, norm, kernels)
    for node, product in gates.items():
        with graph.inserting_before(node):
            _put(graph, node, call(graph, kernels.swiglu, product))
    graph.lint()
    module.recompile()
    return found


class _Norm(NamedTuple):
    """x / sqrt(mean(x²) + eps), times a gain if there is one; `end` is the node that gives it."""

    x: fx.Node
    gain: fx.Node | None
    eps: float
    end: fx.Node


class _Rotation(NamedTuple):
    """Of `states` `[rows, seq, heads, dim]`; the tables are `[rows, seq, dim]` with one more dimension, of one, for the
    heads. `norm`: what is before or behind it. `end` is the node that gives both."""

    states: fx.Node
    cosines: fx.Node
    sines: fx.Node
    interleaved: bool
    norm: _Norm | None
    end: fx.Node


def _norm(inverse: fx.Node) -> _Norm | None:
    """The norm whose 1 / root mean square this node is."""
    if not calls(inverse, "rsqrt") or not calls(summed := arguments(inverse)[0], "add"):
        return None
    mean, eps = arguments(summed)
    if not calls(mean, "mean") or argument(mean, 1, "dim") != -1 or argument(mean, 2, "keepdim") is not True:
        return None
    squares = arguments(mean)[0]
    if not calls(squares, "pow") or argument(squares, 1, "exponent") != 2 or not isinstance(eps, float) or eps <= 0:
        return None
    exact = arguments(squares)[0]
    end = _user(inverse, "mul")
    if value(exact).dtype != torch.float32 or end is None or _beside(inverse, end) is not exact:
        return None
    end = _cast_of(end) or end
    x = arguments(exact)[0] if calls(exact, *_CASTS) else exact
    times = _user(end, "mul")
    gain = None if times is None else _beside(end, times)
    if times is not None and is_given(gain) and value(gain).shape == value(exact).shape[-1:]:
        return _Norm(x, gain, eps, times)
    return _Norm(x, None, eps, end)


def _rotation(end: fx.Node, norms: dict[fx.Node, _Norm]) -> _Rotation | None:
    """The rotation that this node gives: states * cosines + the other of each pair * sines."""
    if not calls(end, "add") or not all(calls(product, "mul") for product in arguments(end)):
        return None
    (states, cosines), (others, sines) = (arguments(product) for product in arguments(end))
    if not all(has_value(node) for node in (states, others, cosines, sines)) or value(states).dim() != 4:
        return None
    interleaved = _is_neighbours(others, states)
    if not interleaved and not _is_halves(others, states):
        return None
    shape = list(value(states).shape)
    shape[2 if interleaved else 1] = 1  # every head has the angles of its token
    if any(list(value(table).shape) != shape for table in (cosines, sines)):
        return None
    if interleaved:  # [rows, seq, heads, dim], and Llama 4 norms behind it
        turned = _cast_of(end) or end
        behind = next((norm for norm in norms.values() if norm.x is turned and norm.gain is None), None)
        states = arguments(states)[0] if calls(states, *_CASTS) else states
        return _Rotation(states, cosines, sines, True, behind, end if behind is None else behind.end)
    if not calls(states, "transpose") or arguments(states)[1:] != (1, 2):
        return None
    states = arguments(states)[0]
    before = norms.get(states)  # Qwen3 norms before it
    return _Rotation(states if before is None else before.x, cosines, sines, False, before, end)


def _is_halves(others: fx.Node, states: fx.Node) -> bool:
    """Whether these are the second half of each head with a minus, and the first."""
    if not calls(others, "cat") or argument(others, 1, "dim") != -1 or len(arguments(others)[0]) != 2:
        return False
    negative, first = arguments(others)[0]
    half = value(states).shape[-1] // 2
    return calls(negative, "neg") and all(
        calls(piece, "getitem") and arguments(piece) == (states, (..., part))
        for piece, part in ((arguments(negative)[0], slice(half, None)), (first, slice(None, half)))
    )


def _is_neighbours(others: fx.Node, states: fx.Node) -> bool:
    """Whether these are the numbers of each head with neighbours exchanged; the minus is in the table then."""
    if not calls(others, "flatten") or arguments(others)[1:] != (-2,):
        return False
    flipped = arguments(others)[0]
    if not calls(flipped, "flip") or arguments(flipped)[1:] != (-1,):
        return False
    pairs = arguments(flipped)[0]
    return calls(pairs, "unflatten") and arguments(pairs) == (states, -1, (-1, 2))


def _gate_and_up(node: fx.Node) -> fx.Node | None:
    """The merged product whose halves this node is silu(gate) * up of."""
    if not calls(node, "mul"):
        return None
    for active, up in (arguments(node), arguments(node)[::-1]):
        if calls(active, "silu") and calls(gate := arguments(active)[0], "getitem") and calls(up, "getitem"):
            pieces = arguments(gate)[0]
            if (arguments(gate)[1], arguments(up)) == (0, (pieces, 1)) and calls(pieces, "split"):
                product, sizes, dim = arguments(pieces)
                if dim == -1 and len(sizes) == 2 and sizes[0] == sizes[1]:
                    return product  # type: ignore[no-any-return]
    return None


def _put_norm(graph: fx.Graph, norm: _Norm, kernels: LayerKernels) -> None:
    # Where only products read it, in the dtype that autocast would cast it to.
    kinds = {value(user).dtype if calls(user, "linear") else value(norm.end).dtype for user in norm.end.users}
    dtype = kinds.pop() if len(kinds) == 1 else value(norm.end).dtype
    addends = _addends(norm)
    residual, x = addends or (None, norm.x)
    with graph.inserting_before(norm.end if addends is None else norm.x):
        both = call(graph, kernels.rms_norm, x, residual, norm.gain, norm.eps, dtype)
        norm.end.replace_all_uses_with(call(graph, operator.getitem, both, 0))
        if addends is not None:
            norm.x.replace_all_uses_with(call(graph, operator.getitem, both, 1))


def _addends(norm: _Norm) -> tuple[fx.Node, fx.Node] | None:
    """The residual stream and what is added to it, where the norm is that of a sum."""
    if not calls(norm.x, "add"):
        return None
    given = arguments(norm.x)
    alike = len(given) == 2 and all(has_value(each) and value(each).shape == value(norm.x).shape for each in given)
    return (given[0], given[1]) if alike else None


def _put_rotation(
    graph: fx.Graph, rotation: _Rotation, kernels: LayerKernels, tables: dict[tuple[fx.Node, int], fx.Node]
) -> None:
    half, norm = value(rotation.states).shape[-1] // 2, rotation.norm

    def table(node: fx.Node, first: int) -> fx.Node:
        """Of each pair once, `[rows, seq, dim / 2]`. Queries and keys share it."""
        if (node, first) not in tables:
            whole = slice(None)
            part = (whole, whole, 0, slice(first, None, 2)) if rotation.interleaved else (whole, 0, whole, slice(half))
            once = cast(graph, call(graph, operator.getitem, node, part), torch.float32)
            tables[node, first] = call(graph, torch.clone, once)
        return tables[node, first]

    with graph.inserting_before(rotation.end):
        new = call(
            graph,
            kernels.rope,
            rotation.states,
            table(rotation.cosines, 0),
            table(rotation.sines, 1),
            None if norm is None else norm.gain,
            0.0 if norm is None else norm.eps,
            rotation.interleaved,
        )
        if not rotation.interleaved:
            new = call(graph, torch.transpose, new, 1, 2)
        _put(graph, rotation.end, new)


def _put(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """`new` in the place of `old`, before which nodes are inserted; a cast of `old` to the dtype of `new` is `new`."""
    for user in list(old.users):
        if _is_cast_of(user, old) and value(user).dtype == value(new).dtype:
            user.replace_all_uses_with(new)
    old.replace_all_uses_with(cast(graph, new, value(old).dtype))


_CASTS = ("to", "float", "type_as")


def _is_cast_of(user: fx.Node, node: fx.Node) -> bool:
    return calls(user, *_CASTS) and arguments(user)[0] is node


def _cast_of(node: fx.Node) -> fx.Node | None:
    return next((user for user in node.users if _is_cast_of(user, node)), None)


def _user(node: fx.Node, name: str) -> fx.Node | None:
    return next((user for user in node.users if calls(user, name)), None)


def _beside(node: fx.Node, product: fx.Node) -> Any:
    """The other factor."""
    first, second = arguments(product)
    return second if first is node else first
