"""Graphs to run passes on: traced as `UnfoldAttention` traces a coarse stage, or seen by LowerFlex on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from flexsparse.compile_passes import LowerFlex
from flexsparse.compile_passes.graphs import graph_modules
from flexsparse.compile_passes.unfold import CALL, _drop_dead

ops = torch.ops.flexsparse


def trace(function: Callable[..., Any], *inputs: Tensor, symbolic: Sequence[int | None] | None = None) -> GraphModule:
    """A function as a graph of aten nodes before autograd, as the part of a sparse call that is named ``"call"``.

    Args:
        symbolic: for each input the dimension whose size is a symbol, or None.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(x: Tensor, dim: int | None) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if d == dim else DimDynamic.STATIC for d in range(x.dim())]
        return mode.from_tensor(x.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    examples = [fake(x, dim) for x, dim in zip(inputs, symbolic or [None] * len(inputs), strict=True)]
    with mode:
        gm = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*examples)
    _drop_dead(gm.graph)
    gm.recompile()
    for node in gm.graph.nodes:
        node.meta[CALL] = "call"
    return gm


def nodes_of(gm: GraphModule, *targets: Any) -> list[Node]:
    """Nodes of a graph, and of those nested in it, that call one of the targets (packet or overload)."""
    return [n for m in graph_modules(gm) for n in m.graph.nodes if n.op == "call_function" and _is(n.target, targets)]


def _is(target: Any, targets: Sequence[Any]) -> bool:
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return any(target is each or packet is each for each in targets)


class Joint:
    """What `LowerFlex` met: for every joint graph its nodes' targets before and after, and its own findings."""

    def __init__(self) -> None:
        self.before: list[list[Any]] = []
        self.after: list[list[Any]] = []
        self.graphs: list[GraphModule] = []
        self.passes: list[LowerFlex] = []

    def count(self, target: Any, when: str = "after") -> int:
        """How many nodes of a target the last graph had."""
        return sum(_is(each, [target]) for each in getattr(self, when)[-1])


@contextmanager
def joint_graphs() -> Iterator[Joint]:
    """Record every graph that `LowerFlex` is given."""
    seen, original = Joint(), LowerFlex.__call__

    def targets(graph: Graph) -> list[Any]:
        owner = graph.owning_module
        return [n.target for m in graph_modules(owner) for n in m.graph.nodes if n.op == "call_function"]

    def call(self: LowerFlex, graph: Graph) -> None:
        seen.before.append(targets(graph))
        original(self, graph)
        seen.after.append(targets(graph))
        seen.graphs.append(graph.owning_module)
        seen.passes.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowerFlex, "__call__", call)
        yield seen
