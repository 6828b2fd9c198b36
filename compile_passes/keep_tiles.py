"""KeepTiles: tokens stay in tile order from one attention to the next."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from torch.fx import GraphModule, Node

from flexsparse.compile_passes import strides, token_dims
from flexsparse.compile_passes.graphs import finish, graph_modules, tables_of, value_of
from flexsparse.compile_passes.token_dims import memory_of, name_of, reads_form_only, shape_of, wants, written_by


class Parts(Protocol):
    """What the pass needs of a sparse call.

    Attributes:
        tables: ``(grid, device, order)`` to the index tensors of a layout.
        reorder: ``(x, dim, grid, tables, back)`` to x with the tokens of a dimension in tile order, or back.
        whole: ``(grid)`` to whether every tile is full, so that tile order has as many tokens.
    """

    tables: Callable[..., Any]
    reorder: Callable[..., Any]
    whole: Callable[..., bool]


class NotKept(Exception):
    """Why tokens of a graph cannot stay in tile order."""


class KeepTiles:
    """Move the way to tile order and back out of the attention calls, to where the tokens come from and go to.

    Before, each call reorders q, k, v and its output on its own::

        x = embed(...)
        x = x + project(attend(*heads(x), grid))            # in every block

    After, everything between treats every token alike, and the calls find them in tile order::

        x = reorder(embed(...))
        x = x + project(attend(*heads(x), grid, order="tiles"))
        ...
        y = reorder(unembed(x), back=True)

    Which ops treat tokens alike is in `token_dims`; where another reads or makes tokens, they are reordered. A graph
    stays as it was where that moves as many numbers as before, where tiles are not full, and where sizes are symbolic.

    Args:
        attend: target of the calls.
        parts: their parts.

    Attributes:
        matches: calls whose tokens the last run left in tile order.
        kept: their names.
        refused: why calls of the last run were left as they were, by name.
    """

    def __init__(self, attend: Callable[..., Any], parts: Parts) -> None:
        self.attend, self.parts = attend, parts
        self.matches = 0
        self.kept: list[str] = []
        self.refused: dict[str, str] = {}

    def uuid(self) -> str:
        """Hash of this pass's source and parameters, for caches of compiled graphs."""
        source = "".join(inspect.getsource(module) for module in (sys.modules[__name__], token_dims))
        return hashlib.sha256(f"{source}{self.parts!r}".encode()).hexdigest()

    def __call__(self, gm: GraphModule) -> GraphModule:
        """Rewrite a graph, and each graph nested in it by itself, in place."""
        self.matches, self.kept, self.refused = 0, [], {}
        for module in graph_modules(gm):
            calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target is self.attend]
            if not calls:
                continue
            try:
                self._keep(module, calls, nested=module is not gm)
            except NotKept as reason:
                self.refused |= {str(call.kwargs["name"]): str(reason) for call in calls}
                continue
            self.matches += len(calls)
            self.kept += [str(call.kwargs["name"]) for call in calls]
        return gm

    def _keep(self, gm: GraphModule, calls: list[Node], nested: bool) -> None:
        grid, *others = ([value_of(size) for size in call.args[4]] for call in calls)  # type: ignore[union-attr]
        if any(not isinstance(size, int) for sizes in (grid, *others) for size in sizes):
            raise NotKept("its sizes are symbolic")
        if any(other != grid for other in others):
            raise NotKept("its graph has calls on several grids")
        if any(grid[3:]):
            raise NotKept("text tokens are among them")
        if not self.parts.whole(grid):
            raise NotKept("its tiles are not all full")
        if strides.are_read(gm):
            raise NotKept("the graph reads tensors by their strides")
        region = find_region(gm, calls)
        saved = sum(_elements(x) for call in calls for x in (*call.args[:3], call))
        moved = sum(map(_elements, (*region.sources, *region.sinks)))
        if moved >= saved:
            raise NotKept("reordering tokens elsewhere would move as much")
        _rewrite(gm, calls, region, grid, self.parts, nested)


def _elements(node: Any) -> int:
    return math.prod(shape_of(node))


@dataclass
class Region:
    """Nodes whose tokens are in tile order, and where order changes.

    Attributes:
        calls: the attention calls.
        inside: dimension of the tokens, by node.
        sources: nodes outside whose tokens the region reads, with their dimension.
        sinks: nodes inside that are read in their own order, and by whom.
    """

    calls: list[Node]
    inside: dict[Node, int] = field(default_factory=dict)
    sources: dict[Node, int] = field(default_factory=dict)
    sinks: dict[Node, list[Node]] = field(default_factory=dict)

    def needs(self, node: Node, unknown: Any = MappingProxyType({})) -> Any:
        """What a node inside wants of its inputs (`token_dims.wants`); ``unknown`` where nobody knows."""
        if node in self.calls:
            read = zip((*node.args[:4], node.args[7]), (2, 2, 2, 1, 1))  # q, k, v and the gates
            return {x: dim for x, dim in read if x is not None}
        found = wants(node, self.inside[node])
        return unknown if found is None else found


