"""Uncompiled cross-attention to as many tokens as the video has, however its module is written, stays dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.intercept import NO_TOKENS

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


@pytest.mark.parametrize(
    ("names", "tokens"),
    [
        (("pose", "pose_tokens", "composition", "prototypes", "masked_latents", "single", "context", "cosmos"), True),
        (
            (
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
