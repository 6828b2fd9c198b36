"""Where the operands of an attention call come from, read off Dynamo's graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from flexsparse.compile_passes import marks
from flexsparse.compile_passes.graphs import value_of

LINEAR = {torch._C._nn.linear, operator.matmul, torch.matmul, torch.addmm, torch.bmm, torch.mm}
AND = {operator.and_, torch.logical_and, torch.bitwise_and}


def _sources(node: Any, limit: int = 2000) -> set[Node]:
    """Inputs of the nearest linear maps above a node."""
    found: set[Node] = set()
    stack: list[Any] = [node]
    visited: set[Node] = set()
    while stack and len(visited) < limit:
        current = stack.pop()
        if not isinstance(current, Node) or current in visited:
            continue
        visited.add(current)
        if current.target in LINEAR or (current.op == "call_method" and current.target == "matmul"):
            first = current.args[0] if current.args else current.kwargs.get("input")
            if isinstance(first, Node):
                found.add(_through_views(first))
        else:
            stack.extend(current.all_input_nodes)
    return found


def _through_views(node: Node) -> Node:
    """The tensor behind casts, reshapes and marks, so that two readings of one tensor compare equal."""
    same = {
        "to",
        "type_as",
        "float",
        "contiguous",
        "view",
        "reshape",
        "flatten",
        "transpose",
        "permute",
        "clone",
    }
    while True:
        if (node.op == "call_method" and node.target in same and isinstance(node.args[0], Node)) or (
            node.op == "call_function" and marks.is_mark(node.target, marks.GATE) and isinstance(node.args[0], Node)
        ):
            node = node.args[0]
        else:
            return node


def from_different_tensors(q: Any, k: Any) -> bool:
    """Whether queries and keys are linear maps of different tensors: cross-attention, whatever the lengths."""
    q_sources, k_sources = _sources(q), _sources(k)
    return bool(q_sources and k_sources) and not (q_sources & k_sources)


def key_mask(mask: Any) -> Node | None:
    """The key mask ``[B, 1, 1, S]`` of an attention mask: itself, or what a mask ``[B, 1, S, S]`` was made of.

    A model may hide the same keys from all queries by ``rows & rows.transpose(2, 3)``, rows being a repeated key mask; the
    rows that see nothing are those of hidden tokens, whose output nobody reads. None for any other mask.
    """
    if not isinstance(mask, Node):
        return None
    if _repeats_one_row(mask):
        return mask.args[0]  # type: ignore[return-value]
    if value_of(mask).dim() == 4 and value_of(mask).shape[2] == 1:
        return mask
    node = _through_casts(mask)
    if node.target not in AND and not (node.op == "call_method" and node.target in ("logical_and", "bitwise_and")):
        return None
    for rows, columns in (node.args[:2], node.args[1::-1]):
        if isinstance(rows, Node) and _is_transpose_of(columns, rows) and _repeats_one_row(rows):
            return rows.args[0]  # type: ignore[return-value]
    return None


def _through_casts(node: Node) -> Node:
    while node.op == "call_method" and node.target in ("bool", "to", "contiguous") and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_transpose_of(node: Any, of: Node) -> bool:
    if not isinstance(node, Node) or not node.args or node.args[0] is not of:
        return False
    swapped = {d % 4 for d in node.args[1:3] if isinstance(d, int)} == {2, 3}
    return node.target in ("transpose", torch.transpose) and swapped


def _repeats_one_row(node: Node) -> bool:
    """Whether all rows of a mask are copies of one, which its first argument is."""
    if node.target not in ("repeat", "expand") or not isinstance(node.args[0], Node):
        return False
    one, many = value_of(node.args[0]), value_of(node)
    others = all(one.shape[d] == many.shape[d] for d in (0, 1, 3)) if one.dim() == many.dim() == 4 else False
    return others and one.shape[2] == 1
