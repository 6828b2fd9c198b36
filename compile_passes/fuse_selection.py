"""FuseSelection: pooling, scores, coarse output and choice of tiles become one op, on the graph before autograd."""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from flexsparse.compile_passes import coarse_chain, graphs
from flexsparse.compile_passes.coarse_chain import (
    CASTS,
    COPIES,
    Pooled,
    Scores,
    TooLarge,
    aten,
    is_op,
    keeps_precision,
    match_pooled,
    match_scores,
    same,
    shape_of,
    users,
    weighted_sum,
)
from flexsparse.compile_passes.graphs import as_fake, finish, graph_modules, value_of
from flexsparse.compile_passes.unfold import CALL

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


class FuseSelection:
    """Replace the coarse stage by ``flexsparse::coarse_select``.

    Before (in any spelling: reshape, unflatten or einops, mean or sum and count, scaled before or after, matmul or
    einsum, casts to float; ``top_k``, `keep_top` or `select_tiles` at the end)::

        q_c, k_c, v_c = mean over the tokens of each tile
        scores        = q_c @ k_c^T * scale
        bits, counts  = pack_tiles(scatter(topk(scores)))     # or select_tiles(scores, ...)
        coarse        = softmax(scores) @ v_c                 # where it is wanted

    After::

        coarse, _, _, _, _, bits, counts, wanted = coarse_select(q, k, v, ...)

    A chain is left alone where an intermediate is read by anything else, where pooling is no mean, and where its layout
    cannot be verified.

    Attributes:
        matches: choices fused by the last run.
        fused: names of calls (`unfold.CALL`) whose every choice was fused.
        refused: why other calls were not, by name.
    """

    def __init__(self) -> None:
        self.matches = 0
        self.fused: set[str] = set()
        self.refused: dict[str, str] = {}

    def uuid(self) -> str:
        """Hash of this pass's source, for caches of compiled graphs. It has no parameters."""
        modules = (sys.modules[__name__], coarse_chain, graphs)
        return hashlib.sha256("".join(inspect.getsource(module) for module in modules).encode()).hexdigest()

    def __call__(self, gm: GraphModule) -> GraphModule:
        """Fuse every coarse stage of a graph and of the graphs nested in it, in place."""
        self.matches = 0
        self.fused, self.refused = set(), {}
        for module in graph_modules(gm):
            before = self.matches
            for anchor in [n for n in module.graph.nodes if n.op == "call_function" and n.target in CHOICES]:
                name = anchor.meta.get(CALL)
                try:
                    fuse(module.graph, anchor)
                except (NotFused, TooLarge) as reason:
                    if name is not None and not _packs_only(anchor):
                        self.refused[name] = str(reason)
                    continue
                self.matches += 1
                if name is not None:
                    self.fused.add(name)
            if self.matches != before:
                finish(module)
        self.fused -= self.refused.keys()
        return gm


def _packs_only(anchor: Node) -> bool:
    """Whether a node packs the mask of allowed tiles for another choice."""
    return all(is_op(user, *CHOICES[:1], ops.coarse_select.default) or _feeds_choice(user) for user in anchor.users)


def _feeds_choice(node: Node) -> bool:
    return is_op(node, operator.getitem) and all(
        is_op(user, ops.select_tiles.default, ops.coarse_select.default) for user in node.users
    )


def fuse(graph: Graph, anchor: Node) -> None:
    """Fuse the coarse stage that ends in a choice of tiles.

    Raises:
        NotFused: it is none, or an intermediate is read by something else; the graph is as it was.
    """
    choice = find_choice(anchor)
    scores = match_scores(choice.scores)
    if scores is None:
        raise NotFused("its scores are no product of mean-pooled queries and keys")
    outputs = list(find_coarse(scores, choice))
    values, inner = None, [*scores.inner, *choice.inner]
    for _, pooled, between in outputs:
        if values is not None and not same(values.tokens, pooled.tokens):
            raise NotFused("it has two coarse outputs of different values")
        values = pooled
        inner += [*between, *pooled.inner]
    done = {anchor, *inner, *(node for node, _, _ in outputs)}
    for node in inner:
        for user in node.users:
            if user not in done:
                raise NotFused(f"an intermediate ({node.name}) is read elsewhere ({user.name})")
    _replace(graph, choice, scores, values, [node for node, _, _ in outputs])


