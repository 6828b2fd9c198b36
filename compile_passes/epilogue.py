"""The gated coarse output that is added to the fine stage's, into `tile_attention` itself.

Shape letters: B batch, H query heads, N query tiles, R query rows, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from flexsparse.compile_passes.graphs import value_of
from flexsparse.compile_passes.views import CASTS, COPIES, aten, is_op, shape_of

_DETACHED = (aten.detach.default, aten.alias.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)


def find_epilogue(out: Node, rows: int) -> tuple[Node, Node, Node] | None:
    """What is added to a fine stage's output.

    Looks for ``out + gate * coarse``, the coarse output ``[B, H, N, D]`` repeated for the ``rows`` of its tile, as a graph
    in tile order has it (`keep_tiles`); in raster order it is gathered first.

    Args:
        out: output of the fine stage ``[B, H, R, D]``.
        rows: query rows of a tile.

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
    for gate, repeated in (product.args, product.args[::-1]):
        coarse = _repeated(repeated, rows)
        if coarse is not None and isinstance(gate, Node) and _sizes(gate) == _sizes(out):
            return total, coarse, gate
    return None


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
