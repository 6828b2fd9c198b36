"""FoldTiling: the fine stage reads and writes tokens in raster order, and nobody brings them to tile order and back."""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from flexsparse.compile_passes import epilogue, gathers, views
from flexsparse.compile_passes.epilogue import combine, find_epilogue
from flexsparse.compile_passes.gathers import gather_instead, gathered, identities, plain, readers, restride, same_table
from flexsparse.compile_passes.graphs import finish, graph_modules, value_of
from flexsparse.compile_passes.lower_flex import CALL_NAME
from flexsparse.compile_passes.views import aten, drop_whole_slices, is_op
from flexsparse.ops import pack_rows, tile_attention, tile_tokens  # noqa: F401  # defines the ops
from flexsparse.packing import heads_inside

ops = torch.ops.flexsparse
FORWARD, BACKWARD, TILE = (
    ops.tile_attention.default,
    ops.tile_attention_backward.default,
    ops.tile_tokens.default,
)
PACK, UNPACK_GRADIENT = ops.pack_rows.default, ops.pack_rows_backward.default


class NotFolded(Exception):
    """Why the tokens of a call are brought to tile order."""


class FoldTiling(CustomGraphPass):
    """Give `tile_attention` and its backward tokens in raster order, with the tables that tiling would use.

    Before, in the joint graph after `LowerFlex`::

        q_t, k_t, v_t = tile_tokens([q, k, v], [tokens, tokens, tokens], ...)
        o_t, lse      = tile_attention(q_t, k_t, v_t, ..., None, None)
        o             = o_t[:, :, slots]
        ...
        do_t          = where(tokens < 0, 0, do[:, :, max(tokens, 0)])
        dq_t, dk_t, dv_t, .. = tile_attention_backward(do_t, .., q_t, k_t, v_t, o_t, lse, ..., None, None)
        dq, dk, dv    = tile_tokens([dq_t, dk_t, dv_t], [slots, slots, slots], ...)

    After::

        o, lse        = tile_attention(q, k, v, ..., tokens, tokens)
        ...
        dq, dk, dv, .. = tile_attention_backward(do, .., q, k, v, o, lse, ..., tokens, tokens)

    The log-sum-exp stays that of rows. Where the gated coarse output of each token is added to ``o`` at once, the op does that
    too (`epilogue`): that spares a pass that reads ``o`` and one that writes the sum.

    BSA's queries are packed from tiles (`pack_rows`), and its output unpacked to raster order: they are packed from raster
    order instead, and only keys and values are found by a table. The gradient of a gated coarse output that no op takes in (a
    fine gate, float32) is gathered, and not added at the slots of its tokens.

    A call is left as it was where anything else reads its tiles, its output in tile order or its gradients (a coarse stage
    that is not fused), where plain torch tiles, and where a kernel is chosen that takes no tables. A memory format that changes
    is followed down the graph.

    Args:
        supports: told ``(q, query rows, slots, whether there is a backward)``, says whether the kernels find rows by a table.

    Attributes:
        matches: (forward, backward) nodes changed so far.
        combined: forward nodes that took in the gated coarse output.
        folded: names of their calls.
        refused: why others were not, by name.
    """

    def __init__(self, supports: Callable[[Tensor, int, int, bool], bool] | None = None) -> None:
        self.supports = supports or kernels_find_rows
        self.matches, self.combined = (0, 0), 0
        self.folded: set[str] = set()
        self.refused: dict[str, str] = {}

    def uuid(self) -> str:
        """Hash of this pass's source and parameters, for caches of compiled graphs."""
        source = "".join(map(inspect.getsource, (sys.modules[__name__], gathers, epilogue, views)))
        return hashlib.sha256(f"{source}{inspect.getsource(self.supports)}".encode()).hexdigest()

    def __call__(self, graph: Graph) -> None:
        """Fold what can be folded, in place."""
        owner = graph.owning_module
        if owner is None:
            return
        for gm in graph_modules(owner) if owner.graph is graph else [owner]:
            self._fold_all(gm)

    def _fold_all(self, gm: GraphModule) -> None:
        changed = False
        calls = [n for n in gm.graph.nodes if n.target is FORWARD]
        if calls:
            drop_whole_slices(gm.graph)
        tables = _tables(gm.graph)
        for node in calls:
            name = str(node.meta.get(CALL_NAME, node.name))
            try:
                call = find_call(node, self.supports)
            except NotFolded as reason:
                self.refused[name] = str(reason)
                continue
            self.combined += fold(gm.graph, call)
            changed = True
            self.matches = (self.matches[0] + 1, self.matches[1] + len(call.backward))
            self.folded.add(name)
        # of a gated coarse output that no op took in
        changed = sum(gather_instead(gm.graph, slots, tokens) for slots, tokens in tables) > 0 or changed
        if changed:
            gm.graph.eliminate_dead_code()
            finish(gm)


