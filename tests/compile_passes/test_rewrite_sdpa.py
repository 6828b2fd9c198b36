"""`RewriteSDPA` alone: the graph before and after, what it leaves, its identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from flexsparse.compile_passes import RewriteSDPA
from flexsparse.compile_passes.rewrite_sdpa import clean_path
from flexsparse.compile_passes.sdpa_call import SDPA

GRID = (2, 8, 8, 0, 0)
W = torch.randn(3, 16, 16)


def capture(function: Any, *inputs: Tensor) -> list[GraphModule]:
    """Dynamo's graphs of a function."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return graphs


def attend(
    q: Tensor, k: Tensor, v: Tensor, gate: Any, grid: Any, ratios: Any, mask: Any, fine_gate: Any, *, scale: Any
) -> Tensor:
    return q


def make_pass(**changes: Any) -> tuple[RewriteSDPA, list[tuple[str, str | None]]]:
    seen: list[tuple[str, str | None]] = []

    def record(name: str, q: Any, k: Any, grid: Any, reason: str | None) -> dict[str, Any]:
        seen.append((name, reason))
        return {}

    return RewriteSDPA(attend, record, **{"grid": GRID, **changes}), seen


def count(gm: GraphModule, target: Any) -> int:
    modules = [m for m in gm.modules() if isinstance(m, GraphModule)]
    return sum(n.target is target for m in modules for n in m.graph.nodes)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def self_attention(x: Tensor) -> Tensor:
    q, k, v = (heads(x @ W[i]) for i in range(3))
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


def test_before_and_after() -> None:
    (gm,) = capture(self_attention, torch.randn(1, 128, 16))
    assert count(gm, SDPA) == 1
    rewrite, seen = make_pass()
    rewrite(gm)
    assert (count(gm, SDPA), count(gm, attend), rewrite.matches) == (0, 1, 1)
    node = next(n for n in gm.graph.nodes if n.target is attend)
    assert node.args[3:] == (None, GRID, (), None, None)
    assert node.kwargs == {"scale": 0.5}
    assert [reason for _, reason in seen] == [None]


def test_positional_and_keyword_calls_alike() -> None:
    def by_keyword(x: Tensor) -> Tensor:
        q, k, v = (heads(x @ W[i]) for i in range(3))
        return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False)

    (gm,) = capture(by_keyword, torch.randn(1, 128, 16))
    rewrite, _ = make_pass()
    rewrite(gm)
    assert rewrite.matches == 1


def test_what_is_left_alone() -> None:
    mask = torch.ones(128, 128, dtype=torch.bool)

    def others(x: Tensor, y: Tensor) -> Any:
        q, k, v = (heads(x @ W[i]) for i in range(3))
        other_k, other_v = heads(y @ W[1]), heads(y @ W[2])
        return (
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
            F.scaled_dot_product_attention(q, other_k, other_v),
            F.scaled_dot_product_attention(q[:, :, :64], k, v),
            F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]),
        )

    (gm,) = capture(others, torch.randn(1, 128, 16), torch.randn(1, 128, 16))
    before = gm.code
    rewrite, seen = make_pass()
    rewrite(gm)
    assert rewrite.matches == 0
    assert gm.code == before
    expected = ("mask", "causal", "dropout", "cross-attention", "64 queries and 128 keys", "3 dimensions")
    assert len(seen) == len(expected)
    assert all(reason is not None and part in reason for (_, reason), part in zip(seen, expected))


