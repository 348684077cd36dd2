"""Linear layers that read the same input become one: queries, keys and values; gate and up.

One wide product uses a GPU better than two or three narrow ones, and in the backward pass the gradients of the input
need no adding up. The weights stay separate parameters and are laid end to end in the compiled layer, by the kernel
that casts them to the compute dtype anyway. This works on the graph that torch.compile hands to its backend, before
there is a backward pass, so that one follows by itself; and for every model class, because nothing is looked for but
products of the same tensor. (Inductor's own `batch_linear_lhs` does this for inputs of two dimensions only.)

The trap it avoids: the pieces of a wide product are no longer contiguous, so a `view` of them may be impossible. Each
`view` becomes a `reshape`, which is the same where a view can be had; and a graph that writes into its tensors, where
a copy would be another thing than a view, is left alone.
"""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cheaptrain.model.compiled.nodes import argument, call, cast, changes_something, is_given, value

_LINEAR = (functional.linear, torch._C._nn.linear)  # type: ignore[attr-defined]


def merge_linears(module: fx.GraphModule) -> int:
    """Merge in place the linear layers of a graph that share their input; returns how many products that saves.

    Left as they are: weights or biases that are not plain tensors given to the graph (sharded ones, say), of different
    dtype or differing in whether they are trained, and graphs that change a tensor or their modes on the way.
    """
    graph = module.graph
    if any(changes_something(node) for node in graph.nodes):
        return 0
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        key = _group(node)
        if key is not None:
            groups[key].append(node)
    merged = [nodes for nodes in groups.values() if len(nodes) > 1]
    if not merged:
        return 0
    for nodes in merged:
        _merge(graph, nodes)
    for node in list(graph.find_nodes(op="call_method", target="view")):
        if not isinstance(argument(node, 1, "dtype"), torch.dtype):
            node.target = "reshape"
            node.kwargs = {"shape" if name == "size" else name: value for name, value in node.kwargs.items()}
    graph.lint()
    module.recompile()
    return sum(len(nodes) - 1 for nodes in merged)


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    weights = [argument(node, 1, "weight") for node in nodes]
    biases = [argument(node, 2, "bias") for node in nodes]
    sizes = [value(weight).shape[0] for weight in weights]
    with graph.inserting_before(nodes[0]):
        # In the dtype that autocast casts to: laid end to end in fp32, the weights would be copied once more.
        dtype = value(nodes[0]).dtype
        wide = call(graph, torch.cat, [cast(graph, weight, dtype) for weight in weights])  # [sum of sizes, in]
        bias = None if biases[0] is None else call(graph, torch.cat, [cast(graph, each, dtype) for each in biases])
        product = call(graph, functional.linear, argument(nodes[0], 0, "input"), wide, bias)
        pieces = call(graph, torch.split, product, sizes, -1)
        for number, node in enumerate(nodes):
            node.replace_all_uses_with(call(graph, operator.getitem, pieces, number))
    for node in nodes:
        graph.erase_node(node)


def _group(node: fx.Node) -> tuple[Any, ...] | None:
    """What linear layers must have in common to be merged; None for a node that is not one, or not one to merge."""
    if node.op != "call_function" or node.target not in _LINEAR:
        return None
    given, weight, bias = (argument(node, place, name) for place, name in enumerate(("input", "weight", "bias")))
    if not _plain(weight, 2) or (bias is not None and not _plain(bias, 1)):
        return None
    example = value(weight)
    of_bias = None if bias is None else value(bias).dtype
    return given, example.dtype, example.device, example.shape[1], example.requires_grad, of_bias


def _plain(node: Any, dimensions: int) -> bool:
    """Whether this is a plain tensor of fixed size that the graph is given."""
    if not is_given(node):
        return False
    example = value(node)
    return (
        not is_traceable_wrapper_subclass(example) and example.dim() == dimensions and isinstance(example.shape[0], int)
    )
