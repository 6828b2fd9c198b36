"""Where the operands of an attention call come from, read off Dynamo's graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse.compile_passes.graphs import value_of

LINEAR = {torch._C._nn.linear: (0,), torch.addmm: (1,)}
PRODUCTS = {operator.matmul, torch.matmul, torch.bmm, torch.mm, torch.einsum, torch.tensordot}
CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
AND = {operator.and_, torch.logical_and, torch.bitwise_and}


def _factors(node: Node) -> list[Node] | None:
    """What a node multiplies: of a linear map its input, of a matrix product both; None for another node."""
    if node.target in LINEAR:
        given = [node.args[i] for i in LINEAR[node.target] if i < len(node.args)] or [node.kwargs.get("input")]
    elif node.target in CONVOLUTIONS:  # of single tokens; others mix neighbours, after the projections
        weight = value_of(node.args[1] if len(node.args) > 1 else node.kwargs["weight"])
        if any(size != 1 for size in weight.shape[2:]):
            return None
        given = [node.args[0] if node.args else node.kwargs["input"]]
    elif node.target in PRODUCTS or (node.op == "call_method" and node.target in ("matmul", "bmm", "mm")):
        given = [*node.args, *node.kwargs.values()]
        given = [one for each in given for one in (each if isinstance(each, list | tuple) else [each])]  # einsum's
    else:
        return None
    return [x for x in given if isinstance(x, Node)]


def _sources(node: Any, limit: int = 2000) -> set[Node]:
    """What the nearest linear maps above a node map; of maps of maps (LoRA), what the first one does."""
    found: set[Node] = set()
    stack: list[Any] = [node]
    visited: set[Node] = set()
    while stack and len(visited) < limit:
        current = stack.pop()
        if not isinstance(current, Node) or current in visited:
            continue
        visited.add(current)
        factors = _factors(current)
        if factors is None:
            stack.extend(current.all_input_nodes)
        for one in map(_of_the_same_tokens, factors or []):
            if _factors(one) is None:
                found.add(one)
            else:
                stack.append(one)
    return found


def _tokens(sources: set[Node]) -> set[Node]:
    """Those that can be sequences of tokens ``[..., S, C]``; weights, positions and conditions have fewer dimensions."""
    values = {node: value_of(node) for node in sources}
    return {node for node, x in values.items() if isinstance(x, torch.Tensor) and x.dim() >= 3} or sources


def _through_views(node: Node) -> Node:
    """The tensor behind casts and reshapes, so that two readings of one tensor compare equal."""
    same = {
        "to",
        "type_as",
        "float",
        "contiguous",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "transpose",
        "permute",
        "clone",
    }
    while True:
        dropout = node.op == "call_function" and node.target is torch.nn.functional.dropout
        passes = dropout or (node.op == "call_method" and node.target in same)
        if not (passes and node.args and isinstance(node.args[0], Node)):
            return node
        node = node.args[0]


NORMS = {torch.nn.functional.layer_norm, torch.layer_norm, torch.nn.functional.rms_norm, torch.rms_norm}
SUMS = {operator.add, operator.sub, operator.iadd, operator.isub, torch.add, torch.sub, "add", "sub", "add_", "sub_"}
SCALINGS = {operator.mul, operator.truediv, operator.imul, torch.mul, torch.div, "mul", "div", "mul_", "div_"}


def _of_the_same_tokens(node: Node) -> Node:
    """The tokens behind views, norms, and what scales and shifts them: a modulation, or a table of positions.

    Queries and keys may have norms, or positions, of their own. A sum of two sequences is a sequence of its own.
    """
    while True:
        node = _through_views(node)
        given = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, Node)]
        if node.target in NORMS:
            given = given[:1]
        elif node.target in SUMS | SCALINGS:
            size = value_of(node).shape
            given = [x for x in given if _is_a_sequence(x, size)]
        else:
            return node
        if len(given) != 1:
            return node
        node = given[0]


def _is_a_sequence(node: Node, size: torch.Size) -> bool:
    """Whether a summand or factor has the shape of the result, and is no parameter."""
    x = value_of(node)
    if not isinstance(x, torch.Tensor) or isinstance(x, torch.nn.Parameter) or x.dim() != len(size):
        return False
    return all(statically_known_true(a == b) for a, b in zip(x.shape, size))


def from_different_tensors(q: Any, k: Any, v: Any) -> bool:
    """Whether queries and keys are maps of different sequences: cross-attention, whatever the lengths.

    The keys' sequence is what keys and values are both maps of: what rotates or scales keys, values have not. Queries of that
    sequence may have more sources, as may keys that an adapter adds to.
    """
    q_sources, k_sources, v_sources = (_tokens(_sources(x)) for x in (q, k, v))
    sequence = k_sources & v_sources or k_sources
    return bool(q_sources and sequence) and not (q_sources & sequence)


ATTENTION = {torch._C._nn.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward}
SLICES = {operator.getitem, torch.split, torch.chunk, torch.narrow, "split", "chunk", "narrow"}


def share_tokens(q: Any, k: Any, v: Any) -> bool:
    """Whether keys or values are made of the queries' tokens after all: more were appended, or they were pooled.

    True where something of as many tokens as the queries stands above both; what attention makes of tokens, and slices of them,
    are other tokens.
    """
    tokens = value_of(q).shape[-2]
    common = _above(_sources(q)) & _above(_sources(k) | _sources(v))
    values = (value_of(node) for node in common)
    sizes = [x.shape for x in values if isinstance(x, torch.Tensor) and x.dim() >= 3]
    return any(statically_known_true(size == tokens) for shape in sizes for size in shape[1:-1])


def _above(nodes: set[Node]) -> set[Node]:
    """The nodes and what they are made of, up to attention and slices."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node.target not in ATTENTION and node.target not in SLICES:
            stack.extend(node.all_input_nodes)
    return found


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
