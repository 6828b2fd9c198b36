"""The gated coarse output that is added to the fine stage's, into `tile_attention` itself.

Shape letters: B batch, H query heads, N query tiles, R query rows, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from flexsparse.compile_passes.gathers import same_table, taken
from flexsparse.compile_passes.graphs import value_of
from flexsparse.compile_passes.views import CASTS, COPIES, aten, is_op, shape_of

_DETACHED = (aten.detach.default, aten.alias.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


def find_epilogue(out: Node, rows: int, slots: Node | None = None, first: int = 0) -> tuple[Node, Node, Node] | None:
    """What is added to a fine stage's output.

    Looks for ``out + gate * coarse``, the coarse output ``[B, H, N, D]`` repeated for the ``rows`` of its tile, as a graph
    in tile order has it (`keep_tiles`), or gathered for tokens in raster order (`fold_tiling`).

    Args:
        out: output of the fine stage ``[B, H, R, D]``.
        rows: query rows of a tile.
        slots: where tokens are in raster order, the node of each token's slot, int32 ``[S]``.
        first: tiles of the first extra tokens there, which have no coarse output.

    Returns:
        The sum, the coarse output and the gate; None where anything else reads ``out``, or where a backward needs it
        (float32: in low precision, `tile_attention_backward` reads no output).
    """
    detached = [user for user in out.users if is_op(user, *_DETACHED)]
    others = [user for user in out.users if user not in detached]
    if len(others) != 1 or (detached and value_of(out).dtype not in (torch.bfloat16, torch.float16)):
        return None
    (total,) = others
    if not is_op(total, aten.add.Tensor) or len(total.args) != 2 or total.kwargs:
        return None
    product: Any = next((x for x in total.args if x is not out), None)
    if not is_op(product, aten.mul.Tensor) or len(product.users) != 1:
        return None
    if _sizes(total) != _sizes(out) or value_of(total).stride() != value_of(out).stride():
        return None
    in_tiles, in_raster = partial(_repeated, rows=rows), partial(_of_tokens, rows=rows, slots=slots, first=first)
    coarse_of: Callable[[Any], Node | None] = in_tiles if slots is None else in_raster
    for gate, repeated in (product.args, product.args[::-1]):
        coarse = coarse_of(repeated)
        if coarse is not None and isinstance(gate, Node) and _sizes(gate) == _sizes(out):
            return total, coarse, gate
    return None


def combine(graph: Graph, out: Node, found: tuple[Node, Node, Node] | None) -> bool:
    """Give a `tile_attention` its coarse output and gate, where `find_epilogue` found them and they are made before it."""
    node = out.args[0]
    if found is None or not isinstance(node, Node):
        return False
    total, coarse, gate = found
    before = set()
    for earlier in graph.nodes:
        if earlier is node:
            break
        before.add(earlier)
    if coarse not in before or gate not in before:
        return False
    node.args = (*node.args[:3], coarse, gate, *node.args[5:])
    total.replace_all_uses_with(out)
    return True


def _of_tokens(node: Any, rows: int, slots: Node | None, first: int) -> Node | None:
    """The tensor ``[B, H, N, D]`` of whose rows, ``first`` rows of zeros before them, a node has for each token its tile's."""
    while is_op(node, *CASTS, *COPIES):
        node = node.args[0]
    source: Any
    source, tile = taken(node)
    floor = is_op(tile, aten.div.Tensor_mode) and tile.kwargs.get("rounding_mode") == "floor"
    if source is None or not (floor or is_op(tile, aten.floor_divide.default)):
        return None
    if tile.args[1] != rows or not same_table(tile.args[0], slots):
        return None
    while is_op(source, *CASTS, *COPIES):
        source = source.args[0]
    if is_op(source, aten.constant_pad_nd.default, aten.pad.default):
        inner, around = source.args[:2]
        zero = all(x in (0, "constant") for x in source.args[2:])
        return inner if zero and list(around[:3]) == [0, 0, first] and len(around) == 4 else None
    return source if first == 0 else None


def _sizes(node: Node) -> tuple[Any, Any]:
    return value_of(node).shape, value_of(node).dtype


def _repeated(node: Any, rows: int) -> Node | None:
    """The tensor ``[B, H, N, D]`` whose rows stand ``rows`` times each in a node ``[B, H, N * rows, D]``."""
    found = []  # shapes on the way up
    while isinstance(node, Node):
        if is_op(node, *CASTS, *COPIES):
            node = node.args[0]
        elif is_op(node, *_RESHAPES, aten.expand.default, aten.unsqueeze.default):
            found.append((node.target in _RESHAPES, node.target is aten.expand.default, shape_of(node)))
            node = node.args[0]
        else:
            break
    if not isinstance(node, Node) or len(shape_of(node)) != 4:
        return None
    B, H, N, D = shape_of(node)
    expected = [(True, False, (B, H, N * rows, D)), (False, True, (B, H, N, rows, D)), (False, False, (B, H, N, 1, D))]
    return node if found == expected else None
