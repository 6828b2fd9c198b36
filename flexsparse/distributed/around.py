"""The all-to-alls around the attention calls of a wrapped model whose tokens are spread over ranks.

Each self-attention call of a rank's own tokens becomes one of all tokens and some heads; what makes it sparse sees an ordinary
call. One that stays dense is spread as well: among a rank's own tokens it would be another attention.
Text that joins the video is whole on every rank: its queries, keys and values are taken by heads without travelling, and its
outputs go to every rank. So each rank's text has that rank's share of the gradient; the shares add up like any parameter's.
Shape letters: B batch, H query heads, L tokens of one rank, S tokens of all ranks, D head dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from flexsparse import naming
from flexsparse.autocast import autocast_dtype
from flexsparse.calls import Gates
from flexsparse.compile_passes import RewriteError, marks, multi_head, nested, origins
from flexsparse.compile_passes.graphs import finish, graph_modules, remove, value_of
from flexsparse.compile_passes.rewrite_sdpa import call_name
from flexsparse.compile_passes.sdpa_call import SDPA, SDPACall
from flexsparse.distributed.heads import Exchange, too_few_heads
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.same_inputs import check_same_inputs
from flexsparse.distributed.tokens import parts
from flexsparse.grids import Geometry
from flexsparse.intercept import of_samples
from flexsparse.layout import TileLayout
from flexsparse.ops.text_lengths import mask_shape
from flexsparse.text_masks import TextMask

LayoutOf = Callable[[Geometry], TileLayout]


class Around:
    """What a wrapped model's backend and interceptor call.

    Args:
        parallel: how tokens are spread.
        heads_of: from a call's name to how many query heads its builder is for; None where any number will do.
    """

    def __init__(self, parallel: SequenceParallel, heads_of: Callable[[str], int | None] = lambda name: None) -> None:
        self.parallel, self.heads_of, self.compared = parallel, heads_of, False

    def is_local(self, q: Any, k: Any, layout: TileLayout) -> bool:
        """Whether a call is attention of as many tokens as this rank holds, among themselves."""
        length = self.parallel.length(layout)
        return q.dim() == 4 and k.dim() == 4 and q.shape[2] == k.shape[2] == length

    def refuse(self, q: Any, k: Any, layout: TileLayout, name: str) -> None:
        """Raise a `RewriteError` for a call in which a rank's tokens would see no other rank's.

        Args:
            q: the query of a call that is neither spread nor attention to text, ``[..., tokens, D]``, or a fake of it.
            k: the key.
            layout: of all tokens.
            name: of the call.
        """
        ranks, length = self.parallel.ulysses, self.parallel.length(layout)
        if q.shape[-2] >= length or q.shape[-2] == parts(layout.num_tokens, ranks.size)[ranks.rank]:
            shapes = " and ".join(str(tuple(map(_number, x.shape))) for x in (q, k))
            raise RewriteError(
                f"{name} has queries and keys of shapes {shapes} while tokens are cut, which is neither attention of a rank's "
                f"{_number(length)} tokens among themselves, [B, H, L, D], nor to text alone, so that it cannot be spread over "
                "ranks: bring it to that form; declare text that joins the video (text_first=, text_last=, or a function as "
                "grid=); or run the model on one rank"
            )

    def same_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the model's first call, raise a `ValueError` on every rank where ranks were given different inputs."""
        if not self.compared:
            check_same_inputs(self.parallel.ulysses, module, args, kwargs)
            self.compared = True

    def enter(self, exchange: Exchange, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> list[Tensor | None]:
        """``[B, H, L, D]`` to ``[B, own heads, S, D]``, and gates ``[B, L, H * D]`` to ``[B, S, own heads * D]``.

        A gate of a rank's video tokens only leaves text as it is: 0 of the coarse output, 1 of the fine one.
        """
        dtype = autocast_dtype(q.device.type)
        if dtype is not None:  # attention would cast them: half of the bytes
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        full = [None if gate is None else self.of_all(gate, exchange, q, rest) for gate, rest in zip(gates, (0.0, 1.0))]
        heads = [None if gate is None else gate.unflatten(-1, (q.shape[1], -1)).transpose(1, 2) for gate in full]
        q, k, v, moved = exchange.to_heads(q, k, v, (heads[0], heads[1]))
        return [q, k, v, *(None if gate is None else gate.transpose(1, 2).flatten(2) for gate in moved)]

    def of_all(self, gate: Tensor, exchange: Exchange, q: Tensor, rest: float) -> Tensor:
        """A gate of all tokens of this rank."""
        first, *video, last = [segment.sizes[exchange.ranks.rank] for segment in exchange.segments]
        if gate.shape[1] == q.shape[2] or gate.shape[1] != sum(video):
            return gate
        return torch.nn.functional.pad(gate, (0, 0, first, last), value=rest)

    def check(self, call: SDPACall, mask: Any, layout: TileLayout, name: str) -> None:
        """Raise a `RewriteError` for a call whose mask or dropout says nothing of all tokens.

        Args:
            call: the call.
            mask: the key mask that stands for its mask, or a fake of it: of all tokens, or of this rank's.
            layout: of all tokens.
            name: of the call.
        """
        lengths = (layout.seq_len, self.parallel.length(layout))
        masked = call.attn_mask is not None and (mask is None or all(mask_shape(mask, n) for n in lengths))
        if masked or call.is_causal or call.dropout_p:
            raise RewriteError(
                f"{name} is attention of this rank's tokens with a mask over video tokens, causal or with dropout, which "
                "cannot be spread over ranks: leave them out, or run the model on one rank"
            )

    def check_heads(self, q: Any, name: str) -> None:
        """Raise a `RewriteError`, on every rank, where there are more ranks than query heads, or others than `PerHead` has."""
        heads = self.heads_of(name)
        if heads is not None and q.shape[1] != heads:  # a rank whose share is right would wait for the others
            raise RewriteError(
                f"PerHead heads has {heads} entries, but {name} has {q.shape[1]} heads: give one for each"
            )
        if q.shape[1] < self.parallel.ulysses.size:
            raise RewriteError(f"{name} {too_few_heads(q.shape[1], self.parallel.ulysses.size)}")

    def _layout_of(self, interceptor: Any, q: Tensor) -> TileLayout:
        """The layout of all tokens of a call; a model that runs each sample by itself leaves out the padding of its text."""
        geometry = interceptor.current_grid()
        T, H, W, first, last = geometry
        if interceptor.backend.ragged and q.dim() == 4:
            ranks = self.parallel.ulysses
            text = q.shape[2] - parts(T * H * W, ranks.size)[ranks.rank]
            if 0 <= text < first + last:
                geometry = (T, H, W, text, 0) if first else (T, H, W, 0, text)
        return interceptor.backend.layout_of(geometry)

    def intercepted(self, interceptor: Any, sdpa: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A scaled_dot_product_attention call of an uncompiled model.

        Args:
            interceptor: its ``local.gate`` are the gates of the call.
            sdpa: what computes a call of all tokens.
            args: of the call.
            kwargs: of the call.
        """
        call, local = SDPACall.of(args, kwargs), interceptor.local
        q, k, v = call.query, call.key, call.value
        layout = self._layout_of(interceptor, q)
        name = local.names[-1] if local.names else "the model"
        crosses = q.dim() == 4 and interceptor.crosses(q)
        if crosses or not self.is_local(q, k, layout):
            if local.cut and not crosses and not interceptor.reads_others(q, k):
                self.refuse(q, k, layout, name)
            return sdpa(*args, **kwargs)
        seen = None if call.attn_mask is None else local.masks.of(call.attn_mask)
        mask = None if seen is None else seen.keys
        self.check(call, mask, layout, name)
        if seen is not None and mask is not None and mask.shape[3] != layout.seq_len:
            reason = seen.stays_dense(layout)
            if reason is not None:
                raise RewriteError(f"{name} cannot be spread over ranks, as {reason}: run the model on one rank")
            mask = seen.text(layout).keys  # ranks hold the same text, and no video is hidden
        self.check_heads(q, name)
        exchange = self.parallel.exchange(q, k, layout)
        gates = local.gate
        these, others = of_samples(gates, q.shape[0]) if gates and interceptor.backend.ragged else (gates, None)
        q, k, v, *moved = self.enter(exchange, q, k, v, these or (None, None))  # type: ignore[assignment]
        own = None if gates is None else tuple(moved)
        local.gate = own
        out = sdpa(q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=call.enable_gqa)
        if own is not None:
            local.gate = gates if local.gate is own else others  # not used: the interceptor says so
        return exchange.to_tokens(out)

    def rewrite(self, gm: GraphModule, backend: Any, cut: bool = False, within: str = "") -> None:
        """Spread the calls of Dynamo's graph, before they become sparse.

        Before::

            mark_gate(gate, fine_gate)                         # only where gates are used
            o = scaled_dot_product_attention(q, k, v)          # L tokens

        After::

            q1, k1, v1, g1, f1 = enter(q, k, v, gate, fine_gate, grid)
            mark_gate(g1, f1)
            o1 = scaled_dot_product_attention(q1, k1, v1)      # S tokens; a key mask becomes one of them
            o = leave(o1, grid)

        The grid's sizes are operands, of nested graphs too: what is symbolic must not be closed over.

        Args:
            gm: the graph.
            backend: of the wrapped model.
            cut: whether tokens are cut where the graph starts; its marks say where that changes.
            within: the path of the module that runs the graph, where it is a region.
        """
        self._walk(gm, {"cut": [cut], "within": within}, backend.layout_of)

    def _walk(self, gm: GraphModule, environment: dict[str, Any], layout_of: LayoutOf) -> None:
        gate = None
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if marks.is_mark(node.target, marks.GRID):
                environment["grid"] = tuple(node.args)
            elif marks.is_mark(node.target, marks.CUT):
                environment["cut"][0] = node.args[1]  # a list: nested graphs come in between, and change it too
                remove(node, node.args[0])
            elif "grid" not in environment:
                continue  # a piece after a graph break: what comes next says so
            elif marks.is_mark(node.target, marks.GATE):
                gate = node
            elif node.target is multi_head.MULTI_HEAD:
                raise RewriteError(
                    "torch.nn.MultiheadAttention cannot be spread over ranks in a compiled model: give wrap(..., compile=False)"
                )
            elif node.target is SDPA:
                if self._call(gm, node, gate, environment, layout_of):
                    gate = None
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self._descend(gm, node, environment, layout_of)
        finish(gm)

    def _descend(self, gm: GraphModule, node: Node, environment: dict[str, Any], layout_of: LayoutOf) -> None:
        for sub, walked in nested.graphs_of(gm, node):
            if not any(_concerns(inner) for m in graph_modules(sub) for inner in m.graph.nodes):
                continue
            if walked:
                self._walk(sub, nested.lift(node, sub, environment), layout_of)
            elif any(isinstance(size, Node) for size in environment["grid"]):
                raise RewriteError(
                    f"attention is inside of {node.target.name()}, into which the sizes of a grid that changes cannot be "  # type: ignore[union-attr]
                    "passed, so that it cannot be spread over ranks: give wrap(..., dynamic=False), which compiles each "
                    "resolution by itself, or compile=False"
                )
            else:
                self._walk(sub, dict(environment), layout_of)

    def _call(
        self, gm: GraphModule, node: Node, gate: Node | None, environment: dict[str, Any], layout_of: LayoutOf
    ) -> bool:
        """Spread one call; False where it is not attention of this rank's tokens among themselves."""
        grid: Sequence[Any] = environment["grid"]
        call = SDPACall.of(node.args, node.kwargs)
        q, k = value_of(call.query), value_of(call.key)
        if any(free_unbacked_symbols(size) for x in (q, k) for size in x.shape):
            raise RewriteError(
                f"how many tokens {node.name} has depends on data (each sample by itself, without its padding), so "
                "that it cannot be spread over ranks in a compiled model: give wrap(..., compile=False)"
            )
        layout = layout_of(tuple(value_of(size) for size in grid))
        operands = (call.query, call.key, call.value)
        different = origins.from_different_tensors(*operands)
        if different or not self.is_local(q, k, layout):
            if environment["cut"][0] and not (different and not origins.share_tokens(*operands)):
                self.refuse(q, k, layout, call_name(node))
            return False
        mask = origins.key_mask(call.attn_mask)
        self.check(call, value_of(mask), layout, node.name)
        name = naming.name_of(node)
        self.check_heads(q, f"{environment['within']}.{name}" if environment["within"] else name)
        if mask is not None:
            mask = self._mask(gm, node, mask, grid, layout_of)
        self._spread(gm, node, call, mask, gate, grid, layout_of)
        return True

    def _mask(self, gm: GraphModule, node: Node, mask: Node, grid: Sequence[Any], layout_of: LayoutOf) -> Node:
        """A node of the key mask of all tokens."""
        like, layout = value_of(mask), layout_of(tuple(value_of(size) for size in grid))
        if like.shape[3] == layout.seq_len:
            return mask

        def flexsparse_whole_mask(mask: Tensor, grid: Geometry) -> Tensor:
            return TextMask.of(mask, layout_of(grid)).keys  # ranks hold the same text, and no video is hidden

        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(flexsparse_whole_mask, (mask, grid))
        with like.fake_mode:
            example = like.new_empty((like.shape[0], 1, 1, layout.seq_len), dtype=torch.bool)
        new.meta = dict(node.meta, example_value=example)
        return new

    def _spread(
        self,
        gm: GraphModule,
        node: Node,
        call: SDPACall,
        mask: Node | None,
        mark: Node | None,
        grid: Sequence[Any],
        layout_of: LayoutOf,
    ) -> None:
        q, k = value_of(call.query), value_of(call.key)
        tokens = layout_of(tuple(value_of(size) for size in grid)).seq_len
        parallel, enter = self.parallel, self.enter
        heads = parallel.heads(q, k)

        def flexsparse_enter(
            q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, fine_gate: Tensor | None, grid: Geometry
        ) -> Any:
            return enter(parallel.exchange(q, k, layout_of(grid)), q, k, v, (gate, fine_gate))

        def flexsparse_leave(x: Tensor, grid: Geometry) -> Tensor:
            return Exchange(parallel.segments(layout_of(grid))[1], parallel.ulysses, heads).to_tokens(x)

        me = parallel.ulysses.rank
        own, own_kv = (end - start for start, end in (heads.query(me), heads.kv(me)))
        kv = own_kv if heads.spread(me) is None else own
        B, _, _, D = q.shape
        dtype = autocast_dtype(q.device.type) or q.dtype
        gates = (None, None) if mark is None else marks.gates_of(mark)
        with q.fake_mode:
            examples: list[Any] = [
                q.new_empty((B, count, tokens, D), dtype=dtype, requires_grad=q.requires_grad)
                for count in (own, kv, kv)
            ]
            for gate in gates:
                like = None if gate is None else value_of(gate)
                wide = {"size": (B, tokens, own * D), "dtype": dtype}
                examples.append(None if like is None else like.new_empty(**wide, requires_grad=like.requires_grad))
        graph = gm.graph
        with graph.inserting_before(node):
            entered = graph.call_function(flexsparse_enter, (call.query, call.key, call.value, *gates, grid))
            entered.meta = dict(node.meta, example_value=tuple(examples))
            pieces: list[Any] = [None] * len(examples)
            for index, example in enumerate(examples):
                if example is not None:
                    pieces[index] = graph.call_function(operator.getitem, (entered, index))
                    pieces[index].meta = dict(node.meta, example_value=example)
            if mark is not None:
                graph.call_function(marks.GATE, tuple(pieces[3:])).meta = dict(node.meta)
            more = {} if mask is None else {"attn_mask": mask}
            attention = graph.call_function(
                SDPA, tuple(pieces[:3]), {**more, "scale": call.scale, "enable_gqa": call.enable_gqa}
            )
            attention.meta = dict(pieces[0].meta)
            left = graph.call_function(flexsparse_leave, (attention, grid))
        left.meta = dict(node.meta)
        remove(node, left)
        if mark is not None:
            graph.erase_node(mark)


def _concerns(node: Node) -> bool:
    """Whether a nested graph that has the node is to be walked."""
    return node.target in (SDPA, multi_head.MULTI_HEAD) or marks.is_mark(node.target, marks.CUT)


def _number(size: Any) -> int:
    """Of a symbolic size what it was when the graph was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
