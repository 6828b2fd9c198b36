"""`token_dims`: an op that it says treats tokens alike does; one that does not, it does not know."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from flexsparse.compile_passes.token_dims import index_dims, memory_of, name_of, shape_of, wants, written_by

B, S, H, D = 2, 6, 3, 8  # x is [B, S, H, D], its tokens are in dimension 1
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
W, ROW, TEXT = torch.randn(D, D), torch.randn(1, S, 1, D), torch.randn(B, H, 4, D)
Function = Callable[[Tensor], Any]


def graph_of(function: Function, x: Tensor) -> GraphModule:
    """Dynamo's graph of a function, before anything else."""
    seen: list[GraphModule] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(x)
    return seen[-1]


def rope(x: Tensor) -> Tensor:
    """As diffusers' Wan writes it: into an empty tensor."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * 0.6 - second * 0.8
    out[..., 1::2] = first * 0.8 + second * 0.6
    return out.type_as(x)


# what treats tokens alike, with the dimension of the tokens in its output
ALIKE: dict[str, tuple[Function, int]] = {
    "arithmetic": (lambda x: 1 - x * 2 / (x.abs() + 1) ** 2, 1),
    "broadcasting": (lambda x: x + x.mean((2, 3), keepdim=True), 1),
    "a table of all tokens alike": (lambda x: x * W[0] + torch.ones(B, 1, H, 1), 1),
    "activations": (lambda x: F.gelu(F.silu(x), approximate="tanh").sigmoid().tanh(), 1),
    "casts": (lambda x: x.to(torch.bfloat16).float().type_as(x).to(x), 1),
    "linear": (lambda x: F.linear(x.flatten(2), torch.ones(5, H * D), torch.ones(5)), 1),
    "matmul": (lambda x: x.flatten(2) @ torch.ones(H * D, 5), 1),
    "layer norm": (lambda x: F.layer_norm(x, (H, D)), 1),
    "rms norm": (lambda x: F.rms_norm(x, (D,), W[0]), 1),
    "softmax over heads": (lambda x: x.softmax(2), 1),
    "normalised": (lambda x: F.normalize(x, dim=-1), 1),
    "root mean square by hand": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 1),
    "reduced away": (lambda x: x.sum((0, 2)), 0),
    "maximum": (lambda x: x.amax(dim=0), 0),
    "transposed": (lambda x: x.transpose(1, 2), 2),
    "permuted": (lambda x: x.permute(0, 2, 3, 1), 3),
    "permuted by a list": (lambda x: torch.permute(x, [1, 0, 2, 3]), 0),
    "moved": (lambda x: x.movedim(1, -1).movedim(0, 2), 3),
    "flattened and split again": (lambda x: x.flatten(2).unflatten(2, (2, -1)).reshape(B, S, -1, 2), 1),
    "unsqueezed": (lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1), 1),
    "indexed": (lambda x: x[:, :, None, 0, 1:5:2][..., 0], 1),
    "indexed with an ellipsis": (lambda x: x[1, ..., 0::2], 0),
    "expanded": (lambda x: x[:, :, :1].expand(-1, -1, 7, -1), 1),
    "chunks": (lambda x: x.chunk(2, dim=-1)[1] * x.split([4, 4], 3)[0], 1),
    "unbound before": (lambda x: x.unbind(0)[1], 0),
    "unbound after": (lambda x: x.unbind(3)[1], 1),
    "joined": (lambda x: torch.cat([x, x * 2], dim=2), 1),
    "stacked before": (lambda x: torch.stack([x, x * 2]), 2),
    "stacked after": (lambda x: torch.stack([x, x * 2], -1), 1),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 2), 1),
    "cross-attention": (lambda x: F.scaled_dot_product_attention(x.transpose(1, 2), TEXT, TEXT), 2),
    "rotary embedding": (rope, 1),
    "no dropout": (lambda x: F.dropout(x, 0.5, training=False), 1),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x).masked_fill(x > 2, 0), 1),
}

# what does not
MIXES: dict[str, Function] = {
    "cumsum": lambda x: x.cumsum(1),
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "softmax over tokens": lambda x: x.softmax(1),
    "layer norm over tokens": lambda x: F.layer_norm(x.transpose(1, 3), (S,)).transpose(1, 3),
    "linear over tokens": lambda x: F.linear(x.transpose(1, 3), torch.ones(S, S)).transpose(1, 3),
    "matmul from the left": lambda x: torch.ones(B, H, S, S) @ x.transpose(1, 2),
    "half of the tokens": lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
    "every other token": lambda x: x[:, ::2],
    "one token": lambda x: x[:, :1] + torch.zeros(B, S, H, D),
    "a grid": lambda x: x.unflatten(1, (2, 3)).flatten(1, 2),
    "tokens and heads": lambda x: x.flatten(1, 2).unflatten(1, (S, H)),
    "convolution": lambda x: F.conv1d(x.flatten(2).mT, torch.ones(5, H * D, 3), padding=1),
    "self-attention": lambda x: F.scaled_dot_product_attention(
        x.transpose(1, 2), x.transpose(1, 2), TEXT[:, :, :1].expand(-1, -1, S, -1)
    ),
    "causal attention": lambda x: F.scaled_dot_product_attention(x.transpose(1, 2), TEXT, TEXT, is_causal=True),
    "attention with a mask for each": lambda x: F.scaled_dot_product_attention(
        x.transpose(1, 2), TEXT, TEXT, attn_mask=torch.ones(S, 4).tril()
    ),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "an activation in place": lambda x: F.silu(x * 1, inplace=True),
    "addition in place": lambda x: (x * 1).add_(1),
    "an index tensor": lambda x: x[:, torch.arange(S)],
    "sorted tokens": lambda x: x.sort(1).values,
}


def outputs(gm: GraphModule) -> Node:
    (out,) = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    return out


def reads_tokens(node: Node) -> bool:
    """Whether a node depends on the tokens."""
    return shape_of(node) == (B, S, H, D) or any(reads_tokens(x) for x in node.all_input_nodes)


def traced_back(gm: GraphModule, dim: int) -> dict[Node, int] | None:
    """From the output's dimension to those of the graph's inputs; None where a node is not known."""
    found: dict[Node, int] = {}
    open_, seen = [(outputs(gm), dim)], set()
    while open_:
        node, at = open_.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            found[node] = at
            continue
        needs = wants(node, at)
        if needs is None:
            return None
        if any(where is None and x.op != "placeholder" and reads_tokens(x) for x, where in needs.items()):
            return None  # it reads the tokens in an order of their own as well
        open_ += [(x, where) for x, where in needs.items() if where is not None]
        open_ += [(user, at) for user in node.users if user.name.startswith("setitem") and user.args[0] is node]
    return found


@pytest.mark.parametrize("name", ALIKE)
def test_what_treats_tokens_alike_is_known(name: str) -> None:
    function, dim = ALIKE[name]
    x = torch.randn(B, S, H, D)
    torch.testing.assert_close(function(x[:, ORDER]), function(x).index_select(dim, ORDER))  # the table is right
    gm = graph_of(function, x)
    back = traced_back(gm, dim)
    assert back is not None
    assert {at for node, at in back.items() if shape_of(node) == (B, S, H, D)} == {1}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_tokens_is_not_known(name: str) -> None:
    gm = graph_of(MIXES[name], torch.randn(B, S, H, D))
    for dim, size in enumerate(shape_of(outputs(gm))):
        back = traced_back(gm, dim)
        known = {at for node, at in (back or {}).items() if shape_of(node) == (B, S, H, D)}
        assert 1 not in known, f"{name}: dimension {dim} of size {size} is taken for the tokens"


def reordered(value: Any, dim: int, order: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(dim, order)
    return [reordered(each, dim, order) for each in value]


@pytest.mark.parametrize("name", [*ALIKE, *MIXES])
def test_every_claim_about_a_node_holds(name: str) -> None:
    """Each node of each graph, every dimension: inputs in another order where it wants them, the output in that order."""
    gm = graph_of(ALIKE[name][0] if name in ALIKE else MIXES[name], torch.randn(B, S, H, D))
    values: dict[Node, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(gm).run(*(torch.randn(shape_of(n)) for n in gm.graph.nodes if n.op == "placeholder"))
    written = {memory for node in gm.graph.nodes for x in written_by(node) for memory in memory_of(x)}
    checked = 0
    for node in gm.graph.nodes:
        touched = {memory for x in (node, *node.all_input_nodes) for memory in memory_of(x)} & written
        if node.op not in ("call_function", "call_method") or touched or name_of(node) == "empty_like":
            continue
        for dim, size in enumerate(shape_of(node)):
            needs = wants(node, dim)
            if not needs:
                continue
            order = torch.randperm(size)
            given = {x: values[x] if (at := needs.get(x)) is None else reordered(values[x], at, order) for x in values}
            args, kwargs = (torch.fx.map_arg(these, given.__getitem__) for these in (node.args, node.kwargs))
            call = getattr(args[0], node.target) if node.op == "call_method" else node.target
            result = call(*(args[1:] if node.op == "call_method" else args), **kwargs)
            torch.testing.assert_close(
                list(result) if isinstance(result, tuple) else result, reordered(values[node], dim, order)
            )
            checked += 1
    assert checked or name in MIXES


def test_an_index_says_which_dimensions_it_takes_whole() -> None:
    shape = (2, 3, 4, 5)
    assert index_dims((slice(None), 0), shape) == [0, 2, 3]
    assert index_dims((Ellipsis, None, slice(0, 5)), shape) == [0, 1, 2, None, 3]
    assert index_dims((slice(1, None), slice(None, 3, 1), slice(None, None, 2)), shape) == [None, 1, None, 3]
    assert index_dims(slice(0, 1), shape) == [None, 1, 2, 3]
    assert index_dims(torch.tensor([0]), shape) is None
    assert index_dims((slice(None), True), shape) is None  # a dimension more


def test_writes_are_known_by_their_names() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for name in ("add_", "__iadd__", "__setitem__", "copy_"):
        assert written_by(graph.call_method(name, (x, 1))) == [x]
    for target in (operator.iadd, operator.setitem, operator.imul):
        assert written_by(graph.call_function(target, (x, 1, 2))) == [x]
    assert written_by(graph.call_function(torch.add, (1, 2), {"out": x})) == [x]
    assert written_by(graph.call_function(F.silu, (x, True))) == [x]
    for node in (graph.call_method("__add__", (x, 1)), graph.call_function(operator.and_, (x, 1))):
        assert written_by(node) == []
    assert written_by(graph.call_function(F.silu, (x, False))) == [] == written_by(graph.call_method("add", (x, 1)))