def test_a_mask_over_text_goes_along_and_other_masks_stay_dense() -> None:
    """A key mask, and a mask of the form that HunyuanVideo-1.5 makes of one: rows that see nothing are hidden tokens' own."""

    def joint(x: Tensor, keys: Tensor, pairs: Tensor) -> Any:
        q, k, v = (heads(x @ W[i]) for i in range(3))
        rows = keys.view(2, 1, 1, 132).repeat(1, 1, 132, 1)
        return tuple(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            for mask in (
                keys.view(2, 1, 1, 132),
                (rows & rows.transpose(2, 3)).bool(),
                rows,
                rows & pairs,
                rows.transpose(2, 3),
                keys.view(2, 1, 1, 132).expand(2, 2, 1, 132),
            )
        )

    keys = torch.ones(2, 132, dtype=torch.bool)
    (gm,) = capture(joint, torch.randn(2, 132, 16), keys, torch.ones(2, 1, 132, 132, dtype=torch.bool))
    rewrite, seen = make_pass(grid=(*GRID[:3], 0, 4))
    rewrite(gm)
    reasons = [reason for _, reason in seen]
    assert reasons[:3] == [None] * 3
    assert all("same for every query" in str(reason) for reason in reasons[3:5]) and "no key mask" in str(reasons[5])
    nodes = [n for n in gm.graph.nodes if n.target is attend]
    assert [tuple(n.args[6].meta["example_value"].shape) for n in nodes] == [(2, 1, 1, 132)] * 3


def test_a_call_that_is_told_to_stay_dense_does_and_keeps_no_gate_waiting() -> None:
    (gm,) = capture(self_attention, torch.randn(1, 128, 16))
    before = gm.code
    rewrite = RewriteSDPA(attend, lambda *_: "as asked", grid=GRID)
    rewrite(gm)
    assert (rewrite.matches, rewrite.calls, gm.code) == (0, 1, before)


def test_without_a_grid_nothing_matches() -> None:
    (gm,) = capture(self_attention, torch.randn(1, 128, 16))
    rewrite, seen = make_pass(grid=None)
    rewrite(gm)
    assert rewrite.matches == 0
    assert seen[0][1] == "the graph does not say the grid"


def test_checkpointed_attention_is_found_and_gets_the_schedules() -> None:
    """It lies in a nested graph: a pass over the outer graph alone would leave the model dense."""

    def model(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self_attention, x, use_reentrant=False)

    (gm,) = capture(model, torch.randn(1, 128, 16, requires_grad=True))
    ratio = torch.tensor(0.5, dtype=torch.float64)
    rewrite, _ = make_pass(schedules=[ratio])
    rewrite(gm)
    assert (count(gm, SDPA), count(gm, attend)) == (0, 1)
    nested = next(
        m for m in gm.modules() if isinstance(m, GraphModule) and any(n.target is attend for n in m.graph.nodes)
    )
    node = next(n for n in nested.graph.nodes if n.target is attend)
    (schedule,) = node.args[5]
    assert schedule.op == "placeholder"
    outer = next(n for n in gm.graph.nodes if n.op == "call_function" and "checkpoint" in str(n.target))
    assert outer.args[-1].op == "get_attr"
    assert dict(gm.named_buffers())[outer.args[-1].target] is ratio


def test_a_changed_parameter_changes_the_identity() -> None:
    base = make_pass()[0].uuid()
    assert base == make_pass()[0].uuid()
    changes = (
        {"grid": (2, 4, 16, 0, 0)},
        {"grid": (2, 8, 8, 0, 3)},
        {"min_tokens": 1},
        {"gates": True},
        {"schedules": [torch.tensor(0.5)]},
    )
    assert len({base, *(make_pass(**change)[0].uuid() for change in changes)}) == 1 + len(changes)


