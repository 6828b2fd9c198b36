"""LowerFlex: FlexAttention under a tile mask becomes the tile attention templates, forward and backward."""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse.block_lists import tile_mask_mod
from flexsparse.compile_passes import epilogue, gathers
from flexsparse.compile_passes.epilogue import combine, find_epilogue
from flexsparse.compile_passes.graphs import finish, graph_modules, is_attribute
from flexsparse.ops.tile_attention import result_like, templates_refuse

FORWARD = torch.ops.higher_order.flex_attention
BACKWARD = torch.ops.higher_order.flex_attention_backward
LISTS = torch.ops.flexsparse.block_lists.default
LOG2E = 1.4426950408889634
CALL_NAME = "flexsparse_call"
"""Key of ``node.meta``: the sparse call that a `tile_attention` node computes."""


class NotLowered(Exception):
    """Why a FlexAttention node stays what it is."""


class LowerFlex(CustomGraphPass):
    """Replace ``flex_attention`` and ``flex_attention_backward`` whose mask is a tile list by ``tile_attention``.

    Before, in the joint graph of forward and backward::

        lists     = block_lists(bits, counts, ...)
        o, lse, _ = flex_attention(q, k, v, identity, (.., *lists, .., mask_mod), scale, options, (), lists[4:])
        dq, dk, dv, _ = flex_attention_backward(q, k, v, o, lse, do, dlse, ..., lists ...)

    After::

        o, lse    = tile_attention(q, k, v, None, None, bits, counts, ..., scale, True)
        dq, dk, dv, _, _ = tile_attention_backward(do, dlse, q, k, v, o, lse, None, None, bits, counts, ..., scale)

    Where the gated coarse output is added to ``o`` at once (`epilogue`), ``tile_attention(q, k, v, coarse, gate, ...)`` does
    that too, and its backward gives the gradients of both. FlexAttention's log-sum-exp is in base 2, the templates' natural.
    A node with a score_mod, with lists or a mask of another origin, or of a size, dtype or layout that the templates do not do
    stays stock FlexAttention.

    Args:
        supports: told ``(device, dtype, head dim, query rows, slots)``, says why the templates cannot do it, or None.

    Attributes:
        matches: (forward, backward) nodes replaced so far.
        combined: forward nodes that took in the gated coarse output.
        lowered: names of the calls that were replaced, and the backend whose code computes them: ``"triton"``, on CPU
            ``"gather"``.
        refused: why others were not, by name.
    """

    def __init__(self, supports: Callable[[str, torch.dtype, int, int, int], str | None] | None = None) -> None:
        self.supports = supports or templates_support
        self.matches, self.combined = (0, 0), 0
        self.lowered: dict[str, str] = {}
        self.refused: dict[str, str] = {}

    def uuid(self) -> str:
        """Hash of this pass's source and parameters, for caches of compiled graphs."""
        source = "".join(map(inspect.getsource, (sys.modules[__name__], epilogue, gathers, tile_mask_mod)))
        return hashlib.sha256(f"{source}{inspect.getsource(self.supports)}".encode()).hexdigest()

    def __call__(self, graph: Graph) -> None:
        """Replace what can be replaced, in place."""
        owner = graph.owning_module
        if owner is None:
            return
        for gm in graph_modules(owner) if owner.graph is graph else [owner]:
            lowered: list[Any] = []
            replaced = False
            for node in [n for n in gm.graph.nodes if n.target in (FORWARD, BACKWARD)]:
                forward, backward = self.matches
                on_cpu = node.args[0].meta["val"].device.type == "cpu"
                try:
                    lists = self._tile_lists(gm, node)
                    if node.target is FORWARD:
                        lowered.append(_lower_forward(gm.graph, node, lists))
                        self.matches = (forward + 1, backward)
                    else:
                        _lower_backward(gm.graph, node, lists)
                        self.matches = (forward, backward + 1)
                except NotLowered as reason:
                    self.refused[_call_of(node)] = str(reason)
                    continue
                self.lowered[str(lists.args[-1])] = "gather" if on_cpu else "triton"
                replaced = True
            for out in lowered:  # once it is known who reads them
                rows, first_rows = out.args[0].args[8:10]
                whole = isinstance(rows, int) and isinstance(first_rows, int)
                found = find_epilogue(out, rows, first=first_rows // rows) if whole else None
                self.combined += combine(gm.graph, out, found)
            if replaced:
                gm.graph.eliminate_dead_code()
                gm.delete_all_unused_submodules()  # an unused graph keeps the whole from being cached
                finish(gm)
        for name in self.refused:
            self.lowered.pop(name, None)

    def _tile_lists(self, gm: GraphModule, node: Node) -> Node:
        """The ``block_lists`` node that a FlexAttention node's mask is made of."""
        at = 3 if node.target is FORWARD else 7
        query, score, (mask, _, _, score_buffers, mask_buffers) = node.args[0], node.args[at], node.args[-5:]
        if score_buffers or not _is_identity(gm, score):
            raise NotLowered("it has a score_mod")
        lists = _source(mask[2])
        if lists is None or any(_source(mask[2 + i]) is not lists or _index(mask[2 + i]) != i for i in range(4)):
            raise NotLowered("its mask is no list of tiles made by flexsparse")
        if len(mask_buffers) != 2 or any(
            _source(b) is not lists or _index(b) != 4 + i for i, b in enumerate(mask_buffers)
        ):
            raise NotLowered("its mask_mod reads something else than the tiles")
        rows, slots = mask[-3], mask[-2]
        if (rows, slots) != (lists.args[3], lists.args[8]):
            raise NotLowered("its blocks are not the tiles")
        if not _is_tile_mask(gm, mask[-1], rows, slots):
            raise NotLowered("its mask_mod is not that of the tiles")
        example = query.meta["val"]
        reason = self.supports(example.device.type, example.dtype, example.shape[3], rows, slots)
        if reason is None and node.target is FORWARD and _stock_is_faster(node, example):
            reason = "in low precision, without gradients, stock FlexAttention is the faster one on CPU"
        if reason is not None:
            raise NotLowered(reason)
        results = node.meta["val"][:1] if node.target is FORWARD else node.meta["val"][:3]
        if not all(_lies_as(result, x.meta["val"]) for result, x in zip(results, node.args)):
            raise NotLowered("its result lies in memory otherwise than the templates'")
        return lists


def templates_support(device: str, dtype: torch.dtype, head_dim: int, rows: int, slots: int) -> str | None:
    """Why ``tile_attention`` cannot do a case on a device; None where it can."""
    if device == "cpu":
        return None
    if device != "cuda":
        return f"there are no templates for {device}"
    return templates_refuse(dtype, head_dim, rows, slots)


def _stock_is_faster(node: Node, query: Any) -> bool:
    """Whether FlexAttention's own CPU code is the better one; it has no backward, and no dynamic shapes."""
    needed = any(_index(user) == 1 and user.users for user in node.users)
    static = not any(isinstance(size, torch.SymInt) for size in query.shape)
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and static and not needed


def _lies_as(result: Tensor, x: Tensor) -> bool:
    """Whether a result has the strides that ``tile_attention`` gives one for the input x; those of size 1 do not count."""
    with x.fake_mode:  # type: ignore[attr-defined]
        told = result_like(x)
    strides = zip(result.shape, result.stride(), told.stride())
    return all((isinstance(n, int) and n == 1) or statically_known_true(a == b) for n, a, b in strides)


def _source(node: Any) -> Node | None:
    """The ``block_lists`` node that a node is a result of."""
    if isinstance(node, Node) and node.target is operator.getitem:
        above = node.args[0]
        return above if isinstance(above, Node) and above.target is LISTS else None
    return None


def _index(node: Any) -> int:
    return int(node.args[1])


def _call_of(node: Node) -> str:
    lists = _source(node.args[-5][2])
    return str(lists.args[-1]) if lists is not None else node.name


def _is_identity(gm: GraphModule, score: Any) -> bool:
    sub = getattr(gm, str(score.target), None) if is_attribute(score) else None
    if not isinstance(sub, GraphModule):
        return False
    first, *_, output = sub.graph.nodes
    result = output.args[0]
    return (result[0] if isinstance(result, list | tuple) else result) is first


def _is_tile_mask(gm: GraphModule, mask: Any, rows: int, slots: int) -> bool:
    """Whether a mask_mod graph computes `tile_mask_mod`: it is run on every position of a small random table."""
    sub = getattr(gm, str(mask.target), None) if is_attribute(mask) else None
    if not isinstance(sub, GraphModule) or len([n for n in sub.graph.nodes if n.op == "placeholder"]) != 6:
        return False
    with unset_fake_temporarily():
        generator = torch.Generator().manual_seed(0)
        B, H, N, M = 2, 2, 3, 4
        table = torch.rand(B, H, N, M, generator=generator, device="cpu") < 0.5
        counts = torch.randint(0, slots + 1, (B, M), generator=generator, dtype=torch.int32, device="cpu")
        b, h, q, kv = torch.meshgrid(
            *(torch.arange(n, device="cpu") for n in (B, H, N * rows, M * slots)), indexing="ij"
        )
        expected = tile_mask_mod(b, h, q, kv, table, counts, rows.bit_length() - 1, slots.bit_length() - 1)
        try:
            found: Any = torch.fx.Interpreter(sub).run(b, h, q, kv, table, counts)
        except Exception:  # whatever it is, it is no mask of tiles
            return False
        found = found[0] if isinstance(found, list | tuple) else found
        return isinstance(found, Tensor) and torch.equal(found, expected)


def _call(graph: Graph, like: Node, target: Any, *args: Any) -> Node:
    """A node with example value, tagged as ``like`` is (forward or backward, recomputed or not)."""
    node = graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda n: n.meta["val"])
    mode = like.args[0].meta["val"].fake_mode
    with mode:
        value = target(*values)
    node.meta = {key: item for key, item in like.meta.items() if key != "tensor_meta"}
    node.meta["val"] = value
    return node


