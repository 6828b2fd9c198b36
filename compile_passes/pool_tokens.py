"""PoolTokens: the coarse stage pools tokens where they lie, and not from tiles that were made for it."""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse.compile_passes.graphs import as_fake, finish, graph_modules, value_of
from flexsparse.compile_passes.views import aten, is_op, shape_of
from flexsparse.ops import coarse_select, prune_queries, tile_tokens  # noqa: F401  # defines the ops

SELECT, PRUNE = torch.ops.flexsparse.coarse_select.default, torch.ops.flexsparse.prune_queries.default


class Parts(Protocol):
    """What the pass needs of a sparse call.

    Attributes:
        tiles: as for `UnfoldAttention`.
        video_tables: ``(q, k, grid, tables)`` to the last arguments of `coarse_select`.
        video_starts: ``(grid)`` to the first video slots of queries and keys.
    """

    tiles: Callable[..., Any]
    video_tables: Callable[..., Any]
    video_starts: Callable[..., Any]


class PoolTokens:
    """Let `coarse_select` read q, k and v in raster order, by tables, and BSA's `prune_queries` its queries.

    Before, on Dynamo's graph after `FuseSelection`::

        q_t, k_t, v_t = tiles(q, k, v, grid, ...)
        coarse, ..    = coarse_select(video(q_t), video(k_t), video(v_t), ..., None, None, None, None)

    After::

        tables        = video_tables(q, k, grid, ...)
        coarse, ..    = coarse_select(q, k, v, ..., *tables)

    The tiles are left to the fine stage: once it reads by tables too (`FoldTiling`), nobody makes them. Gradients come in
    raster order, so that those of both stages are added there. Where plain torch brings tokens to tile order a graph stays as
    it was.

    Args:
        parts: of the calls.

    Attributes:
        matches: nodes changed by the last run.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.matches = 0

    def uuid(self) -> str:
        """Hash of this pass's source and parameters, for caches of compiled graphs."""
        return hashlib.sha256(f"{inspect.getsource(sys.modules[__name__])}{self.parts!r}".encode()).hexdigest()

    def __call__(self, gm: GraphModule) -> GraphModule:
        """Change every coarse stage of a graph and of the graphs nested in it, in place."""
        self.matches = 0
        for module in graph_modules(gm):
            before = self.matches
            for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target in (SELECT, PRUNE)]:
                self.matches += self._pool(module, node) if node.target is SELECT else self._prune(module, node)
            if self.matches != before:
                finish(module)
        return gm

    def _pool(self, gm: GraphModule, node: Any) -> bool:
        given = list(node.args[:3])
        pooled = self._tiled(given[0]) is None and _same(shape_of(given[0])[3], 1)  # by what chose the queries
        shown = {i: x for i, x in enumerate(given) if x is not None and not (pooled and i == 0)}
        tiles = self._readable(shown)
        if tiles is None:
            return False
        q, k, _, grid, tables, _ = tiles.args
        graph, fake = gm.graph, value_of(q).fake_mode
        arguments = (q, k, grid, tables)
        with graph.inserting_before(node), fake:
            made = graph.call_function(self.parts.video_tables, arguments)
            found = self.parts.video_tables(*torch.fx.map_arg(arguments, lambda n: as_fake(fake, value_of(n))))
            made.meta = dict(node.meta, example_value=found)
            items: list[Any] = []
            for index, value in enumerate(found):
                item = graph.call_function(operator.getitem, (made, index))
                item.meta = dict(node.meta, example_value=value)
                items.append(item)
        for i, x in shown.items():
            given[i] = _as_before(graph, node, tiles.args[i], x)
        if pooled:
            items[0] = items[2] = None
        node.args = (*given, *node.args[3:13], *items)
        return True

    def _prune(self, gm: GraphModule, node: Any) -> bool:
        tiles, slots = self._readable({0: node.args[0]}), shape_of(node.args[0])[3]
        if tiles is None or not isinstance(slots, int):
            return False
        node.args = (_as_before(gm.graph, node, tiles.args[0], node.args[0]), *node.args[1:12], slots)
        return True

    def _readable(self, shown: dict[int, Any]) -> Any:
        """The call of ``tiles`` all of whose results with these numbers nodes show, where tables can stand in for it."""
        found = [self._tiled(x) for x in shown.values()]
        tiles = found[0]
        if tiles is None or any(each is not tiles for each in found):
            return None
        q, _, _, grid, _, order = tiles.args
        if order != "raster" or not tile_tokens.in_one_kernel(value_of(q).device, value_of(q).dtype):
            return None
        first, keys = self.parts.video_starts([value_of(size) for size in grid])
        starts = (first, keys, keys)
        return tiles if all(_shows(_attached(x), i, starts[i]) for i, x in shown.items()) else None

    def _tiled(self, node: Any) -> Any:
        """The call of ``tiles`` of which a node shows a result, as tiles."""
        made = _result(_attached(node))
        return made.args[0] if made is not None and made.args[0].target is self.parts.tiles else None


def _attached(node: Any) -> Any:
    """What a node is, or is detached from."""
    return node.args[0] if is_op(node, aten.detach.default) else node


def _as_before(graph: Graph, reader: Node, x: Any, before: Any) -> Any:
    """What a reader is given in the place of a node: detached if that was."""
    if not is_op(before, aten.detach.default):
        return x
    with graph.inserting_before(reader), value_of(x).fake_mode:
        detached = graph.call_function(aten.detach.default, (x,))
        detached.meta = dict(reader.meta, example_value=value_of(x).detach())
    return detached


def _result(node: Any) -> Any:
    """The result of a call of which a node ``[B, H, n, s, D]`` is a view, or a part."""
    if not is_op(node, aten.unflatten.int, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return None
    above = node.args[0]
    above = above.args[0] if is_op(above, aten.narrow.default, aten.slice.Tensor) else above
    return above if is_op(above, operator.getitem) and isinstance(above.args[0], Node) else None


def _shows(node: Any, index: int, start: Any) -> bool:
    """Whether a node shows result ``index`` from slot ``start`` on, all other dimensions whole."""
    made, part = _result(node), node.args[0]
    B, H, n, s, D = shape_of(node)
    whole = value_of(made).shape
    if made.args[1] != index or not all(_same(a, b) for a, b in ((B, whole[0]), (H, whole[1]), (D, whole[3]))):
        return False
    if part is made:
        return _same(n * s, whole[2]) and _same(start, 0)
    end = part.args[3] if len(part.args) > 3 else sys.maxsize
    length = value_of(end) if is_op(part, aten.narrow.default) else value_of(end) - value_of(part.args[2])
    where = part.args[1] in (-2, 2) and _same(value_of(part.args[2]), start)
    return where and (_same(length, n * s) or value_of(end) == sys.maxsize)


def _same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))
