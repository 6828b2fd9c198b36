"""UnfoldAttention: a sparse attention call becomes its parts, and the coarse stage visible nodes of the graph."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from flexsparse.autocast import autocast_off
from flexsparse.compile_passes.graphs import (
    as_fake,
    constant,
    finish,
    is_attribute,
    remove,
    say_source,
    tables_of,
    value_of,
)

CALL = "flexsparse_call"
"""Key of ``node.meta``: the sparse call that a node of the coarse stage belongs to."""


class Parts(Protocol):
    """What a sparse attention call is made of; each is traced through, by this pass or by what follows it.

    Attributes:
        tables: ``(grid, device, order)`` to the index tensors of a grid that is known in numbers.
        index: the same, made in the graph.
        hide: ``(k, v, mask, grid)`` to k and v with what a key mask hides zeroed.
        tiles: ``(q, k, v, grid, tables, order)`` to q, k and v in tile order.
        plan: ``(q, k, tiles, grid, tables, order, ratios, mask, gated, scale, builder)`` to a list of tensors and sizes: the
            coarse stage.
        fine: ``(q, tiles, planned, gates, grid, tables, **choice)`` to the output: the fine stage and the combination.
    """

    tables: Callable[..., Any]
    index: Callable[..., Any]
    hide: Callable[..., Any]
    tiles: Callable[..., Any]
    plan: Callable[..., Any]
    fine: Callable[..., Any]


class UnfoldAttention:
    """Replace a sparse call by tiling, the coarse stage's own nodes, and the fine stage.

    Before::

        o = attend(q, k, v, gate, grid, schedules, mask, fine_gate, scale=s, backend=b)   # order="tiles" after KeepTiles

    After::

        k, v = parts.hide(k, v, mask, grid)     # where there is a mask; apart, so that all who read k and v read the same
        tiles = parts.tiles(q, k, v, grid, tables)     # tables: buffers, or made by the first call's parts.index
        ...                                     # aten nodes of parts.plan: pool, scores, select, softmax, coarse output
        o = parts.fine(q, tiles, planned, (gate, fine_gate), grid, tables, scale=s, backend=b)

    The coarse stage is traced before autograd and before composite functions fall apart: a softmax is one node. Calls
    inside of other functions (torch's own multi-head attention) stay as they are.

    Args:
        attend: target of the nodes to unfold.
        parts: their parts.

    Attributes:
        matches: calls unfolded by the last run.
    """

    def __init__(self, attend: Callable[..., Any], parts: Parts) -> None:
        self.attend, self.parts = attend, parts
        self.matches = 0
        self._tables: dict[Any, tuple[Node, ...]] = {}

    def uuid(self) -> str:
        """Hash of this pass's source and parameters, for caches of compiled graphs."""
        return hashlib.sha256(f"{inspect.getsource(sys.modules[__name__])}{self.parts!r}".encode()).hexdigest()

    def __call__(self, gm: GraphModule) -> GraphModule:
        """Unfold every call of a graph and of the graphs nested in it, in place."""
        self.matches = 0
        self._tables.clear()
        self._walk(gm, [], nested=False)
        for name, _ in gm.named_buffers(remove_duplicate=False):
            if "flexsparse_constant" in name:
                say_source(gm, name)
        return gm

    def _walk(self, gm: GraphModule, regions: list[Autocast], nested: bool) -> None:
        regions = list(regions)
        before = self.matches
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is torch.amp.autocast_mode._enter_autocast:
                regions.append(Autocast(*node.args[:3]))
            elif node.target is torch.amp.autocast_mode._exit_autocast:
                regions.pop()
            elif node.target is self.attend:
                self._unfold(gm, node, regions, nested)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                own = [Autocast(*node.args[:3])] if node.target.name() == "wrap_with_autocast" else []
                for argument in node.args:
                    sub = getattr(gm, str(argument.target), None) if is_attribute(argument) else None
                    if isinstance(sub, GraphModule):
                        self._walk(sub, regions + own, nested=True)
        if self.matches != before:
            finish(gm)

    def _unfold(self, gm: GraphModule, node: Node, regions: list[Autocast], nested: bool) -> None:
        q, k, v, gate, grid, ratios, mask, fine_gate = node.args
        choice = dict(node.kwargs)
        order = choice.setdefault("order", "raster")
        examples = [value_of(x) for x in (q, k, v)]
        sizes = tuple(value_of(size) for size in grid)
        dtype = _dtype_at(regions, examples[0])
        fake = examples[0].fake_mode
        device = examples[0].device
        with gm.graph.inserting_before(node):
            tables = (
                None if nested else tables_of(gm, self.parts, sizes, device, order)
            )  # a nested graph has no buffers
            if tables is None:
                tables = self._made(gm, node, grid, device, order, fake)
        table_examples = tuple(as_fake(fake, value_of(table)) for table in tables)
        with fake, autocast_off(device.type):
            # detached: what autograd saved here would count among the tensors that a checkpointed region saves
            examples = [x.detach().to(dtype) for x in examples]
            shown = examples
            mask_example = None if mask is None else value_of(mask)
            if mask is not None:
                shown = [examples[0], *self.parts.hide(*examples[1:], mask_example, sizes)]
            tile_examples = self.parts.tiles(*shown, sizes, table_examples, order)
        numbers = [as_fake(fake, value_of(ratio)) for ratio in ratios]

        def coarse_stage(q: Any, k: Any, tiles: Any, grid: Any, tables: Any, ratios: Any, mask: Any) -> list[Any]:
            rest = (gate is not None, choice["scale"], choice["builder"])
            return self.parts.plan(q, k, tiles, grid, tables, order, ratios, mask, *rest)

        with fake, _taking_tensors(fake):
            traced = make_fx(coarse_stage, pre_dispatch=True, _allow_non_fake_inputs=True)(
                *examples[:2], tile_examples, sizes, table_examples, numbers, mask_example
            )
        _drop_dead(traced.graph)
        graph = gm.graph
        with graph.inserting_before(node):
            if dtype != value_of(q).dtype:
                q, k, v = (graph.call_method("to", (x, dtype)) for x in (q, k, v))
                for x, example in zip((q, k, v), examples):
                    x.meta = dict(node.meta, example_value=example)
            if mask is not None:
                k, v = _called(graph, node, self.parts.hide, (k, v, mask, grid), tuple(shown[1:]))
            parts = _called(graph, node, self.parts.tiles, (q, k, v, grid, tables, order), tile_examples)
            operands = [q, k, *parts, *grid, *tables, *ratios, mask]
            planned = _inline(gm, traced, operands, {**node.meta, CALL: choice.get("name")})
            new = graph.call_function(
                self.parts.fine, (q, tuple(parts), planned, (gate, fine_gate), grid, tables), choice
            )
        new.meta = dict(node.meta)
        remove(node, new)
        self.matches += 1

    def _made(
        self, gm: GraphModule, node: Node, grid: Any, device: torch.device, order: str, fake: Any
    ) -> tuple[Node, ...]:
        """A layout's index tensors, made by a graph itself: once, as each op costs every trace milliseconds."""
        key = (gm, grid, device, order)
        if key not in self._tables:
            with fake:
                examples = self.parts.index(tuple(value_of(size) for size in grid), device, order)
            arguments = (grid, device, order)
            self._tables[key] = tuple(_called(gm.graph, node, self.parts.index, arguments, examples))
        return self._tables[key]


@contextlib.contextmanager
def _taking_tensors(fake: Any) -> Iterator[None]:
    """Tensors that a builder holds take part in a trace, and become constants of its graph."""
    before, fake.allow_non_fake_inputs = fake.allow_non_fake_inputs, True
    try:
        yield
    finally:
        fake.allow_non_fake_inputs = before


class Autocast(NamedTuple):
    """A region of a graph under autocast."""

    device: str
    dtype: torch.dtype | None
    enabled: bool


def _dtype_at(regions: list[Autocast], x: Any) -> torch.dtype:
    """The dtype in which attention sees ``x``: autocast, of the graph or around it, casts float32 and lower."""
    device = x.device.type
    own = [region for region in regions if region.device == device]
    enabled = own[-1].enabled if own else torch.is_autocast_enabled(device)
    low = (own[-1].dtype if own else None) or torch.get_autocast_dtype(device)
    return low if enabled and x.dtype != torch.float64 else x.dtype


def _called(graph: Graph, like: Node, function: Any, arguments: tuple[Any, ...], examples: Sequence[Any]) -> list[Node]:
    """Nodes of the results of a call of a function, with example values."""
    made = graph.call_function(function, arguments)
    made.meta = dict(like.meta, example_value=tuple(examples))
    found = []
    for index, example in enumerate(examples):
        found.append(graph.call_function(operator.getitem, (made, index)))
        found[-1].meta = dict(like.meta, example_value=example)
    return found


def _drop_dead(graph: Graph) -> None:
    """Remove what nothing uses; only calls of ops and sizes are known to have no effect."""

    def has_effect(node: Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        pure = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        return not (pure or node.op == "get_attr" or node.target is operator.getitem)

    graph.eliminate_dead_code(has_effect)


def _inline(gm: GraphModule, traced: GraphModule, operands: Sequence[Any], meta: dict[str, Any]) -> Any:
    """Copy a traced graph's nodes to the graph's insertion point; returns what it returns, in the graph's nodes."""
    graph, copies = gm.graph, {}
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(placeholders, operands, strict=True):
        copies[placeholder] = operand
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return torch.fx.map_arg(node.args[0], lambda n: copies[n])
        if node.op == "get_attr":
            copies[node] = constant(gm, getattr(traced, str(node.target)))
            continue
        copy = graph.node_copy(node, lambda n: copies[n])
        copy.meta = dict(meta, example_value=node.meta.get("val"))
        copies[node] = copy
    raise AssertionError("a graph without an output")