def _tables(graph: Graph) -> list[tuple[Node, Node]]:
    """The slots of tokens and the tokens of slots of every layout that a graph knows."""
    found: list[tuple[Node, Node]] = []
    for node in graph.nodes:
        for pair in zip(node.args[2], node.args[1]) if node.target is TILE else ():
            if not any(same_table(pair[0], slots) for slots, _ in found):
                found.append(pair)
    return found


def kernels_find_rows(q: Tensor, rows: int, slots: int, gradients: bool) -> bool:
    """Whether all kernels of a case find rows by a table (`tuned.finds_rows`)."""
    from flexsparse.compile_passes.templates import tuned

    return tuned.finds_rows(q, rows, slots, gradients)


@dataclass
class Gradients:
    """One backward of a call.

    Attributes:
        node: `tile_attention_backward`.
        grad: the output's gradient in raster order; of packed queries as they are.
        results: for dq, dk and dv the nodes that are them in raster order.
        unpacked: nodes that bring the gradient of packed queries to tokens.
    """

    node: Any
    grad: Node
    results: list[list[Node]]
    unpacked: list[Any]


@dataclass
class Call:
    """What `fold` changes.

    Attributes:
        node: `tile_attention`.
        inputs: q, k and v in raster order.
        tables: the tokens of q's and of k's slots.
        slots: the slots of q's tokens.
        outputs: nodes that are the output in raster order.
        backward: its backwards.
        pack: what packs its queries, or None.
    """

    node: Any
    inputs: list[Node]
    tables: tuple[Node, Node]
    slots: Node
    outputs: list[Node]
    backward: list[Gradients]
    pack: Any


def find_call(node: Any, supports: Callable[..., bool]) -> Call:
    """The call of a `tile_attention` node whose tokens some `tile_tokens` brings to tile order.

    Raises:
        NotFolded: there is none, or something else reads what is in tile order.
    """
    given = [plain(x) for x in node.args[:3]]
    pack = given[0] if is_op(given[0], PACK) and given[0].args[5] is not None else None
    tiled = given if pack is None else [plain(pack.args[0]), *given[1:]]
    if not all(is_op(x, operator.getitem) and is_op(x.args[0], TILE) for x in tiled):
        raise NotFolded("its tokens come in tile order")
    example = value_of(given[0])
    rows, slots = node.args[8], node.args[13]
    if node.args[3] is not None or node.args[4] is not None:
        raise NotFolded("it takes in the coarse output in tile order")
    backward = [user for x in given for user in readers(x) if user is not node]
    if pack is not None:  # whose size stays
        backward = [user for user in backward if not (is_op(user, aten.sym_size.int) and plain(user.args[0]) is pack)]
    if not supports(example, rows, slots, bool(backward)):
        raise NotFolded("the kernel that is chosen for it reads tokens in tile order")
    inputs, tables, backs = [], [], []
    for x in tiled:
        made, index = x.args
        xs, of_slots, of_tokens = made.args[:3]
        inputs.append(xs[index])
        tables.append(of_slots[index])
        backs.append(of_tokens[index])
    if not same_table(tables[1], tables[2]):
        raise NotFolded("its keys and values have different tables")
    if any(user.target is not BACKWARD for user in backward):
        raise NotFolded("something else reads its tokens in tile order")
    if pack is not None and any(user is not pack for user in readers(tiled[0])):
        raise NotFolded("something else reads its queries in tile order")
    gradients = [_gradients(user, given, tables, backs, pack is not None) for user in dict.fromkeys(backward)]
    outputs = []
    for out in results_of(node, 0) if pack is None else ():
        for user in readers(out):
            if user.target is BACKWARD and plain(user.args[5]) is out:
                continue
            found = gathered(user, backs[0], padded=False)
            if found is None or plain(found) is not out:
                raise NotFolded(f"something else reads its output in tile order ({user.name})")
            outputs.append(user)
    return Call(node, inputs, (tables[0], tables[1]), backs[0], outputs, gradients, pack)


