"""Graphs nested in a graph by higher-order operators (activation checkpointing), and nodes passed into them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from flexsparse.compile_passes.graphs import is_attribute

# operators whose sub-graph takes the operands that follow it, one placeholder each
WALKED = (
    "tag_activation_checkpoint",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "invoke_subgraph",
)


def graphs_of(gm: GraphModule, node: Node) -> Iterator[tuple[GraphModule, bool]]:
    """The sub-graphs of a higher-order operator, and whether `lift` can pass nodes into each."""
    positions = [position for position, argument in enumerate(node.args) if is_attribute(argument)]
    for position in positions:
        sub = getattr(gm, str(node.args[position].target), None)  # type: ignore[union-attr]
        if isinstance(sub, GraphModule):
            yield sub, node.target.name() in WALKED and position == positions[0]  # type: ignore[union-attr]


def lift(node: Node, sub: GraphModule, environment: dict[str, Any]) -> dict[str, Any]:
    """Pass the environment's nodes into a sub-graph as operands; each becomes one once, however many passes ask for it.

    Args:
        node: the operator that runs the sub-graph; gets the operands.
        sub: the sub-graph; gets the placeholders.
        environment: names to nodes, to plain values, or to tuples of both.

    Returns:
        The environment inside of the sub-graph.
    """
    inside: dict[str, Any] = {}
    known: dict[str, Node] = sub.__dict__.setdefault("_flexsparse_operands", {})
    given: set[str] = node.meta.setdefault("flexsparse_operands", set())  # a sub-graph may be run by several nodes
    for key, value in environment.items():
        items = value if isinstance(value, tuple) else (value,)
        inner: list[Any] = []
        for index, item in enumerate(items):
            if not isinstance(item, Node):
                inner.append(item)
                continue
            name = f"flexsparse_{key}_{index}"
            if name not in known:
                last = [n for n in sub.graph.nodes if n.op == "placeholder"][-1]
                with sub.graph.inserting_after(last):
                    known[name] = sub.graph.placeholder(name)
                known[name].meta = dict(item.meta)
            if name not in given:
                node.args = (*node.args, item)
                given.add(name)
            inner.append(known[name])
        inside[key] = tuple(inner) if isinstance(value, tuple) else inner[0]
    return inside
