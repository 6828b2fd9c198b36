"""What passes share: values of nodes, nested graphs, replacing and finishing."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node


def value_of(argument: Any) -> Any:
    """The example value of a node, or the argument itself."""
    if not isinstance(argument, Node):
        return argument
    return argument.meta["example_value"] if "example_value" in argument.meta else argument.meta.get("val")


def as_fake(mode: Any, value: Any) -> Any:
    """A buffer's value is a real tensor; what traces takes fakes."""
    real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if real else value


def is_attribute(argument: Any) -> bool:
    """Whether an argument is a node that reads an attribute of the module, such as a nested graph."""
    return isinstance(argument, Node) and argument.op == "get_attr"


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
