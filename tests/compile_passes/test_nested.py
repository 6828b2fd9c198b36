"""Nodes passed into nested graphs: by several passes, and where several nodes run one graph."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule

from flexsparse.compile_passes import nested

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_an_operand_is_passed_once_to_each_node() -> None:
    sub = torch.fx.symbolic_trace(_double)
    outer = Graph()
    x, T, ratio = (outer.placeholder(name) for name in ("x", "T", "ratio"))
    attribute = outer.get_attr("sub")
    nodes = [outer.call_function(CHECKPOINT, (attribute, x)) for _ in range(2)]
    outer.output(tuple(nodes))
    gm = GraphModule({"sub": sub}, outer)
    for environment in ({"grid": (T, 4)}, {"grid": (T, 4), "schedules": (ratio,)}):  # two passes
        for node in nodes:
            ((found, walked),) = nested.graphs_of(gm, node)
            assert found is sub and walked
            inside = nested.lift(node, found, environment)
            assert inside["grid"][0].op == "placeholder" and inside["grid"][1] == 4
    assert [node.args for node in nodes] == [(attribute, x, T, ratio)] * 2
    assert [node.name for node in sub.graph.nodes if node.op == "placeholder"] == [
        "x",
        "flexsparse_grid_0",
        "flexsparse_schedules_0",
    ]


def test_other_operators_take_no_operands() -> None:
    outer = Graph()
    predicate, x = outer.placeholder("predicate"), outer.placeholder("x")
    branches = [outer.get_attr(name) for name in ("yes", "no")]
    node = outer.call_function(torch.ops.higher_order.cond, (predicate, *branches, (x,)))
    outer.output(node)
    gm = GraphModule({name: torch.fx.symbolic_trace(_double) for name in ("yes", "no")}, outer)
    assert [walked for _, walked in nested.graphs_of(gm, node)] == [False, False]
