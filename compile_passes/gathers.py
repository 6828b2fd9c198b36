"""Gathers of rows by a table as a joint graph has them, and what changes below a tensor whose memory format does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse.compile_passes.graphs import value_of
from flexsparse.compile_passes.views import aten, concrete, is_op, is_whole, same

IDENTITIES = (aten.detach.default, aten.alias.default)
ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)


def same_table(a: Any, b: Any) -> bool:
    """Whether two nodes are one table."""
    return same(plain(a), plain(b))


def plain(node: Any) -> Any:
    """A node without the identities around it."""
    while is_op(node, *IDENTITIES):
        node = node.args[0]
    return node


def readers(node: Node, through: tuple[Any, ...] = IDENTITIES) -> Iterator[Any]:
    """Who reads a node, through identities, or other ops."""
    for user in node.users:
        if is_op(user, *through):
            yield from readers(user, through)
        else:
            yield user


def identities(node: Node) -> Iterator[Node]:
    """The identities of a node."""
    for user in node.users:
        if is_op(user, *IDENTITIES):
            yield user
            yield from identities(user)


def gathered(node: Any, table: Node, padded: bool) -> Node | None:
    """The tensor ``x [B, H, S, D]`` of which a node is ``x[:, :, table]``; with ``padded``, 0 where the table is below 0.

    A table that is padded may be taken as it is where the graph knows that it has no -1.
    """
    node = plain(node)
    if padded:
        inner = _zeroed(node, table)
        if inner is not None:
            return _taken(inner, table, clamped=True)
    return _taken(node, table, clamped=False)


def _zeroed(node: Any, table: Node) -> Any:
    """What a node is where the table is not below 0; it is 0 elsewhere."""
    if is_op(node, aten.where.self):
        missing, zero, inner = node.args
        if not _is_zero(zero):
            return None
    elif is_op(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        inner, missing, zero = node.args
        if not (_is_zero(zero) or zero == 0):
            return None
    else:
        return None
    if is_op(missing, aten.unsqueeze.default) and missing.args[1] in (1, -1):
        below = missing.args[0]
        while is_whole(below):
            below = below.args[0]
        if is_op(below, aten.lt.Scalar) and below.args[1] == 0 and same_table(below.args[0], table):
            return inner
    return None


def _is_zero(node: Any) -> bool:
    if is_op(node, aten.scalar_tensor.default):
        return bool(node.args[0] == 0)
    return is_op(node, aten.full.default) and node.args[1] == 0


def taken(node: Any) -> tuple[Node | None, Any]:
    """``(x, index)`` of a node ``x[:, :, index]``, x of four dimensions; else None."""
    if is_op(node, aten.index.Tensor) and list(node.args[1][:2]) == [None, None] and len(node.args[1]) == 3:
        source, index = node.args[0], node.args[1][2]
    elif is_op(node, aten.index_select.default) and node.args[1] in (2, -2):
        source, index = node.args[0], node.args[2]
    else:
        return None, None
    return (source, index) if value_of(source).dim() == 4 else (None, None)


def _taken(node: Any, table: Node, clamped: bool) -> Node | None:
    source, index = taken(node)
    if source is None:
        return None
    if clamped:
        if not (is_op(index, aten.clamp_min.default) and index.args[1] == 0):
            return None
        index = index.args[0]
    return source if same_table(index, table) else None


def added_to(node: Any, table: Node) -> Any:
    """Of a node that adds rows ``[:, :, table]`` to something: to what. Inductor's decompositions put where others add."""
    if is_op(node, aten.index_add.default):
        return node.args[0] if node.args[1] in (2, -2) and same_table(node.args[2], table) else None
    if is_op(node, aten.index_put.default, aten._unsafe_index_put.default):
        places = list(node.args[1])
        adds = len(node.args) == 4 and node.args[3] is True and len(places) == 3 and places[:2] == [None, None]
        return node.args[0] if adds and same_table(places[2], table) else None
    return None


def is_zeros(node: Any) -> bool:
    return is_op(node, *ZEROS) or (is_op(node, aten.full.default) and node.args[1] == 0)


def gather_instead(graph: Graph, slots: Node, tokens: Node) -> int:
    """Where rows are added to zeros at the slots of a table, take the row of each slot's token; how many were changed.

    A token has one slot: nothing is added up, but CUDA adds atomically, in float32, to zeros that it writes before.

    Args:
        graph: a joint graph.
        slots: int32 ``[S]``, the slot of each token.
        tokens: int32 ``[P]``, the token in each slot, -1 for none.
    """
    changed = 0
    for node in list(graph.nodes):
        if not is_zeros(added_to(node, slots)) or value_of(node).dim() != 4:
            continue
        if not statically_known_true(value_of(node).shape[2] == value_of(tokens).shape[0]):
            continue
        rows = node.args[3] if is_op(node, aten.index_add.default) else node.args[2]
        example = value_of(rows)
        with graph.inserting_before(node):
            none = _like(node, aten.unsqueeze.default, _like(node, aten.lt.Scalar, tokens, 0), 1)
            index = _like(node, aten.clamp_min.default, tokens, 0)
            zero = _like(node, aten.full.default, [], 0.0, dtype=example.dtype, device=example.device)
            each = _like(node, aten.index.Tensor, rows, [None, None, index])
            found = _like(node, aten.where.self, none, zero, each)
        before = value_of(node)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        restride(graph, found, before)
        changed += 1
    return changed