def test_module_paths_are_readable() -> None:
    assert clean_path("L['module']._modules['blocks']._modules['0'].attn1") == "blocks.0.attn1"
    assert clean_path("L['self'].blocks[3].attn1") == "blocks.3.attn1"
    assert clean_path("L['module']._flexsparse_forward.__self__") == "."


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Frequencies as a matrix product, as Hugging Face makes them."""
    angle = positions[:, None] @ (W[0, :1, :4] * 1.0)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def rotated_in_batches(x: Tensor, positions: Tensor) -> Tensor:
    """As `rotated`, of factors with as many dimensions as tokens have."""
    angle = (W[0, :4, :1][None] @ positions).mT
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def lora(x: Tensor, number: int) -> Tensor:
    """A linear map and a low-rank one of the dropped-out input."""
    return F.linear(x, W[number]) + F.linear(F.linear(F.dropout(x, 0.1), W[number, :4]), W[number, :, :4])


def conditioned(x: Tensor, condition: Tensor) -> Tensor:
    return x * (1 + F.linear(condition, W[0, :8]))[:, None, None]


def added(x: Tensor, number: int) -> Tensor:
    return heads(torch.addmm(W[0, 0], x, W[number])[None])


def joined(parts: tuple[Tensor, Tensor], number: int) -> Tensor:
    return heads(torch.cat([part @ W[number] for part in parts], 1))


def plain(x: Tensor, number: int) -> Tensor:
    return heads(x @ W[number])


Make = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def turned(rotate: Any) -> Callable[[bool], Make]:
    """q and k of a sequence each, or of one, with something multiplied into both, and values without."""

    def of(crosses: bool) -> Make:
        def make(x: Tensor, y: Tensor, how: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            other = y if crosses else x
            return rotate(plain(x, 0), how), rotate(plain(other, 1), how), plain(other, 2)

        return make

    return of


def mapped(linear: Any, pick: Any = lambda x: x) -> Callable[[bool], Make]:
    """q, k and v by one kind of map."""

    def of(crosses: bool) -> Make:
        def make(x: Tensor, y: Tensor, how: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            one = pick(x)
            other = pick(y) if crosses else one
            return linear(one, 0), linear(other, 1), linear(other, 2)

        return make

    return of


def normed(x: Tensor, number: int) -> Tensor:
    """Norms of their own for queries, keys and values; the first one written out, modulated and with a table of positions."""
    if number:
        return plain(F.layer_norm(x, (16,), W[number, 0]), number)
    x = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return plain(x * (1 + W[0, :1]) + W[1, 0] + torch.arange(128.0)[:, None], number)


def low_rank(x: Tensor, number: int) -> Tensor:
    """Multi-head latent attention: a norm between two maps."""
    return plain(F.rms_norm(x @ W[number].mT, (16,)), number)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :64], x[:, 64:]


POSITIONS, CONDITION = torch.arange(128.0), torch.randn(1, 16)
ORIGINS: dict[str, tuple[Callable[[bool], Make], Tensor]] = {
    "rotation": (turned(rotated), POSITIONS),
    "batched rotation": (turned(rotated_in_batches), POSITIONS[None, None]),
    "condition": (turned(conditioned), CONDITION),
    "LoRA": (mapped(lambda x, number: heads(lora(x, number))), POSITIONS),
    "addmm of one bias": (mapped(added, lambda x: x[0]), POSITIONS),
    "norms of their own": (mapped(normed), POSITIONS),
    "low rank": (mapped(low_rank), POSITIONS),
    "halves joined": (mapped(joined, halves), POSITIONS),
}


def found_crossing(make: Make, how: Tensor) -> bool:
    def attention(x: Tensor, y: Tensor, how: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*make(x, y, how))

    (gm,) = capture(attention, *torch.randn(2, 1, 128, 16), how)
    rewrite, seen = make_pass()
    rewrite(gm)
    ((_, reason),) = seen
    assert rewrite.matches == (reason is None)
    return reason is not None and "cross-attention" in reason


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("name", ORIGINS)
def test_cross_attention_is_known_by_the_sequence_of_keys_and_values(name: str, crosses: bool) -> None:
    kind, how = ORIGINS[name]
    assert found_crossing(kind(crosses), how) == crosses


def test_a_sum_of_two_sequences_is_a_sequence_of_its_own() -> None:
    assert found_crossing(lambda x, y, _: (plain(x, 0), plain(x + y, 1), plain(x + y, 2)), POSITIONS)
    assert found_crossing(lambda x, y, _: (plain(x * y, 0), plain(y, 1), plain(y, 2)), POSITIONS)


def test_keys_that_an_adapter_adds_to_are_of_the_same_tokens() -> None:
    more = found_crossing(
        lambda x, y, _: (plain(x, 0), plain(x, 1) + plain(y, 2), plain(x, 2) + plain(y, 0)), POSITIONS
    )
    assert not more and not found_crossing(lambda x, y, _: (plain(x, 0), plain(x, 1), heads(x)), POSITIONS)