def _lower_forward(graph: Graph, node: Node, lists: Node) -> Node:
    """Returns the new node's output."""
    q, k, v = node.args[:3]
    scale = node.args[5]
    results = {_index(user): user for user in node.users}
    wants_lse = 1 in results and bool(results[1].users)
    with graph.inserting_before(node):
        op = torch.ops.flexsparse.tile_attention.default
        new = _call(graph, node, op, q, k, v, None, None, *lists.args[:-1], scale, wants_lse)
        new.meta[CALL_NAME] = str(lists.args[-1])
        out = _call(graph, node, operator.getitem, new, 0)
        if wants_lse:
            natural = _call(graph, node, operator.getitem, new, 1)
            lse = _call(graph, node, torch.ops.aten.mul.Tensor, natural, LOG2E)
    _retag(results.get(0), out)
    if 0 in results:
        results[0].replace_all_uses_with(out)
    if wants_lse:
        results[1].replace_all_uses_with(lse)
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)
    return out


def _lower_backward(graph: Graph, node: Node, lists: Node) -> None:
    q, k, v, out, lse, grad, grad_lse = node.args[:7]
    scale = node.args[10]
    natural = _natural(lse)
    with graph.inserting_before(node):
        if isinstance(grad_lse, Node) and not _is_zero(grad_lse):
            d_lse: Any = _call(graph, node, torch.ops.aten.mul.Tensor, grad_lse, LOG2E)
        else:
            d_lse = None
        op = torch.ops.flexsparse.tile_attention_backward.default
        operands = (grad, d_lse, q, k, v, out, natural, None, None, *lists.args[:-1], scale)
        new = _call(graph, node, op, *operands)
        for user in list(node.users):
            if _index(user) < 3:
                part = _call(graph, node, operator.getitem, new, _index(user))
                _retag(user, part)
                user.replace_all_uses_with(part)
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)


def _retag(old: Node | None, new: Node) -> None:
    if old is not None:
        value = new.meta["val"]
        new.meta = {key: item for key, item in old.meta.items() if key != "tensor_meta"}
        new.meta["val"] = value


def _natural(lse: Any) -> Node:
    """The templates' log-sum-exp from which FlexAttention's was made for a lowered forward."""
    aten = torch.ops.aten
    while isinstance(lse, Node) and lse.target in (aten.detach.default, aten.alias.default):
        lse = lse.args[0]
    if isinstance(lse, Node) and lse.target is aten.mul.Tensor and lse.args[1] == LOG2E:
        natural = lse.args[0]
        if isinstance(natural, Node) and natural.target is operator.getitem:
            made = natural.args[0]
            if isinstance(made, Node) and made.target is torch.ops.flexsparse.tile_attention.default:
                return natural
    raise NotLowered("its forward was not lowered")


def _is_zero(node: Node) -> bool:
    """Whether a gradient is the zeros that autograd makes for an unused output."""
    aten = torch.ops.aten
    if node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    return node.target in (aten.full.default, aten.full_like.default) and node.args[1] == 0
