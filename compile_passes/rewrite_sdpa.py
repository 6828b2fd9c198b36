"""RewriteSDPA: self-attention over video tokens becomes sparse attention, on the Dynamo graph."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from flexsparse.compile_passes import marks, multi_head, nested, origins, sdpa_call, strides
from flexsparse.compile_passes.graphs import finish, graph_modules, remove, replace, say_source, value_of
from flexsparse.compile_passes.origins import from_different_tensors, key_mask
from flexsparse.compile_passes.sdpa_call import SDPA, SDPACall
from flexsparse.errors import RewriteError

Attend = Callable[..., Any]
Geometry = tuple[int, int, int, int, int]
Seen = Callable[[str, Any, Any, "Geometry | None", "str | None"], "dict[str, Any] | str"]


class RewriteSDPA:
    """Replace ``scaled_dot_product_attention`` of the video's tokens among themselves.

    Before::

        mark_grid(T, H, W, first, last)
        mark_gate(gate, fine_gate)                             # only where gates are used
        o = scaled_dot_product_attention(q, k, v, scale=s)     # S_q = S_kv = first + T*H*W + last

    After::

        o = attend(q, k, v, gate, (T, H, W, first, last), schedules, mask, fine_gate, scale=s)

    Everything else is left as it was: cross-attention (its queries and keys come from different tensors, whatever their
    lengths), token refiners, calls whose mask may hide video tokens, causal ones, dropout. Nested graphs (activation
    checkpointing) are walked; grid, gate and schedules become operands of them.

    Args:
        attend: the callable put into the graph; torch traces through it.
        seen: told of every call: ``seen(name, q, k, grid, reason)`` with example values, reason None for a call to
            rewrite; returns keyword arguments of ``attend`` (the backend's choice), or why the call stays dense after all.
        grid: the geometry (T, H, W, first, last), where it is given and not marked in the graph.
        min_tokens: fewest tokens of a call worth it.
        schedules: 0-d tensors that the builder reads; they enter the graph as buffers.
        gates: whether every sparse call must have a gate.

    Attributes:
        matches: calls rewritten by the last run.
        calls: calls met by the last run.
        marked: whether the last graph had a grid mark.
    """

    def __init__(
        self,
        attend: Attend,
        seen: Seen,
        *,
        grid: Geometry | None = None,
        min_tokens: int = 0,
        schedules: Sequence[torch.Tensor] = (),
        gates: bool = False,
        name_of: Callable[[Node], str] | None = None,
    ) -> None:
        self.attend, self.seen, self.grid, self.name_of = attend, seen, grid, name_of or call_name
        self.min_tokens, self.schedules, self.gates = min_tokens, tuple(schedules), gates
        self.matches = self.calls = 0
        self.marked = self.strided = False

    def uuid(self) -> str:
        """Hash of this pass's source and parameters, for caches of compiled graphs."""
        modules = (sys.modules[__name__], marks, multi_head, nested, origins, sdpa_call, strides)
        source = "".join(inspect.getsource(module) for module in modules)
        parameters = (self.grid, self.min_tokens, len(self.schedules), self.gates)
        return hashlib.sha256(f"{source}{parameters}{self.attend!r}".encode()).hexdigest()

    def __call__(self, gm: GraphModule) -> GraphModule:
        """Rewrite a graph in place; a graph without a match is left as it was, less its marks."""
        self.matches = self.calls = 0
        self.marked, self.strided = False, strides.are_read(gm)
        environment: dict[str, Any] = {}
        if self.grid is not None:
            environment["grid"] = self.grid
        if self.schedules:
            environment["schedules"] = self._buffers(gm)
        self._walk(gm, environment)
        finish(gm)
        return gm

    def _buffers(self, gm: GraphModule) -> tuple[Node, ...]:
        nodes = []
        for index, tensor in enumerate(self.schedules):
            name = f"flexsparse_schedule_{index}"
            gm.register_buffer(name, tensor)
            say_source(gm, name)
            with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
                node = gm.graph.get_attr(name)
            node.meta["example_value"] = tensor
            nodes.append(node)
        return tuple(nodes)

    def _walk(self, gm: GraphModule, environment: dict[str, Any]) -> None:
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if marks.is_mark(node.target, marks.GRID):
                environment["grid"] = tuple(node.args)
                self.marked = True
                gm.graph.erase_node(node)
            elif marks.is_mark(node.target, marks.GATE):
                if "gate" in environment:
                    raise RewriteError(
                        f"a gate before {call_name(node)} has no sparse attention to go to: give wrap(..., gates=[names]) with "
                        "the attention modules that become sparse"
                    )
                environment["gate"] = marks.gates_of(node)
                gm.graph.erase_node(node)
            elif node.target is SDPA:
                self._call(gm.graph, node, environment)
            elif node.target is multi_head.MULTI_HEAD:
                self._multi_head(gm.graph, node, environment)
            elif node.target in multi_head.FAST:
                x = value_of(node.args[0])
                self._leave(node, x, x, "it is torch's fast path: give torch.backends.mha.set_fastpath_enabled(False)")
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self._descend(gm, node, environment)

    def _descend(self, gm: GraphModule, node: Node, environment: dict[str, Any]) -> None:
        for sub, walked in nested.graphs_of(gm, node):
            if not _has_attention(sub):
                continue
            if not walked:
                for inner in _attention_nodes(sub):
                    call = SDPACall.of(inner.args, inner.kwargs)
                    q, k = value_of(call.query), value_of(call.key)
                    self._leave(inner, q, k, f"it is inside of {node.target.name()}")  # type: ignore[union-attr]
                continue
            inside = nested.lift(node, sub, environment)
            self._walk(sub, inside)
            finish(sub)
            if "gate" in environment and "gate" not in inside:
                environment.pop("gate")

    def _leave(self, node: Node, q: Any, k: Any, reason: str) -> None:
        self.calls += 1
        self.seen(self.name_of(node), q, k, None, reason)

    def _take(self, node: Node, q: Any, k: Any, environment: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The gates of a call that becomes sparse, and the backend's choice; None where it stays dense."""
        self.calls += 1
        name = self.name_of(node)
        choice = self.seen(name, q, k, tuple(value_of(size) for size in environment["grid"]), None)  # type: ignore[arg-type]
        if isinstance(choice, str):
            return None
        gates = environment.pop("gate", (None, None))
        if self.gates and gates[0] is None:
            raise RewriteError(
                f"gates are on, but {name} became sparse without one: its module is not among those of gates=, or was not "
                "recognised as self-attention; name it in wrap(..., gates=[names]), or leave it dense by dense_layers"
            )
        self.matches += 1
        return gates, choice

    def _call(self, graph: Graph, node: Node, environment: dict[str, Any]) -> None:
        call = SDPACall.of(node.args, node.kwargs)
        # a default of a function in between may be a symbol in a dynamic graph: asking whether it is zero guards it
        call = dataclasses.replace(call, dropout_p=value_of(call.dropout_p))
        q, k, v = (value_of(x) for x in (call.query, call.key, call.value))
        if "grid" not in environment:
            self._leave(node, q, k, "the graph does not say the grid")
            return
        T, H, W, first, last = (value_of(size) for size in environment["grid"])
        mask = key_mask(call.attn_mask)
        reason = call.stays_dense(
            q, k, v, first + T * H * W + last, self.min_tokens, None if mask is None else value_of(mask), first + last
        )
        if reason is None and from_different_tensors(call.query, call.key, call.value):
            reason = "queries and keys come from different tensors (cross-attention)"
        if reason is not None:
            self._leave(node, q, k, reason)
            return
        taken = self._take(node, q, k, environment)
        if taken is None:
            return
        (gate, fine_gate), choice = taken
        rest = (gate, environment["grid"], environment.get("schedules", ()), mask, fine_gate)
        arguments = (call.query, call.key, call.value, *rest)
        with graph.inserting_before(node):
            new = graph.call_function(self.attend, arguments, {"scale": _number(call.scale), **choice})
        new.meta = dict(node.meta)
        remove(node, strides.laid_as(new, value_of(node)) if self.strided else new)

    def _multi_head(self, graph: Graph, node: Node, environment: dict[str, Any]) -> None:
        call = multi_head.arguments_of(node.args, node.kwargs)
        query = value_of(call["query"])
        reason = multi_head.stays_dense(call)
        if reason is None and "grid" not in environment:
            reason = "the graph does not say the grid"
        if reason is None and query.dim() != 3:
            reason = f"its query has {query.dim()} dimensions, not [L, B, E]"
        if reason is not None:
            self._leave(node, query, value_of(call["key"]), reason)
            return
        q = multi_head.heads_of(query, call["num_heads"])
        T, H, W, first, last = (value_of(size) for size in environment["grid"])
        reason = SDPACall(q, q, q).stays_dense(q, q, q, first + T * H * W + last, self.min_tokens)
        if reason is not None:
            self._leave(node, q, q, reason)
            return
        taken = self._take(node, q, q, environment)
        if taken is None:
            return
        (gate, fine_gate), choice = taken
        attend = self.attend

        def flexsparse_multi_head(*args: Any, flexsparse: Any, **kwargs: Any) -> Any:
            def sdpa(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
                return attend(q, k, v, *flexsparse, scale=None, **choice)

            return multi_head.multi_head_with(sdpa)(*args, **kwargs)

        extra = {"flexsparse": (gate, environment["grid"], environment.get("schedules", ()), None, fine_gate)}
        with graph.inserting_before(node):
            new = graph.call_function(flexsparse_multi_head, node.args, {**node.kwargs, **extra})
        replace(node, new)


def _number(scale: Any) -> float | None:
    """A scale for ops. Where sizes are symbolic, torch makes an input of a module's float. The graph is for its value."""
    value = value_of(scale)
    return None if value is None else float(value)  # adds a guard


def _attention_nodes(gm: GraphModule) -> list[Node]:
    return [n for m in graph_modules(gm) for n in m.graph.nodes if n.op == "call_function" and n.target is SDPA]


def _has_attention(gm: GraphModule) -> bool:
    nodes = [n for m in graph_modules(gm) for n in m.graph.nodes]
    return any(n.target in (SDPA, multi_head.MULTI_HEAD) or marks.is_mark(n.target, marks.GATE) for n in nodes)


def call_name(node: Node) -> str:
    """The module path of a node, as far as the graph tells."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return clean_path(str(stack[-1][0])) if stack else "."


_NOISE = {"_modules", "__dict__", "__self__", "_flexsparse_forward", "L", "self", "module", "fn", "getattr"}


def clean_path(path: str) -> str:
    """Dynamo's source of a module to its path: ``L['module']._modules['blocks']._modules['0'].attn1`` to ``blocks.0.attn1``."""
    parts = re.split(r"[^0-9A-Za-z_]+", path)
    return ".".join(part for part in parts if part and part not in _NOISE) or "."
