"""Gates and masks of a model's call, as the attention takes them."""

from __future__ import annotations

import pytest
import torch

import flexsparse as fs
from flexsparse.calls import CallParts, gates_of_heads, sparse_call
from flexsparse.text_masks import TextMask

LAYOUT = fs.TileLayout(grid=(2, 4, 6), tile=(2, 4, 4), text_first=3, text_last=70)
N, H, D = LAYOUT.num_tokens, 2, 4


@pytest.mark.parametrize("before", [0, LAYOUT.text_first], ids=["the video's", "with history before it"])
def test_a_gate_of_the_video_is_padded_where_the_text_is(before: int) -> None:
    q = torch.randn(1, H, LAYOUT.seq_len, D)
    gates = torch.randn(1, before + N, H * D), torch.randn(1, before + N, H * D)
    coarse, fine = gates_of_heads(gates, q, LAYOUT)
    assert coarse is not None and fine is not None
    video = slice(LAYOUT.text_first - before, LAYOUT.text_first + N)
    for found, given, rest in ((coarse, gates[0], 0), (fine, gates[1], 1)):
        assert torch.equal(found[:, :, video].transpose(1, 2).flatten(2), given)
        assert (found[:, :, : video.start] == rest).all() and (found[:, :, video.stop :] == rest).all()
    whole = torch.randn(1, LAYOUT.seq_len, H * D)
    found, none = gates_of_heads((whole, None), q, LAYOUT)
    assert none is None and found is not None and torch.equal(found.transpose(1, 2).flatten(2), whole)


def test_a_gate_of_other_sizes_is_an_error() -> None:
    q = torch.randn(1, H, LAYOUT.seq_len, D)
    with pytest.raises(ValueError, match=r"the gate is \(1, 47, 8\), the attention's queries are \(1, 2, 121, 4\)"):
        gates_of_heads((torch.randn(1, N - 1, H * D), None), q, LAYOUT)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_one_mask_for_all_samples(backend: str) -> None:
    """All tiles kept: dense attention under the same mask."""
    q, k, v = (torch.randn(2, H, LAYOUT.seq_len, D) for _ in range(3))
    mask = (torch.arange(LAYOUT.seq_len) < 3 + N + 9)[None, None, None]
    builder = fs.VSA(top_k=LAYOUT.num_tiles)
    out = sparse_call(builder, q, k, v, (None, None), LAYOUT, None, backend, False, text=TextMask.of(mask, LAYOUT))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_a_call_and_its_parts_choose_their_own_precision(backend: str) -> None:
    """Autocast, where a graph is traced or a model runs, casts q, k and v, and nothing that is made of them."""
    geometry = (*LAYOUT.grid, LAYOUT.text_first, LAYOUT.text_last)
    q, k, v = (torch.randn(1, H, LAYOUT.seq_len, D).bfloat16() for _ in range(3))
    gates = torch.randn(1, N, H * D), torch.randn(1, N, H * D)
    parts = CallParts((fs.VSA(top_k=2),), (), lambda _: (LAYOUT, LAYOUT))
    how = {"scale": None, "backend": backend, "name": "", "builder": 0, "order": "raster"}

    def run() -> list[torch.Tensor]:
        tiles = parts.tiles(q, k, v, geometry, None, "raster")
        planned = parts.plan(q, k, tiles, geometry, None, "raster", (), None, True, None, 0)
        fine = parts.fine(q, tiles, planned, gates, geometry, None, **how)
        whole = parts.attend(q, k, v, gates[0], geometry, (), None, gates[1], **how)
        return [fine, whole, *(x for x in planned if isinstance(x, torch.Tensor))]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    assert all(map(torch.equal, found, expected))
