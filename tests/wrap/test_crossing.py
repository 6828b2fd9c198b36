"""Uncompiled cross-attention to as many tokens as the video has, however its module is written, stays dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.crossing import NO_TOKENS

C = 32


class Core(nn.Module):
    """Attention of heads, as a module of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.core = nn.Linear(C, C), nn.Linear(C, 2 * C), Core()

    def forward(self, x: Tensor, pose_tokens: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if pose_tokens is None else pose_tokens).unflatten(-1, (2, 2, -1)).unbind(2)
        return self.core(self.q(x).unflatten(-1, (2, -1)), k, v)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(), Attention()

    def forward(self, x: Tensor, pose: Tensor) -> Tensor:
        x = x + self.own(x)
        return x + self.cross(x, pose_tokens=pose)


@torch.no_grad()
def test_the_module_around_one_that_is_given_heads_is_asked() -> None:
    torch.manual_seed(0)
    model = fs.wrap(Model(), fs.VSA(top_k=1), grid=(4, 4, 8), tile=(2, 2, 4), compile=False)
    model(torch.randn(1, 128, C), torch.randn(1, 128, C))
    assert {call.name: call.sparse for call in fs.report(model).calls} == {"own.core": True, "cross.core": False}
    assert "two sequences of this length" in str(fs.report(model))


class Flat(nn.Module):
    """Attention of flat projections, as DiffSynth-Studio has it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Given(nn.Module):
    """Attention that computes in `Flat`, to tokens that come in any way; a video ``[B, C, T, H, W]`` among them."""

    def __init__(self, inside: bool = True) -> None:
        super().__init__()
        self.q, self.kv, self.core = nn.Linear(C, C), nn.Linear(C, 2 * C), Flat()
        self.inside = inside

    def forward(self, x: Tensor, reference: Any = None) -> Tensor:
        y = reference["tokens"] if isinstance(reference, dict) else reference
        y = x if y is None else y[0] if isinstance(y, list | tuple) else y
        y = y.flatten(2).transpose(1, 2) if y.dim() == 5 else y
        k, v = self.kv(y.expand(len(x), -1, -1)).chunk(2, -1)
        return self.core(self.q(x), k, v) if self.inside else Flat.forward(self.core, self.q(x), k, v)


class To(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.own, self.cross = Given(inside), Given(inside)

    def forward(self, x: Tensor, reference: Any) -> Tensor:
        x = x + self.own(x)
        return x + self.cross(x, reference)


@pytest.mark.parametrize("inside", [True, False], ids=["a module computes", "the module itself computes"])
@pytest.mark.parametrize(
    "reference",
    [torch.zeros(2, 128, C), torch.zeros(1, 128, C), torch.zeros(1, C, 4, 4, 8)],
    ids=["tokens", "one sample for all", "a video"],
)
@pytest.mark.parametrize("give", [lambda y: y, lambda y: [y], lambda y: {"tokens": y}], ids=["alone", "list", "dict"])
@torch.no_grad()
def test_cross_attention_to_what_comes_in_other_ways(give: Any, reference: Tensor, inside: bool) -> None:
    torch.manual_seed(0)
    model = fs.wrap(To(inside), fs.VSA(top_k=1), grid=(4, 4, 8), tile=(2, 2, 4), compile=False)
    model(torch.randn(2, 128, C), give(reference))
    part = ".core" if inside else ""
    assert {c.name: c.sparse for c in fs.report(model).calls} == {f"own{part}": True, f"cross{part}": False}


@torch.no_grad()
def test_a_table_for_all_samples_is_no_reference() -> None:
    """Of other channels than the tokens, or by its name; LTX's rotation is a pair ``pe`` of as many channels."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Given(False)

        def forward(self, x: Tensor, table: Tensor, pe: tuple[Tensor, Tensor]) -> Tensor:
            return Flat.forward(self.attention.core, *(x * table.mean() + pe[0] for _ in range(3)))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Placed()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, torch.ones(1, 128, 7), pe=(torch.zeros(1, 128, C), torch.zeros(1, 128, C)))

    model = fs.wrap(Whole(), fs.VSA(top_k=1), grid=(4, 4, 8), tile=(2, 2, 4), compile=False)
    model(torch.randn(2, 128, C))
    assert [call.sparse for call in fs.report(model).calls] == [True]


@pytest.mark.parametrize("way", [True, False])
@torch.no_grad()
def test_gates_where_one_tensor_is_queries_keys_and_values(way: Any) -> None:
    """Compiled, only the queries went through the mark of the gate, and torch's module asks by ``is``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, value=x, need_weights=False)[0]

    def wrapped(compile: Any) -> nn.Module:
        torch.manual_seed(0)
        options = {"inner": "aot_eager"} if compile else {}
        model = fs.wrap(Net(), fs.VSA(top_k=2), gates=True, grid=(4, 4, 8), tile=(2, 2, 4), compile=compile, **options)
        for parameter in fs.gate_parameters(model):
            nn.init.constant_(parameter, 0.5)
        return model

    x = torch.randn(1, 128, C)
    model = wrapped(way)
    torch.testing.assert_close(model(x), wrapped(False)(x), atol=1e-5, rtol=0)
    assert [call.sparse for call in fs.report(model).calls] == [True]


@torch.no_grad()
def test_a_gate_reads_the_tokens_whatever_comes_before_them() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(C, 3 * C)

        def forward(self, when: Tensor, position: Tensor, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(torch.zeros(1, C), position=torch.zeros(1, 128, 4), x=x)

    torch.manual_seed(0)
    model = fs.wrap(Net(), fs.VSA(top_k=2), gates=True, grid=(4, 4, 8), tile=(2, 2, 4), compile=False)
    seen = []
    model.attention.to_gate_compress.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    x = torch.randn(1, 128, C)
    model(x)
    assert len(seen) == 1 and seen[0] is x


@pytest.mark.parametrize(
    ("names", "tokens"),
    [
        (
            (
                "pose",
                "pose_tokens",
                "people",
                "type",
                "composition",
                "prototypes",
                "masked_latents",
                "single",
                "context",
                "cosmos",
            ),
            True,
        ),
        (
            (
                "pe",
                "q_pe",
                "image_rotary_emb",
                "rope_cos",
                "freqs_cis",
                "pos_embed",
                "position_ids",
                "posemb",
                "temb",
                "sin",
                "cos_sin",
            ),
            False,
        ),
        (("attention_mask", "timestep_proj", "modulation", "bias"), False),
    ],
)
def test_names_of_what_is_no_token_sequence(names: tuple[str, ...], tokens: bool) -> None:
    assert [name for name in names if bool(NO_TOKENS.search(name)) == tokens] == []
