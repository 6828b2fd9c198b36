"""The coarse stage as people write it: what its pieces look like in a graph of aten nodes.

Every function looks at one node and what is above it, and returns what it stands for, or None. Shape letters: B batch,
H query heads, G KV heads, N query tiles, s slots of a tile, M KV tiles, D head dim.
"""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Node

from flexsparse.compile_passes.graphs import value_of
from flexsparse.compile_passes.views import (
    CASTS,
    COPIES,
    VIEWS,
    Chain,
    aten,
    broadcasts_to,
    climb,
    concrete,
    in_order,
    indices,
    is_op,
    same,
    same_everywhere,
    shape_of,
)

PRODUCTS = {aten.matmul.default, aten.bmm.default}


@dataclass
class Pooled:
    """A mean over tiles, ``[B, H', n, D]`` in the order of its tokens.

    Attributes:
        tokens: node of the tokens, or of vectors that were pooled otherwise.
        reduced: dimension of ``tokens`` that the mean runs over; None where ``tokens`` is pooled already.
        counts: node of the tiles' valid tokens, int ``[n]`` or ``[B, n]``; None for a plain mean.
        factor: positive number that the mean is multiplied with.
        heads: H'.
        inner: nodes that the fused op makes superfluous.
    """

    tokens: Node
    reduced: int | None
    counts: Node | None
    factor: float
    heads: Any
    inner: list[Node]


STORED = {operator.getitem, aten.masked_fill.Scalar, aten.index_select.default, aten.index.Tensor}


def match_pooled(node: Node, expect: tuple[Any, ...], transposed: bool = False) -> Pooled | None:
    """What a node pools, where it has the given sizes ``[B, H, n, D]`` (last two swapped where ``transposed``).

    Heads may be repeated for grouped queries, query head h reading ``h // (H / G)``.
    """
    chain = climb(node)
    root, inner, counts, factor = chain.root, list(chain.nodes), None, chain.factor
    if is_op(root, aten.div.Tensor) and isinstance(root.args[1], Node):
        divided = climb(root.args[0])
        if not is_op(divided.root, aten.sum.dim_IntList) or not in_order(divided):
            return None
        counts = match_counts(root.args[1], divided)
        if counts is None:
            return None
        inner += [root, *divided.nodes]
        factor *= divided.factor
        total = divided.root
    elif is_op(root, aten.mean.dim, aten.sum.dim_IntList):
        total = root
    else:
        return None
    tokens = total.args[0]
    dims = total.args[1]
    shape = shape_of(tokens)
    if not isinstance(dims, list | tuple) or len(dims) != 1 or len(shape) != 5:
        return None
    reduced = dims[0] % 5
    kept = [size for dim, size in enumerate(shape) if dim != reduced]

    def as_expected(whole: Tensor) -> Tensor:
        repeat = int(concrete(expect[1])) // max(1, int(concrete(kept[1])))
        wanted = whole.repeat_interleave(repeat, 1) if repeat > 1 else whole
        return wanted.transpose(-1, -2) if transposed else wanted

    if not chain.lays(kept, as_expected):
        return None
    if not _is_stored(tokens):  # a mean of something computed is one loop; its tokens would have to be stored first
        return Pooled(root, None, None, chain.factor, kept[1], list(chain.nodes))
    if is_op(root, aten.sum.dim_IntList):  # a sum that a number divides: so many times the mean
        if not isinstance(shape[reduced], int):
            return None
        factor *= shape[reduced]
    return Pooled(tokens, reduced, counts, factor, kept[1], [*inner, total])


def _is_stored(node: Any) -> bool:
    """Whether a node is a view of a tensor that is in memory anyway."""
    while is_op(node, *VIEWS, *COPIES, aten.narrow.default, aten.slice.Tensor, aten.select.int) or is_op(node, *CASTS):
        node = node.args[0]
    return isinstance(node, Node) and (
        node.op != "call_function" or node.target in STORED or not isinstance(node.target, torch._ops.OpOverload)
    )


def match_counts(node: Node, divided: Chain) -> Node | None:
    """The counts that a sum over tiles is divided by: int ``[n]`` or ``[B, n]``, at least 1, or made so."""
    chain = climb(node, factors=False)
    root = chain.root
    if is_op(root, aten.clamp_min.default, aten.clamp.default) and root.args[1] == 1 and len(root.args) == 2:
        above = climb(root.args[0], factors=False)
        counts, nodes = above.root, above.nodes + chain.nodes
    elif _at_least_one(root):
        counts, nodes = root, chain.nodes
    else:
        return None
    if value_of(counts).dtype not in (torch.int32, torch.int64) or value_of(counts).dim() not in (1, 2):
        return None
    B, _, n, *rest = shape_of(divided.nodes[-1] if divided.nodes else divided.root)
    if rest[:-1] not in ([], [1]):  # a mean that keeps its dimension is [B, H', n, 1, D]
        return None

    def check() -> bool:
        per_tile = indices(shape_of(counts))
        laid = Chain(counts, nodes).layout(per_tile)
        wanted = per_tile[:, None, :, None] if per_tile.dim() == 2 else per_tile[:, None]
        wanted = wanted.expand(int(concrete(B)), 1, int(concrete(n)), 1)
        return broadcasts_to(laid, wanted.unsqueeze(3) if len(rest) == 2 else wanted)

    return counts if same_everywhere(check) else None