def _gradients(node: Any, given: list[Any], tables: list[Any], backs: list[Any], packed: bool) -> Gradients:
    if [plain(x) for x in node.args[2:5]] != given or node.args[7] is not None:
        raise NotFolded("something else reads its tokens in tile order")
    grad = node.args[0] if packed else gathered(node.args[0], tables[0], padded=True)
    if grad is None:
        raise NotFolded("the gradient of its output comes in tile order")
    results: list[list[Node]] = [[], [], []]
    unpacked: list[Any] = []
    for index, found in enumerate(results):
        made = results_of(node, index)
        if packed and index == 0:
            unpacked = [user for x in made for user in readers(x)]
            if len(unpacked) > 1 or any(not is_op(user, UNPACK_GRADIENT) or not user.args[5] for user in unpacked):
                raise NotFolded("something else reads the gradient of its queries")
            made = unpacked
        for x in made:
            for user in readers(x):
                places = [i for i, each in enumerate(user.args[0]) if plain(each) is x] if is_op(user, TILE) else []
                if not places or not all(
                    same_table(user.args[1][i], backs[index]) and same_table(user.args[2][i], tables[index])
                    for i in places
                ):
                    raise NotFolded(f"something else reads its gradients in tile order ({user.name})")
                found += [item for i in places for item in results_of(user, i)]
    return Gradients(node, grad, results, unpacked)


def fold(graph: Graph, call: Call) -> bool:
    """Let a call read and write raster order; whether it took in the gated coarse output."""
    node = call.node
    rows, first_rows = node.args[8:10]
    (q, k, v), pack = call.inputs, call.pack
    tables: tuple[Node | None, Node] = call.tables
    if pack is not None:
        inside = heads_inside(value_of(q))
        pack.args = (q, *pack.args[1:5], None, *pack.args[6:8], inside)
        q, tables = node.args[0], (None, tables[1])
    node.args = (q, k, v, *node.args[3:19], *tables)
    renew(node)
    if pack is None:
        for out in results_of(node, 0):
            _hand_on(graph, out, call.outputs)
    for each in call.backward:
        before = each.node.args
        each.node.args = (each.grad, before[1], before[2] if pack is not None else q, k, v, *before[5:22], *tables)
        renew(each.node)
        for user in each.unpacked:
            user.args = (*user.args[:5], False, inside)
            renew(user)
            _hand_on(graph, user, each.results[0])
        for index, found in enumerate(each.results):
            for x in () if pack is not None and index == 0 else results_of(each.node, index):
                _hand_on(graph, x, found)
    if pack is not None:
        return False
    outs = results_of(node, 0)
    if len(outs) != 1 or not isinstance(rows, int) or not isinstance(first_rows, int):
        return False
    return combine(graph, outs[0], find_epilogue(outs[0], rows, call.slots, first_rows // rows))


def _hand_on(graph: Graph, new: Node, old: list[Node]) -> None:
    """Let the readers of what was brought to raster order read what is in raster order."""
    for node in old:
        example = value_of(node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)  # nobody reads it, and it would look like a reader of the tiles
        restride(graph, new, example)


def renew(node: Any) -> None:
    """New example values of an op, of its results and of their identities."""
    values = torch.fx.map_arg(node.args, value_of)
    with value_of(node.args[2]).fake_mode:
        found = node.target(*values)
    one = isinstance(found, Tensor)
    results = [(node, found)] + [
        (user, found[user.args[1]]) for user in node.users if not one and is_op(user, operator.getitem)
    ]
    for result, value in results:
        for each in (result, *(identities(result) if isinstance(value, Tensor) else ())):
            each.meta["val"] = value  # one of those may be what is saved for backward
            each.meta.pop("tensor_meta", None)


def results_of(node: Node, index: int) -> list[Any]:
    """The nodes of one result of an op."""
    return [user for user in node.users if is_op(user, operator.getitem) and user.args[1] == index]