def find_choice(anchor: Node) -> Choice:
    """What a node that makes a bitmask chooses from, and how."""
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
    """`masks.base.keep_top`: the first n of a descending stable sort, scattered as ``arange(M) < n``."""
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


def find_coarse(scores: Scores, choice: Choice) -> Iterable[tuple[Node, Pooled, list[Node]]]:
    """Coarse outputs made of the scores: (node, what it sums, nodes in between)."""
    for softmax, masks in _softmaxes(scores, choice):
        weights, between = softmax, [softmax, *masks]
        if choice.allowed is not None:
            (weights, *rest) = [u for u in softmax.users if is_op(u, aten.masked_fill.Scalar)] or [softmax]
            if weights is softmax or rest:
                raise NotFused("its coarse softmax takes in tiles that may not be chosen")
            between.append(weights)
        for user in users(weights):
            if user is choice.anchor or user in choice.inner:
                continue
            read = next((n for n in user.all_input_nodes if n is weights or _reads(n, weights)), weights)
            values = weighted_sum(user, read)
            if values is None:
                raise NotFused(f"its coarse weights are read by something else ({user.name})")
            shape = shape_of(user)
            pooled = match_pooled(values, (shape[0], shape[1], shape_of(weights)[3], shape[3]))
            if pooled is None or pooled.factor != 1.0 or pooled.reduced is None:
                raise NotFused("the values of its coarse output are no mean over tiles")
            if not same(pooled.counts, scores.k.counts):
                raise NotFused("keys and values are pooled by different counts")
            yield user, pooled, [*between, *_between(weights, user)]


def _reads(node: Node, weights: Node) -> bool:
    while is_op(node, *COPIES, *CASTS):
        node = node.args[0]
    return node is weights


def _between(weights: Node, user: Node) -> list[Node]:
    found = []
    for node in user.all_input_nodes:
        if _reads(node, weights):
            while node is not weights:
                found.append(node)
                node = node.args[0]
    return found


def _softmaxes(scores: Scores, choice: Choice) -> Iterable[tuple[Node, list[Node]]]:
    """Softmaxes over the very scores that tiles are chosen from, with the nodes that mask them."""
    seen: set[Node] = set()
    stack = [scores.product]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or (user in choice.inner and not is_op(user, aten.softmax.int)):
                continue
            seen.add(user)
            if is_op(user, aten.softmax.int, aten._softmax.default):
                dtype = user.kwargs.get("dtype") or (*user.args, None, None)[2]
                known = is_op(user, aten._softmax.default) or (dtype or torch.float32) == torch.float32
                if user.args[1] not in (-1, 3) or not known:
                    raise NotFused("its softmax runs over another dimension, or in another precision")
                masks = _unmasked(user.args[0], choice)
                above = masks[-1].args[0] if masks else user.args[0]
                found = match_scores(above)
                if found is None or found.product is not scores.product:
                    raise NotFused("its softmax is not of the scores that tiles are chosen from")
                if abs(found.factor - scores.factor) > 1e-12 * scores.factor or found.bias != scores.bias:
                    raise NotFused("its softmax is of scores scaled otherwise than those that tiles are chosen from")
                scores.inner.extend(found.inner)
                yield user, masks
            elif is_op(user, *COPIES, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar) or (
                is_op(user, *CASTS) and keeps_precision(user)
            ):
                stack.append(user)


def _unmasked(node: Node, choice: Choice) -> list[Node]:
    """The nodes by which `ops.choice.masked_softmax` takes disallowed tiles out of a softmax."""
    if choice.allowed is None:
        return []
    if not is_op(node, aten.masked_fill.Scalar) or node.args[2] != float("-inf"):
        raise NotFused("its coarse softmax takes in tiles that may not be chosen")
    combined = node.args[1]
    mask = (
        combined.args[0]
        if is_op(combined, aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.logical_and.default)
        else None
    )
    if mask is None or not is_op(mask, aten.bitwise_not.default, aten.logical_not.default):
        raise NotFused("its coarse softmax is masked otherwise than its choice of tiles")
    if not same(_unexpanded(mask.args[0]), _allowed_mask(choice.allowed)):
        raise NotFused("its coarse softmax is masked otherwise than its choice of tiles")
    return [node]