def _at_least_one(node: Node) -> bool:
    """Whether counts come straight from a layout, whose tiles all hold a token."""
    while is_op(node, aten.narrow.default, aten.slice.Tensor):
        node = node.args[0]
    if node.op == "get_attr":  # the layout's table as a buffer
        counts = value_of(node)
        with unset_fake_temporarily():
            return not isinstance(counts, FakeTensor) and bool((counts >= 1).all())
    return is_op(node, torch.ops.flexsparse.tile_index.default) and "count" in node.args


@dataclass
class Scores:
    """Scores between tiles, ``[B, H, N, M]``.

    Attributes:
        q: pooled queries.
        k: pooled keys.
        factor: what their product is multiplied with.
        bias: whether ``log(max(count, 1))`` of a KV tile is added.
        product: node of the product; everything else of the coarse stage reads it.
        inner: nodes that the fused op makes superfluous.
    """

    q: Pooled
    k: Pooled
    factor: float
    bias: bool
    product: Node
    inner: list[Node]


def match_scores(node: Node) -> Scores | None:
    """What scores a node stands for."""
    chain = climb(node)
    root, bias, outer, below = chain.root, None, chain.factor, list(chain.nodes)
    if is_op(root, aten.add.Tensor) and len(root.args) == 2 and not root.kwargs:
        if outer != 1.0 or any(n.target in VIEWS for n in chain.nodes):
            return None
        bias = root.args[1]
        below.append(root)
        chain = climb(root.args[0])
        root, outer = chain.root, chain.factor
        below += chain.nodes
    operands = product_operands(root)
    if operands is None:
        return None
    left, right, transposed = operands
    shape = shape_of(root)
    if len(shape) != 4 or len(shape_of(left)) != 4 or len(shape_of(right)) != 4:
        return None
    if not in_order(chain):
        return None
    B, H, N, M = shape
    D = shape_of(left)[3]
    q = match_pooled(left, (B, H, N, D))
    k = match_pooled(right, (B, H, M, D), transposed=transposed)
    if q is None or k is None:
        return None
    if bias is not None and not (isinstance(bias, Node) and _is_log_count(bias, k.counts, M)):
        return None
    return Scores(q, k, outer * q.factor * k.factor, bias is not None, root, [*below, root, *q.inner, *k.inner])


def product_operands(node: Node) -> tuple[Node, Node, bool] | None:
    """Operands of ``q_c k_c^T``, and whether the second one stands transposed, ``[B, H, D, M]``."""
    if is_op(node, *PRODUCTS):
        return node.args[0], node.args[1], True
    if is_op(node, aten.einsum.default):
        left, right, out = _einsum_terms(node)
        if (
            len(left) == 4
            and left[:2] == right[:2] == out[:2]
            and left[3] == right[3]
            and out[2:] == left[2] + right[2]
        ):
            return (*node.args[1], False)
    return None


def weighted_sum(node: Node, weights: Node) -> Node | None:
    """The values that a node sums with the given weights ``[B, H, N, M]``, in the order ``[B, H, M, D]``."""
    if is_op(node, *PRODUCTS) and node.args[0] is weights:
        return node.args[1]
    if is_op(node, aten.einsum.default) and node.args[1][0] is weights:
        left, right, out = _einsum_terms(node)
        if left[:2] == right[:2] == out[:2] and left[3:] == right[2:3] and out[2:] == left[2] + right[3]:
            return node.args[1][1]
    return None


def _einsum_terms(node: Node) -> tuple[str, str, str]:
    """Letters of two operands and of the result, all of four dimensions; an ellipsis becomes letters that are free."""
    equation = str(node.args[0]).replace(" ", "")
    free = "".join(letter for letter in string.ascii_letters if letter not in equation)
    terms, _, out = equation.partition("->")
    left, _, right = terms.partition(",")
    left, right, out = (term.replace("...", free[: 4 - len(term.replace("...", ""))]) for term in (left, right, out))
    return left, right, out


def _is_log_count(node: Node, counts: Node | None, M: Any) -> bool:
    """Whether a node is ``log(max(counts, 1))`` of the KV tiles, broadcast over rows."""
    chain = climb(node, factors=False)
    if counts is None or not is_op(chain.root, aten.log.default):
        return False
    above = climb(chain.root.args[0], factors=False)
    if not (is_op(above.root, aten.clamp_min.default) and above.root.args[1] == 1):
        return False
    found = climb(above.root.args[0], factors=False)
    if not same(found.root, counts):
        return False

    def check() -> bool:
        per_tile = indices(shape_of(counts))
        laid = Chain(counts, [*found.nodes, *above.nodes, *chain.nodes]).layout(per_tile)
        wanted = per_tile if per_tile.dim() == 1 else per_tile[:, None, None]
        while laid.dim() > wanted.dim() and laid.shape[0] == 1:
            laid = laid[0]
        return broadcasts_to(laid, wanted)

    return same_everywhere(check)
