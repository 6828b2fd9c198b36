"""What passes share: values of nodes, nested graphs, replacing and finishing."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node


def value_of(argument: Any) -> Any:
    """The example value of a node, or the argument itself."""
    if not isinstance(argument, Node):
        return argument
    return argument.meta["example_value"] if "example_value" in argument.meta else argument.meta.get("val")


def as_fake(mode: Any, value: Any) -> Any:
    """A buffer's value is a real tensor, or a fake one of the mode that a model is in; what traces takes its own fakes."""
    own = not isinstance(value, torch.Tensor) or getattr(value, "fake_mode", None) is mode
    return value if own else mode.from_tensor(value, static_shapes=True)


def is_attribute(argument: Any) -> bool:
    """Whether an argument is a node that reads an attribute of the module, such as a nested graph."""
    return isinstance(argument, Node) and argument.op == "get_attr"


def constant(gm: GraphModule, tensor: torch.Tensor) -> Node:
    """A tensor that a builder closes over or a layout has, as a buffer of the graph; the same one every time."""
    name = next((key for key, known in gm._buffers.items() if known is tensor), None)
    if name is None:
        name = f"flexsparse_constant_{len(gm._buffers)}"
        gm.register_buffer(name, tensor)
    node = gm.graph.get_attr(name)
    node.meta["example_value"] = tensor
    return node


def say_source(gm: GraphModule, name: str) -> None:
    """Say where a buffer comes from, which Dynamo's graphs say of every one; others do not."""
    if hasattr(gm, "_param_name_to_source"):
        gm._param_name_to_source[name] = torch._dynamo.source.ConstantSource(name)  # type: ignore[operator,union-attr,index,assignment]


def tables_of(gm: GraphModule, parts: Any, sizes: Any, device: torch.device, order: str) -> tuple[Node, ...] | None:
    """Nodes of a layout's index tensors; without them, every call would make its own. None where sizes are symbolic."""
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    with unset_fake_temporarily():
        tensors = parts.tables(sizes, device, order)
    return tuple(constant(gm, tensor) for tensor in tensors)


def graph_modules(gm: GraphModule) -> list[GraphModule]:
    """A graph and every graph nested in it (activation checkpointing puts attention into one)."""
    return [module for module in gm.modules() if isinstance(module, GraphModule)]


def replace(node: Node, new: Node) -> None:
    """Put ``new`` in the place of ``node``, with its metadata."""
    new.meta = dict(node.meta)
    remove(node, new)


def remove(node: Node, replacement: Any) -> None:
    """Erase a node; its users take ``replacement``."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def finish(gm: GraphModule) -> None:
    """Check and recompile an edited graph."""
    gm.graph.lint()
    gm.recompile()
