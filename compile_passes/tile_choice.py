"""Where a choice of tiles ends in a graph, and what it chooses from: `select_tiles`, or a top-k as people write it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse import tile_bits  # noqa: F401  # defines the ops
from flexsparse.compile_passes.graphs import value_of
from flexsparse.compile_passes.views import CASTS, COPIES, aten, is_op, same, shape_of
from flexsparse.ops import select_tiles  # noqa: F401  # defines the op

ops = torch.ops.flexsparse
CHOICES = (ops.select_tiles.default, ops.pack_tiles.default, ops.pack_lists.default)


@dataclass
class Choice:
    """Where a choice of tiles ends.

    Attributes:
        anchor: the node that makes bitmask and counts.
        scores: node of the scores that are chosen from.
        rule: name, value and run-time number of the rule, least tiles, capacity (None: all).
        now: run-time number.
        value: number known now.
        min_tiles: least tiles.
        capacity: most tiles.
        allowed: node of the bitmask of allowed tiles, or None.
        inner: nodes between scores and anchor.
    """

    anchor: Node
    scores: Node
    rule: str
    value: float
    now: Any
    min_tiles: int
    capacity: Any
    allowed: Any
    inner: list[Node]


class NotFused(Exception):
    """Why a choice of tiles stays as it is."""


def find_choice(anchor: Node) -> Choice:
    """What a node that makes a bitmask chooses from, and how.

    Raises:
        NotFused: it is no choice of the best tiles, or of others than it has scores for (some of the keys only): the fused op's
            bitmask would be of another length than what reads it believes.
    """
    found = _find(anchor)
    if anchor.target is not ops.select_tiles.default:
        listed = anchor.target is ops.pack_lists.default
        tiles = value_of(anchor.args[2]) if listed else shape_of(anchor.args[0])[-1]
        if not statically_known_true(tiles == shape_of(found.scores)[-1]):
            raise NotFused("it has no scores for some of the tiles")
    return found


def _find(anchor: Node) -> Choice:
    if anchor.target is ops.select_tiles.default:
        scores, allowed, now, rule, value, min_tiles, capacity = anchor.args
        if isinstance(now, Node) and value_of(now).dim() > 0:
            raise NotFused("its counts are computed from the scores of other rows")
        return Choice(anchor, scores, rule, value, now, min_tiles, capacity, allowed, [])
    if anchor.target is ops.pack_lists.default:
        lists, counts, _ = anchor.args
        listed, inner = _through_casts(lists)
        between = _full_counts(counts, shape_of(listed)[-1])
        if between is None:
            raise NotFused("its lists are not used whole")
        return _best(anchor, listed, [*inner, *between])
    mask, inner = _through_casts(anchor.args[0])
    if not is_op(mask, aten.scatter.value, aten.scatter.src, aten.scatter_.value, aten.scatter_.src) or mask.args[
        1
    ] not in (-1, 3):
        raise NotFused("its tiles are not the best so many of each row")
    empty, _, index, source = mask.args
    if not (is_op(empty, aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)):
        raise NotFused("its tiles are scattered into a mask that is not empty")
    if empty.target is not aten.zeros.default or mask.target not in (aten.scatter.value, aten.scatter.src):
        inner = [empty, *inner]  # it reads the scores, for their sizes, or is written to
    if mask.target in (aten.scatter.value, aten.scatter_.value):
        if not (source is True or source == 1):
            raise NotFused("its mask is scattered with something else than true")
        listed, between = _through_casts(index)
        return _best(anchor, listed, [mask, *inner, *between])
    return _ranked(anchor, mask, [mask, *inner])


def _through_casts(node: Any) -> tuple[Node, list[Node]]:
    """The node above casts to bool or integers and copies, and those."""
    passed = []
    while is_op(node, *COPIES, *CASTS):
        passed.append(node)
        node = node.args[0]
    return node, passed


def _full_counts(counts: Any, size: Any) -> list[Node] | None:
    """Nodes that read the lists for the sizes of counts that are all the list's length; None for other counts."""
    node, _ = _through_casts(counts)
    while is_op(node, aten.expand.default):
        node = node.args[0]
    filled = {aten.full.default: 1, aten.new_full.default: 2, aten.full_like.default: 1}
    if not (isinstance(node, Node) and node.target in filled and same(node.args[filled[node.target]], size)):
        return None
    between = []
    while is_op(node, aten.new_full.default, aten.full_like.default, aten.select.int, aten.slice.Tensor):
        between.append(node)
        node = node.args[0]
    return between


