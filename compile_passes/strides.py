"""Strides that a graph holds as numbers: what reads by them is given tensors that lie as they did when it was traced.

Dynamo runs a model's own code, which may ask a result of attention for its strides and hand them to a Triton kernel or to
`torch.as_strided`. A sparse call's result need not lie as the dense one's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from flexsparse.compile_passes.graphs import graph_modules, value_of
from flexsparse.compile_passes.views import concrete

_BY_STRIDES = ("as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "triton_kernel_wrapper_mutation")


def are_read(gm: GraphModule) -> bool:
    """Whether a graph, or one nested in it, has an op that was given strides as numbers, or may have been."""
    return any(_name(node) in _BY_STRIDES for module in graph_modules(gm) for node in module.graph.nodes)


def _name(node: Node) -> str:
    if isinstance(node.target, str | torch._ops.HigherOrderOperator):
        return str(node.target if isinstance(node.target, str) else node.target.name())
    return str(getattr(node.target, "__name__", "")).partition(".")[0]


def laid_as(x: Node, like: Tensor) -> Node:
    """A node after ``x``: the same tensor, whose dimensions lie in memory in the order of those of an example."""
    strides = [concrete(stride) for stride in like.stride()]
    order = sorted(range(like.dim()), key=lambda dim: -strides[dim])
    with x.graph.inserting_after(x):
        new = x.graph.call_function(flexsparse_laid_as, (x, order))
    with value_of(x).fake_mode:
        new.meta = dict(x.meta, example_value=flexsparse_laid_as(value_of(x), order))
    return new


def flexsparse_laid_as(x: Tensor, order: Sequence[int]) -> Tensor:
    """A tensor with its dimensions in memory in an order, from the outermost."""
    back = sorted(range(len(order)), key=lambda place: order[place])
    return x.permute(*order).contiguous().permute(*back)
