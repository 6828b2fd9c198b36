"""`LayOutput`: on a GPU attention writes its output where the projection reads it, if that spares a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from as_on_gpu import run_templates
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import flexsparse as fs
from flexsparse.compile_passes import LayOutput
from flexsparse.compile_passes.gathers import plain

ops, aten = torch.ops.flexsparse, torch.ops.aten
LAYOUT = fs.TileLayout(grid=(2, 2, 5), tile=(2, 2, 4))
TOKENS, SLOTS, COUNTS = LAYOUT.tables("cpu")
B, H, S, D = 1, 2, LAYOUT.seq_len, 8
WEIGHT = torch.randn(H * D, 5)


@pytest.fixture(autouse=True)
def templates() -> Iterator[None]:
    """Ops run the templates, in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        run_templates(patch)
        yield


def heads_first(x: Tensor) -> Tensor:
    """Queries that a norm has written anew."""
    return x * 1.0


def as_models_have_them(x: Tensor) -> Tensor:
    """Queries that are a view of a linear map's result."""
    return (x.transpose(1, 2).contiguous() * 1.0).transpose(1, 2)


def project(out: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(B, S, -1) @ WEIGHT


def project_weighed(out: Tensor) -> Tensor:
    return project(out * out.sigmoid())


def stay(out: Tensor) -> Tensor:
    return out


def project_and_stay(out: Tensor) -> list[Tensor]:
    return [project(out), out]


def head_by_head(out: Tensor) -> Tensor:
    return out.flatten(0, 1) @ WEIGHT[:D]


def traced(
    queries: Callable[[Tensor], Tensor], after: Callable[..., Any], symbolic: bool = False
) -> tuple[GraphModule, Any]:
    """A graph of attention and its gradient, and what it is called with."""
    selection = fs.VSA(top_k=1).select(*(torch.randn(B, H, S, D) for _ in "qk"), LAYOUT)
    q, k, v = (torch.randn(B, H, S, D) for _ in "qkv")

    def function(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, counts: Tensor, tokens: Tensor) -> list[Tensor]:
        sizes = selection.operands()[3:]
        leaves = [x.detach().requires_grad_() for x in (queries(q), k, v)]
        with torch.enable_grad():
            out, _ = ops.tile_attention(*leaves, None, None, bits, counts, COUNTS, *sizes, 0.3, True, tokens, tokens)
            found = after(out)
            found = found if isinstance(found, list) else [found]
        return [*found, *torch.autograd.grad(sum(x.cos().sum() for x in found), leaves)]

    inputs = (q, k, v, selection.bits, selection.counts, TOKENS)
    if symbolic:
        return make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs), inputs
    with FakeTensorMode(allow_non_fake_inputs=True):
        gm = make_fx(function)(*inputs)
    return gm, inputs


def nodes_of(gm: GraphModule, op: Any) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target is op.default]


def check(gm: GraphModule, inputs: Any, copies: int) -> LayOutput:
    """Runs the pass: the same numbers, with so many copies fewer, and example values that are true."""
    expected, before = gm(*inputs), len(nodes_of(gm, aten.clone))
    run = LayOutput()
    run(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert before - len(nodes_of(gm, aten.clone)) == copies

    class Compare(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            found, told = super().run_node(n), n.meta.get("val")
            if isinstance(found, Tensor) and isinstance(told, Tensor) and n.op == "call_function":
                sizes = zip(found.shape, told.shape, found.stride(), told.stride(), strict=True)
                assert all(size == said and (size == 1 or one == other) for size, said, one, other in sizes), n
            return found

    for mine, other in zip(Compare(gm).run(*inputs), expected, strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride()
    return run


@pytest.mark.parametrize("symbolic", (False, True), ids=("", "symbolic sizes"))
@pytest.mark.parametrize("after", (project, project_weighed))
def test_the_projection_reads_what_attention_wrote(after: Any, symbolic: bool) -> None:
    gm, inputs = traced(heads_first, after, symbolic)
    (node,) = nodes_of(gm, ops.tile_attention)
    assert check(gm, inputs, 1).matches == 1 and node.args[-1] is True
    (backward,) = nodes_of(gm, ops.tile_attention_backward)
    assert plain(backward.args[5]) in node.users, "the one output that is kept"


@pytest.mark.parametrize(
    ("queries", "after"),
    [
        (as_models_have_them, project),
        (heads_first, stay),
        (heads_first, project_and_stay),
        (heads_first, head_by_head),
        (as_models_have_them, head_by_head),
    ],
)
def test_a_call_is_left_where_nothing_is_spared(queries: Any, after: Any) -> None:
    gm, inputs = traced(queries, after)
    (node,) = nodes_of(gm, ops.tile_attention)
    before = node.args
    assert check(gm, inputs, 0).matches == 0 and node.args == before


def test_on_a_cpu_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = traced(heads_first, project)
    monkeypatch.setattr("flexsparse.ops.on_gpu", lambda x: False)
    run = LayOutput()
    run(gm.graph)
    assert run.matches == 0


def test_recomputed_attention_is_laid_so_both_times() -> None:
    """Activation checkpointing has attention twice in the joint graph."""

    def twice(out: Tensor) -> list[Tensor]:
        return [project(out)]

    gm, inputs = traced(heads_first, twice)
    (node,) = nodes_of(gm, ops.tile_attention)
    with gm.graph.inserting_after(node):
        again = gm.graph.node_copy(node)
    again.meta = dict(node.meta)
    (out,) = [user for user in node.users if user.args[1] == 0]
    (permuted,) = [user for user in out.users if user.target is aten.transpose.int]
    with gm.graph.inserting_before(permuted):
        other = gm.graph.node_copy(out)
        other.meta = dict(out.meta)
    other.args = (again, 0)
    permuted.replace_input_with(out, other)
    gm.recompile()
    run = check(gm, inputs, 1)
    assert run.matches == 1 and again.args[-1] is True