def _best(anchor: Node, listed: Node, inner: list[Node]) -> Choice:
    """A choice whose list of tiles is ``topk(scores, n).indices``, or the head of a descending sort."""
    head = None
    if is_op(listed, aten.slice.Tensor, aten.narrow.default):
        dim, start, stop = (*listed.args[1:], None)[:3]
        if dim not in (-1, 3) or start not in (0, None) or len(listed.args) > 4:
            raise NotFused("its tiles are a middle part of a sorted row")
        head, inner, listed = stop, [*inner, listed], listed.args[0]
    if is_op(listed, operator.getitem) and listed.args[1] == 1:
        ranked = listed.args[0]
        inner = [*inner, listed]
    else:
        ranked = listed
    if is_op(ranked, aten.topk.default) and head is None:
        scores, n, dim, largest = (*ranked.args, *(-1, True)[len(ranked.args) - 2 :])[:4]
        if dim not in (-1, 3) or not largest or ranked.kwargs.get("largest", True) is False:
            raise NotFused("it keeps the lowest scores, or sorts another dimension")
    elif head is not None and _sorts_descending(ranked):
        scores, n = ranked.args[0], head
    else:
        raise NotFused("its tiles are not the best so many of each row")
    return _top(anchor, scores, n, None, [*inner, ranked])


def _ranked(anchor: Node, mask: Node, inner: list[Node]) -> Choice:
    """`masks.coarse.keep_top`: the first n of a descending stable sort, scattered as ``arange(M) < n``."""
    _, _, index, source = mask.args
    first, between = source, []
    while is_op(first, aten.expand.default):
        between.append(first)
        first = first.args[0]
    if not (is_op(first, aten.lt.Scalar, aten.lt.Tensor) and is_op(first.args[0], aten.arange.default)):
        raise NotFused("its tiles are not the best so many of each row")
    if not _sorts_descending(index):
        raise NotFused("its tiles are not sorted by score, best first")
    n = first.args[1]
    now = n if isinstance(n, Node) and isinstance(value_of(n), torch.Tensor) else None
    if now is not None and value_of(now).dim() > 0:
        raise NotFused("its counts differ from row to row")
    known = [first.args[0], first, *between]
    return _top(anchor, index.args[0], n, now, [*inner, index, *known])


def _sorts_descending(node: Any) -> bool:
    if is_op(node, aten.argsort.stable, aten.argsort.default, aten.sort.default, aten.sort.stable):
        names = [argument.name for argument in node.target._schema.arguments]
        given = {**dict(zip(names, node.args)), **node.kwargs}
        return bool(given.get("descending", False)) and given.get("dim", -1) in (-1, 3)
    return False


def _top(anchor: Node, scores: Node, n: Any, now: Any, inner: list[Node]) -> Choice:
    inner = [*inner]
    ranked = scores
    passed = []
    while is_op(ranked, *COPIES):
        passed.append(ranked)
        ranked = ranked.args[0]
    if is_op(ranked, aten.softmax.int, aten._softmax.default) and ranked.args[1] in (-1, 3):
        # a softmax keeps the order of its row; its node may serve the coarse output as well
        scores = ranked.args[0]
        inner += passed
        if all(user in inner for user in ranked.users):
            inner.append(ranked)
    if not isinstance(n, int) and now is None:
        raise NotFused(f"the number of tiles it keeps ({n}) is not known when the graph is made")
    value = 0.0 if now is not None else float(n)
    return Choice(anchor, scores, "top_k", value, now, 0, None, None, inner)
