"""FuseSelection: pooling, scores, coarse output and choice of tiles become one op, on the graph before autograd."""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from flexsparse.compile_passes import coarse_chain, graphs, tile_choice, views
from flexsparse.compile_passes.coarse_chain import Pooled, Scores, match_pooled, match_scores, weighted_sum
from flexsparse.compile_passes.graphs import as_fake, finish, graph_modules, value_of
from flexsparse.compile_passes.tile_choice import CHOICES, Choice, NotFused, find_choice, ops
from flexsparse.compile_passes.unfold import CALL
from flexsparse.compile_passes.views import CASTS, COPIES, TooLarge, aten, is_op, keeps_precision, same, shape_of, users


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
        modules = (sys.modules[__name__], tile_choice, coarse_chain, views, graphs)
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
                    if name is not None and not _packs_only(anchor) and not _is_static(anchor):
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


def _is_static(anchor: Node) -> bool:
    """Whether a node packs tiles that no scores have chosen: a static builder's, which a `Union` joins with chosen ones."""
    seen, left = set(), [anchor.args[0]]
    while left:
        node = left.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        value = value_of(node)
        if isinstance(value, Tensor) and value.is_floating_point():
            return False
        left += node.all_input_nodes
    return True


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
    if values is not None and (scores.k.reduced is None) != (values.reduced is None):
        raise NotFused("its keys are pooled elsewhere, its values are not")
    plain_means = [p for p in (scores.q, scores.k, values) if p and p.counts is None and p.reduced is not None]
    if any(isinstance(shape_of(pooled.tokens)[pooled.reduced], torch.SymInt) for pooled in plain_means):
        raise NotFused("the slots of its tiles are not known when the graph is made")
    _replace(graph, choice, scores, values, [node for node, _, _ in outputs])


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
            if pooled is None or abs(pooled.factor - 1) > 1e-12 or pooled.reduced is None:
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