def _like(node: Node, target: Any, *args: Any, **options: Any) -> Node:
    """A node at the graph's insertion point, with example value, tagged as another one is."""
    new = node.graph.call_function(target, args, options)
    with value_of(node).fake_mode:
        value = target(*torch.fx.map_arg(args, value_of), **options)
    # Inductor names kernels by the ops that nodes came from
    new.meta = {key: x for key, x in node.meta.items() if key not in ("tensor_meta", "original_aten", "from_node")}
    new.meta["val"] = value
    return new


def restride(graph: Graph, node: Node, before: Tensor) -> None:
    """Renew the example values below a node that stands in the place of one with the value ``before``.

    Copies to where something lies already are dropped. Where something cannot be of the new memory format (a view of rows
    that lie otherwise, a result of the graph), the node's readers get a copy in the old one.
    """
    if alike(value_of(node), before):
        return
    try:
        renewed = _below(graph, node)
    except (RuntimeError, ValueError):
        users = list(node.users)
        copy = _copy_lying_as(graph, node, before)
        for user in users:
            user.replace_input_with(node, copy)
        return
    _accept(graph, node, renewed)


def spare_copies(graph: Graph, node: Node) -> bool:
    """As `restride`, but only if it drops a copy and makes none; whether it did."""
    try:
        renewed = _below(graph, node)
    except (RuntimeError, ValueError):
        return False
    if not any(True for _ in _needless(node, renewed)):
        return False
    _accept(graph, node, renewed)
    return True


def _accept(graph: Graph, node: Node, renewed: dict[Node, Any]) -> None:
    """Take over the values below a node, and drop copies to where something lies already."""
    copies = list(_needless(node, renewed))
    for each, value in renewed.items():
        each.meta["val"] = value
        each.meta.pop("tensor_meta", None)
    for copy in copies:
        copy.replace_all_uses_with(copy.args[0])
        graph.erase_node(copy)


def _needless(node: Node, renewed: dict[Node, Any]) -> Iterator[Any]:
    """Copies of a node, or of what changes below it, to where it will lie anyway."""
    for each in (node, *renewed):
        value = renewed.get(each, value_of(each))
        for user in each.users:
            lies_so = is_op(user, aten.clone.default) and alike(value, renewed.get(user, value_of(user)))
            if lies_so and all(reader.op == "call_function" for reader in user.users):
                yield user


def _copy_lying_as(graph: Graph, node: Node, before: Tensor) -> Node:
    """Nodes that copy a tensor into the memory format of another one without gaps."""
    order = sorted(range(before.dim()), key=lambda i: concrete(before.stride(i)), reverse=True)
    back = sorted(range(before.dim()), key=order.__getitem__)
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.permute.default, (order,), {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (aten.permute.default, (back,), {}),
    ]
    for target, rest, options in steps[1:2] if order == sorted(order) else steps:
        with graph.inserting_after(node):
            new = graph.call_function(target, (node, *rest), options)
        new.meta = {key: item for key, item in node.meta.items() if key != "tensor_meta"}
        with value_of(node).fake_mode:
            new.meta["val"] = target(value_of(node), *rest, **options)
        node = new
    return node


def _below(graph: Graph, node: Node) -> dict[Node, Any]:
    """The values that change below a node.

    Raises:
        RuntimeError: one cannot, or is a result of the graph.
    """
    # identities that have their new value already
    renewed: dict[Node, Any] = {x: value_of(x) for x in identities(node) if alike(value_of(x), value_of(node))}
    changed = {node, *renewed}
    for user in graph.nodes:
        if not any(x in changed for x in user.all_input_nodes):
            continue
        if user.op != "call_function":
            raise RuntimeError("a result of the graph keeps its memory format")
        arguments, options = torch.fx.map_arg((user.args, user.kwargs), lambda n: renewed.get(n, value_of(n)))
        with value_of(node).fake_mode:
            value = user.target(*arguments, **options)
        if not alike(value, value_of(user)):
            renewed[user] = value
            changed.add(user)
    return renewed


def alike(a: Any, b: Any) -> bool:
    """Whether two values lie in memory alike."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if not isinstance(a, Tensor):
        return True
    strides = zip(a.shape, a.stride(), b.stride())
    return all((isinstance(n, int) and n == 1) or statically_known_true(x == y) for n, x, y in strides)