def find_region(gm: GraphModule, calls: list[Node]) -> Region:
    """Everything above the calls, and below them, that treats every token alike.

    Raises:
        NotKept: an in-place write, or a tensor with tokens in two dimensions, stands in the way.
    """
    tokens = shape_of(calls[0])[2]
    region = Region(calls)
    _upwards(region, tokens)
    _settle_sources(region)
    _downwards(region, gm, tokens)
    read = set()
    for node in region.inside:
        needs = region.needs(node)
        read |= {x for x, dim in needs.items() if dim is not None}
        for x in node.all_input_nodes:  # where it is not known to be read like the rest, it is read in its own order
            if x in region.inside and needs.get(x) is None and not reads_form_only(node, x):
                region.sinks.setdefault(x, []).append(node)
        for user in node.users:
            if user not in region.inside and not reads_form_only(user, node):
                region.sinks.setdefault(node, []).append(user)
    region.sources = {x: dim for x, dim in region.sources.items() if x in read}
    written = {memory for node in gm.graph.nodes for x in written_by(node) for memory in memory_of(x)}
    for node in (*region.sources, *region.sinks):
        if not written.isdisjoint(memory_of(node)):
            raise NotKept(f"the graph writes in place to {node.name}, whose order would change")
    return region


def _upwards(region: Region, tokens: int) -> None:
    open_ = [(call, 2) for call in region.calls]
    while open_:
        node, dim = open_.pop()
        known = region.inside.get(node, region.sources.get(node))
        if known is not None:
            if known != dim:
                raise NotKept(f"{node.name} has tokens in two dimensions")
            continue
        if not is_setitem(node) and shape_of(node)[dim : dim + 1] != (tokens,):
            raise NotKept(f"{node.name} has sizes {shape_of(node)}, and not {tokens} tokens in dimension {dim}")
        region.inside[node] = dim
        needs = region.needs(node, unknown=None)
        if needs is None:
            if is_setitem(node):
                raise NotKept(f"{node.name} writes to some tokens only")
            region.sources[node] = region.inside.pop(node)
            continue
        open_ += [(x, at) for x, at in needs.items() if at is not None]
        open_ += [(user, dim) for user in node.users if is_setitem(user) and user.args[0] is node]


def _settle_sources(region: Region) -> None:
    """Reorder after ops that split a tensor or bring its tokens to the front, and not before."""
    open_ = list(region.sources)
    while open_:
        node = open_.pop()
        users = [user for user in node.users if user in region.inside]
        last = region.sources[node] == len(shape_of(node)) - 1
        turned = last and users and all(name_of(user) in ("transpose", "permute") for user in users)
        if turned or isinstance(value_of(node), list | tuple):
            del region.sources[node]
            for user in users:
                region.sources[user] = region.inside.pop(user)
                open_.append(user)


def _downwards(region: Region, gm: GraphModule, tokens: int) -> None:
    for node in gm.graph.nodes:
        if node in region.inside or node in region.sources or not any(x in region.inside for x in node.all_input_nodes):
            continue
        if is_setitem(node) or any(map(is_setitem, node.users)):
            continue
        for dim, size in enumerate(shape_of(node)):
            needs = wants(node, dim) if size == tokens else None
            if needs and all(_fits(region, node, x, needs.get(x)) for x in node.all_input_nodes):
                region.inside[node] = dim
                break


def _fits(region: Region, node: Node, x: Node, dim: int | None) -> bool:
    """Whether an input is, or is reordered anyway, as a node wants it."""
    if dim is None:
        return x not in region.inside or reads_form_only(node, x)
    return region.inside.get(x, region.sources.get(x)) == dim


def is_setitem(node: Node) -> bool:
    """Whether a node is ``x[index] = values``, which has no value of its own."""
    return name_of(node) == "setitem"


def _rewrite(gm: GraphModule, calls: list[Node], region: Region, grid: Any, parts: Parts, nested: bool) -> None:
    graph = gm.graph
    device = value_of(calls[0]).device
    nodes = list(graph.nodes)
    first = 1 + max((i for i, node in enumerate(nodes) if node.op == "placeholder"), default=-1)
    body, ahead = nodes[first], set(nodes[:first])
    with graph.inserting_before(body):  # a nested graph has no buffers
        tables = None if nested else tables_of(gm, parts, grid, device, "raster")

    def reorder(node: Node, dim: int, back: bool) -> Node:
        with graph.inserting_before(body) if node in ahead else graph.inserting_after(node):
            new = graph.call_function(parts.reorder, (node, dim, grid, tables, back))
        example = value_of(node)
        with example.fake_mode:
            new.meta = dict(node.meta, example_value=example.contiguous())
        return new

    for node, dim in region.sources.items():
        readers = [user for user in node.users if user in region.inside and region.needs(user).get(node) is not None]
        new = reorder(node, dim, back=False)
        for user in readers:
            user.replace_input_with(node, new)
    for node, readers in region.sinks.items():
        new = reorder(node, region.inside[node], back=True)
        for user in readers:
            user.replace_input_with(node, new)
    for call in calls:
        call.kwargs = {**call.kwargs, "order": "tiles"}
    finish(gm)