def _unexpanded(node: Any) -> Any:
    while is_op(node, aten.expand.default, aten.unsqueeze.default):
        node = node.args[0]
    return node


def _allowed_mask(bits: Any) -> Any:
    """The bool mask that was packed into a bitmask."""
    if is_op(bits, operator.getitem) and is_op(bits.args[0], ops.pack_tiles.default):
        return _unexpanded(bits.args[0].args[0])
    return None


def _replace(graph: Graph, choice: Choice, scores: Scores, values: Pooled | None, outputs: list[Node]) -> None:
    anchor = choice.anchor
    first = min([anchor, *outputs], key=list(graph.nodes).index)
    with graph.inserting_before(first):
        make = _Maker(graph, anchor)
        q, q_counts = make.tokens(scores.q)
        k, kv_counts = make.tokens(scores.k)
        if values is not None and (scores.k.reduced is None) != (values.reduced is None):
            raise NotFused("its keys are pooled elsewhere, its values are not")
        v = None if values is None else make.tokens(values)[0]
        capacity = choice.capacity if choice.capacity is not None else make.size(scores.k.tokens, scores.k)
        arguments = (
            *(q, k, v, q_counts, kv_counts, choice.allowed, choice.now, choice.rule, choice.value),
            *(choice.min_tiles, capacity, scores.factor, scores.bias),
        )
        fused = make.call(ops.coarse_select.default, *arguments)
        coarse, *chosen = (make.call(operator.getitem, fused, index) for index in (0, 5, 6, 7))
        for node in outputs:
            result, dtype = coarse, value_of(node).dtype
            if dtype != value_of(coarse).dtype:
                result = make.call(aten.to.dtype, coarse, dtype)
            node.replace_all_uses_with(result)
    for user in list(anchor.users):
        user.replace_all_uses_with(chosen[user.args[1]])
        graph.erase_node(user)
    for node in reversed(list(graph.nodes)):
        pure = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if (
            (pure or node.target is operator.getitem)
            and not node.users
            and node.meta.get(CALL) == anchor.meta.get(CALL)
        ):
            graph.erase_node(node)


class _Maker:
    """Adds nodes with example values."""

    def __init__(self, graph: Graph, like: Node) -> None:
        self.graph, self.like = graph, like

    def call(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        mode = value_of(self.like.args[0]).fake_mode
        values = torch.fx.map_arg(args, lambda n: as_fake(mode, value_of(n)))
        with mode:
            node.meta = dict(self.like.meta, example_value=target(*values))
        return node

    def tokens(self, pooled: Pooled) -> tuple[Node, Node]:
        """Tokens ``[B, H, n, s, D]`` and counts of tiles; vectors pooled elsewhere as tiles of one token."""
        tokens = pooled.tokens
        if pooled.reduced is None:
            tokens = self.call(aten.unsqueeze.default, tokens, 3)
        elif pooled.reduced != 3:
            tokens = self.call(aten.movedim.int, tokens, pooled.reduced, 3)
        if pooled.counts is not None:
            return tokens, pooled.counts
        shape = shape_of(tokens)
        n = self.call(aten.sym_size.int, tokens, 2) if isinstance(shape[2], torch.SymInt) else shape[2]
        s = 1 if pooled.reduced is None else shape[3]
        if isinstance(s, torch.SymInt):
            raise NotFused("the slots of its tiles are not known when the graph is made")
        device = value_of(tokens).device
        node = self.graph.call_function(aten.full.default, ([n], s), {"dtype": torch.int32, "device": device})
        with value_of(tokens).fake_mode:
            example = torch.full([value_of(n)], s, dtype=torch.int32, device=device)
        node.meta = dict(self.like.meta, example_value=example)
        return tokens, node

    def size(self, tokens: Node, pooled: Pooled) -> Any:
        """M, the number of KV tiles."""
        dim = 2 if pooled.reduced is None or pooled.reduced > 2 else 3
        size = shape_of(tokens)[dim]
        return self.call(aten.sym_size.int, tokens, dim) if isinstance(size, torch.SymInt) else size
