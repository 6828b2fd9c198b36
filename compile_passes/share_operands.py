"""ShareOperands: what several ops of ours read is written to memory once."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse.compile_passes import gathers
from flexsparse.compile_passes.gathers import IDENTITIES, plain, readers, restride
from flexsparse.compile_passes.graphs import graph_modules, value_of
from flexsparse.compile_passes.views import CASTS, aten, is_op, shape_of

REALIZE = "inductor_realize_to_strides"
"""Key of ``node.meta``: Inductor writes the node to memory where it is made, in its traced strides."""

FLEX = torch.ops.higher_order.flex_attention
_MEMORY = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int)
_SAME = (*_MEMORY, *IDENTITIES, aten.t.default, aten.clone.default)
"""What computes nothing."""
_SPREAD = (*CASTS, aten.expand.default, aten.unsqueeze.default, aten.index_select.default, aten.index.Tensor)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


class ShareOperands(CustomGraphPass):
    """Have Inductor write the operands of ops of ours where they are made.

    Before, in the joint graph::

        q             = f(x)                                  # what Inductor fuses
        coarse, ..    = coarse_select(q.view(..), ..)
        o, lse        = tile_attention(q.permute(..), ..)

    To Inductor the two operands are views of something that is not in memory yet: it writes ``f(x)`` for each of them, once in
    the strides of each. After, the graph is the same, and ``q`` is marked: it is written once, and both operands are views
    of it.

    The same holds for what is added to a result on the way to a matrix product (the gradients of v of both stages; in float32
    the gated coarse output): unmarked, Inductor writes the sum head by head and copies it to where the product reads it. A sum
    lies in memory as its first term does, so the result becomes that.

    FlexAttention's operands on a CPU are marked, too: Inductor's kernel reads a head's channels one after another, and where it
    writes an operand itself (a contiguous copy of heads that lie innermost), its channels may lie otherwise, and are misread.

    Attributes:
        matches: nodes marked so far.
    """

    def __init__(self) -> None:
        self.matches = 0

    def uuid(self) -> str:
        """Hash of this pass's source, for caches of compiled graphs."""
        source = "".join(map(inspect.getsource, (sys.modules[__name__], gathers)))
        return hashlib.sha256(source.encode()).hexdigest()

    def __call__(self, graph: Graph) -> None:
        """Mark what is read and what results are added to, in place."""
        owner = graph.owning_module
        if owner is None:
            return
        for gm in graph_modules(owner) if owner.graph is graph else [owner]:
            for node in gm.graph.nodes:
                if node.target is FLEX:
                    for operand in node.args[:3]:
                        if value_of(operand).device.type == "cpu":
                            self._realize(operand)
                if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "flexsparse":
                    continue
                for operand in node.all_input_nodes:
                    self._mark(operand)
                for result in node.users:
                    for user in list(_combined(result)):
                        if any(is_op(x, *_PRODUCTS) for x in readers(user, _SAME)):
                            _put_first(gm.graph, user, result)
                            self._mark(user)

    def _mark(self, node: Any) -> None:
        base, view = plain(node), None
        while is_op(base, *_MEMORY) or _takes_all(base):
            base, view = plain(base.args[0]), base
        if not isinstance(base, Node) or not isinstance(base.target, torch._ops.OpOverload) or base.target.is_view:
            return  # an input, a result of another op, or a part of something
        # its first view as well: Inductor makes what is written in place (rotary embeddings) anew, and drops the mark
        for each in (base, view):
            self._realize(each)

    def _realize(self, node: Any) -> None:
        if node is not None and isinstance(value_of(node), torch.Tensor) and not node.meta.get(REALIZE):
            node.meta[REALIZE] = True
            self.matches += 1


def _combined(result: Node) -> Iterator[Any]:
    """The sums and products that a result of an op goes into, gates and rows of tiles passed on the way."""
    for user in result.users:
        if is_op(user, aten.add.Tensor, aten.mul.Tensor):
            yield user
        if is_op(user, *_SAME, *_SPREAD, aten.mul.Tensor):
            yield from _combined(user)


def _takes_all(node: Any) -> bool:
    sizes = zip(shape_of(node), shape_of(node.args[0])) if is_op(node, aten.slice.Tensor) else None
    return sizes is not None and all(statically_known_true(a == b) for a, b in sizes)


def _put_first(graph: Graph, node: Node, term: Node) -> None:
    """Let a sum lie in memory as one of its terms does."""
    if (
        not is_op(node, aten.add.Tensor)
        or len(node.args) != 2
        or node.kwargs
        or not all(isinstance(x, Node) for x in node.args)
    ):
        return
    other: Any = node.args[1]
    while is_op(other, *_SAME):
        other = other.args[0]
    if other is not term:
        return
    before = value_of(node)
    node.args = node.args[::-1]
    with before.fake_mode:
        node.meta["val"] = aten.add.Tensor(*map(value_of, node.args))
    node.meta.pop("tensor_meta", None)
    restride(graph, node, before)
