"""diffusers' caches, which leave blocks or attention out in some denoising steps, over a wrapped model.

The reference is the model under the same cache with its attention computed by `fs.sparse_attention` in place of torch's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.compile_passes import RewriteError

from .zoo import WAN, ZOO

LAYOUT = fs.TileLayout(grid=(4, 8, 8), tile=(4, 4, 4))
BUILDER = fs.VSA(top_k=2)
TIMES = [999, 800, 600, 400, 250, 50]
now = TIMES[0]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def broadcast() -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: now,
    )


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "magnitude": lambda: diffusers.MagCacheConfig(
        num_inference_steps=len(TIMES), mag_ratios=torch.linspace(1.0, 0.97, len(TIMES)), max_skip_steps=2
    ),
    "taylor": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, use_lite_mode=True
    ),
    "attention": broadcast,
}


def wan() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = diffusers.WanTransformer3DModel(**{**WAN, "num_layers": 3}).eval()
    for block in model.blocks:  # attention that tells tokens apart
        nn.init.constant_(block.attn1.norm_q.weight, 4.0)
    return model


@torch.no_grad()
def denoise(model: nn.Module) -> Tensor:
    """What the model says in each step."""
    global now
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 4, 16, 16, generator=g), torch.randn(1, 8, 16, generator=g)
    outs = []
    for now in TIMES:
        with model.cache_context("cond"):  # type: ignore[operator]
            outs.append(model(x, torch.tensor([now]), text, return_dict=False)[0])
        x = x - 0.1 * outs[-1]
    return torch.stack(outs)


@contextlib.contextmanager
def by_hand() -> Iterator[list[int]]:
    """Self-attention by ours; yields a list that gets an entry a call."""
    calls: list[int] = []
    theirs = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if key.shape[2] != LAYOUT.seq_len:
            return theirs(query, key, value, *args, **kwargs)
        calls.append(1)
        return fs.sparse_attention(query, key, value, LAYOUT, BUILDER)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield calls


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, False) for name in CACHES),
        ("first block", "regional"),
        *(pytest.param(name, "regional", marks=pytest.mark.slow) for name in ("magnitude", "taylor")),
    ],
)
def test_a_cache_over_a_wrapped_model(name: str, way: Any) -> None:
    """`PyramidAttentionBroadcast` leaves all self-attention out and computes cross-attention: an error, before."""
    model = wan()
    model.enable_cache(CACHES[name]())  # type: ignore[operator]
    with by_hand() as calls:
        expected = denoise(model)
    assert 0 < len(calls) < len(TIMES) * len(model.blocks), "the cache left some out"  # type: ignore[arg-type]
    model = fs.wrap(wan(), BUILDER, compile=way, **({} if way is False else {"inner": "aot_eager"}))
    model.enable_cache(CACHES[name]())  # type: ignore[operator]
    torch.testing.assert_close(denoise(model), expected, atol=1e-5, rtol=0)
    model.disable_cache()  # type: ignore[operator]
    torch.testing.assert_close(denoise(fs.unwrap(model)), denoise(wan()), atol=0, rtol=0)


@pytest.mark.parametrize("way", [False, "regional"])
def test_a_cache_that_leaves_all_but_dense_layers_out(way: Any) -> None:
    """The first block, which the cache always computes, is dense: such a step was taken for one that turned dense."""

    def cached(model: nn.Module) -> nn.Module:
        model.enable_cache(CACHES["first block"]())  # type: ignore[operator]
        return model

    rules = {"blocks.0": None, "*": BUILDER}
    model = cached(fs.wrap(wan(), rules, compile=way, **({} if way is False else {"inner": "aot_eager"})))
    out = denoise(model)
    torch.testing.assert_close(
        out, denoise(cached(fs.wrap(wan(), rules, compile=False, attention="reference"))), atol=1e-5, rtol=0
    )
    assert not torch.allclose(out, denoise(cached(wan())), atol=1e-3), "other blocks are sparse"


@torch.no_grad()
def test_a_cache_of_half_a_batch() -> None:
    """`FasterCache` computes the first half of a batch only in some steps, in others no attention of some blocks."""
    entry, grid = ZOO["cogvideox"], (4, 4, 4)
    inputs = entry.inputs(grid, 2)

    def cached(model: nn.Module, on: bool = True) -> Tensor:
        global now
        config = diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 900),
            unconditional_batch_skip_range=3,
            unconditional_batch_timestep_skip_range=(-1, 800),
            current_timestep_callback=lambda: now,
            attention_weight_callback=lambda _: 0.3,
            tensor_format="BFCHW",
        )
        if on:
            model.enable_cache(config)  # type: ignore[operator]
        x, outs = inputs["hidden_states"], []
        for now in TIMES:
            time = torch.full_like(inputs["timestep"], now)
            with model.cache_context("both"):  # type: ignore[operator]
                outs.append(model(**{**inputs, "hidden_states": x, "timestep": time}, return_dict=False)[0])
            x = x - 0.1 * outs[-1]
        return torch.stack(outs)

    expected = cached(entry.model())
    assert not torch.allclose(cached(entry.model(), on=False), expected, atol=1e-2), "it left something out"
    for top_k, same in ((8, True), (2, False)):
        model = fs.wrap(entry.model(), fs.VSA(top_k=top_k), tile=(2, 2, 2), compile=False)
        assert torch.allclose(cached(model), expected, atol=1e-5) == same


@pytest.mark.parametrize("way", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cache_that_was_there_before_is_named(way: Any) -> None:
    """What it leaves out then is a call of ours in which nothing was sparse."""
    model = wan()
    model.enable_cache(CACHES["attention"]())  # type: ignore[operator]
    fs.wrap(model, BUILDER, compile=way, **({} if way is False else {"inner": "aot_eager"}))
    with pytest.raises(RewriteError, match=r"found no attention in .*(?s:.*)a cache .* is enabled after wrap"):
        denoise(model)


def test_attention_that_turns_dense_in_other_modules_is_no_cache() -> None:
    """The video's tokens among themselves, computed where nothing was sparse before: by a mask, in a module of its own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.other, self.masked = nn.Linear(8, 48), nn.Linear(8, 48), False

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, self.other if self.masked else self.qkv)

        def attend(self, x: Tensor, qkv: nn.Linear) -> Tensor:
            q, k, v = qkv(x).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
            mask = torch.ones(256, 256, dtype=torch.bool).tril() if self.masked else None
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model = fs.wrap(Model(), BUILDER, grid=LAYOUT.grid, compile=False)
    with torch.no_grad():
        model(torch.randn(1, 256, 8))
        model.masked = True
        with pytest.raises(RewriteError, match="found no attention in"):
            model(torch.randn(1, 256, 8))
