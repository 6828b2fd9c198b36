"""The gated coarse output that is added to the fine stage's, into `tile_attention` itself, and its gradients out of it.

Shape letters: B batch, H query heads, N query tiles, R query rows, S tokens, D head dim.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse.compile_passes.gathers import ZEROS, added_to, is_zeros, plain, readers, restride, same_table, taken
from flexsparse.compile_passes.graphs import value_of
from flexsparse.compile_passes.views import CASTS, COPIES, aten, is_op, shape_of
from flexsparse.ops import tile_attention  # noqa: F401  # defines the op

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
BACKWARD = torch.ops.flexsparse.tile_attention_backward.default


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What is added to a fine stage's output, and where gradients of it are.

    Attributes:
        total: the sum.
        coarse: coarse output ``[B, H, N, D]``.
        gate: its factor, as the output.
        repeated: the coarse output as the gate is multiplied with it.
        rows: query rows of a tile.
        slots: where tokens are in raster order, the node of each token's slot, int32 ``[S]``.
        first: tiles of the first extra tokens.
        backward: the fine stage's backwards.
    """

    total: Node
    coarse: Node
    gate: Node
    repeated: Node
    rows: int
    slots: Node | None
    first: int
    backward: tuple[Any, ...]


def find_epilogue(out: Node, rows: int, slots: Node | None = None, first: int = 0) -> Epilogue | None:
    """What is added to a fine stage's output.

    Looks for ``out + gate * coarse``, the coarse output ``[B, H, N, D]`` repeated for the ``rows`` of its tile, as a graph
    in tile order has it (`keep_tiles`), or gathered for tokens in raster order (`fold_tiling`).

    Args:
        out: output of the fine stage ``[B, H, R, D]``.
        rows: query rows of a tile.
        slots: where tokens are in raster order, the node of each token's slot, int32 ``[S]``.
        first: tiles of the first extra tokens, which have no coarse output.

    Returns:
        None where anything reads ``out`` but the sum and `tile_attention_backward`; in float32 also where that does: it takes
        the output as it is, and would have to correct delta by a product more where a gate was added.
    """
    seen = list(readers(out))
    backward = [user for user in seen if user.target is BACKWARD and plain(user.args[5]) is out]
    others = [user for user in seen if user not in backward]
    if len(others) != 1 or any(each.args[7] is not None for each in backward):
        return None
    if backward and value_of(out).dtype not in (torch.bfloat16, torch.float16):
        return None
    (total,) = others
    if not is_op(total, aten.add.Tensor) or len(total.args) != 2 or total.kwargs:
        return None
    product: Any = next((x for x in total.args if x is not out), None)
    if not is_op(product, aten.mul.Tensor) or len(product.users) != 1:
        return None
    if _sizes(total) != _sizes(out) or value_of(total).stride() != value_of(out).stride():
        return None
    for gate, repeated in (product.args, product.args[::-1]):
        coarse = _coarse_of(repeated, rows, slots, first)
        if coarse is not None and isinstance(gate, Node) and _sizes(gate) == _sizes(out):
            return Epilogue(
                total=total,
                coarse=coarse,
                gate=gate,
                repeated=repeated,
                rows=rows,
                slots=slots,
                first=first,
                backward=tuple(dict.fromkeys(backward)),
            )
    return None


def combine(graph: Graph, out: Node, found: Epilogue | None) -> bool:
    """Let a `tile_attention` add its gated coarse output, and its backward give the gradients, where `find_epilogue` found it.

    The output that is saved for backward is then the sum, which the next linear map saves anyway; backward takes the coarse
    output and the gate to tell the fine stage's part of it.
    """
    node = out.args[0]
    if found is None or not isinstance(node, Node):
        return False
    place = {each: i for i, each in enumerate(graph.nodes)}
    if place[found.coarse] > place[node] or place[found.gate] > place[node]:
        return False
    counts: Any = node.args[6]
    if not _are(shape_of(found.coarse)[:3], shape_of(counts)):
        return False
    node.args = (*node.args[:3], found.coarse, found.gate, *node.args[5:])
    found.total.replace_all_uses_with(out)
    for each in found.backward:
        grad = plain(each.args[0])
        each.args = (*each.args[:7], found.coarse, found.gate, *each.args[9:])
        with value_of(grad).fake_mode:
            each.meta["val"] = each.target(*torch.fx.map_arg(each.args, value_of))
        _take_gradients(graph, each, grad, found)
    return True


