"""LayOutput: the fine stage writes its output where the projection after attention reads it."""

from __future__ import annotations

import hashlib
import inspect
import sys
from typing import Any

from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from flexsparse import ops
from flexsparse.compile_passes import gathers
from flexsparse.compile_passes.fold_tiling import FORWARD, renew, results_of
from flexsparse.compile_passes.gathers import alike, spare_copies
from flexsparse.compile_passes.graphs import finish, graph_modules, value_of


class LayOutput(CustomGraphPass):
    """Have `tile_attention` write ``[B, S, H, D]`` where that spares a copy.

    Before, in the joint graph, of queries that lie head by head (after a norm or a rotary embedding that copies them)::

        o, lse = tile_attention(q, ...)                    # lies as q
        x      = o.transpose(1, 2).clone().view(B, S, -1)  # what the projection reads, and what is saved for its gradient

    After::

        o, lse = tile_attention(q, ..., token_major=True)
        x      = o.transpose(1, 2).view(B, S, -1)          # no copy: both gradients read the same memory

    A call is left as it is where nothing is spared, or where its memory format is that of a result of the graph.

    Attributes:
        matches: calls changed so far.
    """

    def __init__(self) -> None:
        self.matches = 0

    def uuid(self) -> str:
        """Hash of this pass's source, for caches of compiled graphs."""
        source = "".join(map(inspect.getsource, (sys.modules[__name__], gathers)))
        return hashlib.sha256(source.encode()).hexdigest()

    def __call__(self, graph: Graph) -> None:
        """Change what can be changed, in place."""
        owner = graph.owning_module
        if owner is None:
            return
        for gm in graph_modules(owner) if owner.graph is graph else [owner]:
            found = [n for n in gm.graph.nodes if n.target is FORWARD and ops.on_gpu(value_of(n)[0])]
            changed = sum(_lay(gm.graph, node) for node in found)
            if changed:
                self.matches += changed
                finish(gm)


def _lies_so(out: Tensor) -> bool:
    with out.fake_mode:  # type: ignore[attr-defined]
        return alike(out, ops.by_tokens(out))


def _lay(graph: Graph, node: Any) -> bool:
    """Let a call write the heads of a token side by side, if that spares a copy; whether it does."""
    outs, before = results_of(node, 0), node.args
    if len(outs) != 1 or _lies_so(value_of(outs[0])):
        return False
    node.args = (*before, *(None,) * (21 - len(before)), True)
    renew(node)
    if spare_copies(graph, outs[0]):
        return True
    node.args = before
    renew(node)
    return False
