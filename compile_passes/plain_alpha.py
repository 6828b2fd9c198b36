"""Sums with a factor (``torch.add(a, b, alpha=c)``) become a product and a sum.

Where sizes are symbolic, Python floats that a graph reads, such as a module's epsilon, are its inputs; AOT autograd computes
with them as with tensors, and of such a sum it forgets ``alpha`` (torch up to 2.13, `tensorify_python_scalars`): without a
word, the result is another; 2.14 fails there. diffusers' Cosmos has one in its learned positions.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

FUNCTIONS = (torch.add, torch.sub)
METHODS = ("add", "add_", "sub", "sub_")


def plain_alpha(gm: GraphModule) -> int:
    """Rewrite the sums of a Dynamo graph, nested graphs included, in which a number is symbolic; returns how many."""
    count = 0
    for module in [each for each in gm.modules() if isinstance(each, GraphModule)]:
        graph = module.graph
        found = [node for node in graph.nodes if _is_sum(node) and any(map(_is_number, node.args[:2]))]
        for node in found:
            first, second = node.args[:2]
            with graph.inserting_before(node):
                product = graph.call_function(operator.mul, (second, node.kwargs["alpha"]))
            _remember(product)
            node.args = (first, product, *node.args[2:])
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "alpha"}
        if found:
            module.recompile()
        count += len(found)
    return count


def _is_sum(node: Node) -> bool:
    return "alpha" in node.kwargs and (
        (node.op == "call_function" and node.target in FUNCTIONS)
        or (node.op == "call_method" and node.target in METHODS)
    )


def _is_number(argument: Any) -> bool:
    """Whether an argument is a symbolic number."""
    return isinstance(argument, Node) and isinstance(argument.meta.get("example_value"), torch.SymFloat | torch.SymInt)


def _remember(product: Node) -> None:
    """The product's example value, for passes that look at it."""
    values: list[Any] = [a.meta.get("example_value") if isinstance(a, Node) else a for a in product.args]
    if all(value is not None for value in values):
        product.meta["example_value"] = values[0] * values[1]