def _take_gradients(graph: Graph, node: Any, grad: Node, found: Epilogue) -> None:
    """Put a backward's gradients of gate and coarse output in the place of those that the graph makes of the sum's gradient.

    A gradient that looks otherwise, or is read before it could be made, is left as it is.
    """
    for index, old in ((4, _gate_gradient(grad, found)), (3, _coarse_gradient(grad, found))):
        given = value_of(node)[index]
        if old is None or value_of(old).dtype != given.dtype or not _are(shape_of(old), given.shape):
            continue
        place = {each: i for i, each in enumerate(graph.nodes)}
        first = min((place[user] for user in old.users), default=len(place))
        latest = max(node.all_input_nodes, key=place.__getitem__)
        if place[latest] > first:
            continue
        if place[node] > first:
            after = [user for user in node.users if is_op(user, operator.getitem)]
            for each in (*reversed(after), node):
                latest.append(each)
        with graph.inserting_after(node):
            new = graph.call_function(operator.getitem, (node, index))
        new.meta = {key: item for key, item in node.meta.items() if key != "tensor_meta"}
        new.meta["val"] = given
        example = value_of(old)
        old.replace_all_uses_with(new)
        restride(graph, new, example)


def _gate_gradient(grad: Node, found: Epilogue) -> Node | None:
    """``grad * coarse`` of each token."""
    return _product(grad, found.repeated)


def _coarse_gradient(grad: Node, found: Epilogue) -> Node | None:
    """The sums of ``grad * gate`` over the rows of each tile, ``[B, H, N, D]``; extra tokens left out."""
    sizes = shape_of(found.coarse)
    node: Any = _product(grad, found.gate)
    if found.slots is not None:
        node = _reader(node)
        if not is_zeros(added_to(node, found.slots)):
            return None
    node = _reader(node)
    if not is_op(node, *_RESHAPES) or len(shape_of(node)) != 5 or not _are(shape_of(node)[3:], (found.rows, sizes[3])):
        return None
    node = _reader(node)
    if not is_op(node, aten.sum.dim_IntList) or list(node.args[1]) not in ([3], [-2]):
        return None
    if len(shape_of(node)) == 5:  # the dimension is kept
        node = _reader(node)
        if not is_op(node, aten.squeeze.dim, *_RESHAPES) or len(shape_of(node)) != 4:
            return None
    if not _are(shape_of(node), sizes):
        node = _reader(node)
        cut = is_op(node, aten.constant_pad_nd.default) and list(node.args[1][:3]) == [0, 0, -found.first]
        if not cut or not _are(shape_of(node), sizes):
            return None
    return node


def _reader(node: Any) -> Any:
    """The only reader of a node's values, casts and copies passed over; None where there are more."""
    users = [] if node is None else [user for user in node.users if not is_op(user, *ZEROS)]
    if len(users) != 1:
        return None
    return _reader(users[0]) if is_op(users[0], *CASTS, *COPIES) else users[0]


def _are(sizes: Any, expected: Any) -> bool:
    """Whether sizes are equal for every value of their symbols; asks for no guard."""
    return len(sizes) == len(expected) and all(statically_known_true(a == b) for a, b in zip(sizes, expected))


def _product(a: Node, b: Node) -> Node | None:
    """The one product of two nodes."""
    both = [x for x in readers(a) if is_op(x, aten.mul.Tensor) and {*map(plain, x.args)} == {plain(a), plain(b)}]
    return both[0] if len(both) == 1 else None


def _coarse_of(node: Any, rows: int, slots: Node | None, first: int) -> Node | None:
    """The tensor ``[B, H, N, D]`` of which a node has each token's row: that of its tile, zeros for the extra tokens'."""
    if slots is not None:
        while is_op(node, *CASTS, *COPIES):
            node = node.args[0]
        node, slot = taken(node)
        if node is None or not same_table(slot, slots):
            return None
    source: Any = _repeated(node, rows)
    if is_op(source, aten.constant_pad_nd.default, aten.pad.default):
        inner, around = source.args[:2]
        zero = all(x in (0, "constant") for x in source.args[2:])
        return inner if zero and list(around[:3]) == [0, 0, first] and len(around) == 4 else None
    return source if first == 0 else None


def _sizes(node: Node) -> tuple[Any, Any]:
    return value_of(node).shape, value_of(node).dtype


def _repeated(node: Any, rows: int) -> Node | None:
    """The tensor ``[B, H, N, D]`` whose rows stand ``rows`` times each in a node ``[B, H, N * rows, D]``."""
    found: list[Any] = []  # shapes on the way up
    while isinstance(node, Node):
        if is_op(node, *CASTS, *COPIES):
            node = node.args[0]
        elif len(found) < 3 and is_op(node, *_RESHAPES, aten.expand.default, aten.unsqueeze.default):
            found.append((node.target in _RESHAPES, node.target is aten.expand.default, shape_of(node)))
            node = node.args[0]
        else:
            break
    if not isinstance(node, Node) or len(shape_of(node)) != 4:
        return None
    B, H, N, D = shape_of(node)
    expected = [(True, False, (B, H, N * rows, D)), (False, True, (B, H, N, rows, D)), (False, False, (B, H, N, 1, D))]
    alike = len(found) == 3 and all(a[:2] == b[:2] and _are(a[2], b[2]) for a, b in zip(found, expected))
    return node if alike else None
