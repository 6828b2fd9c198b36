"""Arrays that span more than 2^31 elements: int32 wraps in the interpreter as it does on a GPU.

Their memory is a sparse file, of which the few pages that are touched exist.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.compile_passes.templates import backward, forward, pack, pool, prune, tiling
from flexsparse.compile_passes.templates.rows import strides
from flexsparse.ops.windows import window_table
from flexsparse.tile_bits import pack_bits

pytestmark = pytest.mark.slow
Far = Callable[..., Tensor]
ELEMENTS = 34_000_000_000
BATCH, HEAD, ROW = "batch", "head", "row"


@pytest.fixture
def far(tmp_path: Path) -> Far:
    """Copies ``[B, H, S, D]`` to memory that spans so many elements, by the stride of one dimension."""
    path = tmp_path / "sparse"
    try:
        with path.open("wb") as file:
            file.truncate(ELEMENTS * 4)
        memory = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(ELEMENTS,)))
    except OSError as error:
        pytest.skip(f"no sparse file of {ELEMENTS * 4} bytes: {error}")
    used = 0

    def copied(x: Tensor, by: str, span: int) -> Tensor:
        nonlocal used
        B, H, S, D = x.shape
        step = {BATCH: B, HEAD: H, ROW: S}[by] - 1
        wide = span // max(1, step) // 64 * 64
        steps = {BATCH: (wide, S * D, D, 1), HEAD: (H * S * D, wide, D, 1), ROW: (D, B * D, wide, 1)}[by]
        y = memory[used:].as_strided(x.shape, steps)
        used += 2 * x.numel() + 4096  # the next one lies elsewhere
        return y.copy_(x)

    return copied


def test_attention_by_batch_and_head(far: Far) -> None:
    """Just below the limit that is refused (`ALIGN` times 2^31 elements)."""
    B, H, G, N, s, D = 2, 4, 2, 4, 16, 16
    keep = torch.rand(B, H, N, N) < 0.6
    keep[..., 0] = True
    bits, counts = pack_bits(keep), keep.sum(-1, dtype=torch.int32)
    kv_counts = torch.full((B, N), s, dtype=torch.int32)
    kv_counts[0, 1] = 5
    q, k, v, gate, grad = (torch.randn(B, heads, N * s, D) for heads in (H, G, G, H, H))
    coarse = torch.randn(B, H, N, D)
    sizes = {"query_rows": s, "first_rows": 0, "kv_first": 0, "kv_video": N, "slots": s, "capacity": N}
    how = {**sizes, "scale": 0.3, "partial": True}

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, grad: Tensor) -> list[Tensor]:
        rest = (bits, counts, kv_counts, coarse, gate)
        out, lse = forward.forward(q, k, v, *rest, **how)
        return [out, lse, *backward.backward(grad, None, q, k, v, out, lse, *rest, **how)]

    expected = run(q, k, v, gate, grad)
    for by in (BATCH, HEAD):
        there = [far(x, by, 33_000_000_000) for x in (q, k, v, gate, grad)]
        assert max(there[0].stride()) > 2**31
        assert all(torch.equal(one, other) for one, other in zip(run(*there), expected, strict=True)), by


@pytest.mark.parametrize("tables", [False, True])
def test_attention_by_row(far: Far, tables: bool) -> None:
    s, D, S = 256, 16, 4096
    N = S // s
    keep = torch.eye(N, dtype=torch.bool).expand(1, 1, N, N).contiguous()
    keep[..., N - 1] = True
    bits, counts = pack_bits(keep), keep.sum(-1, dtype=torch.int32)
    kv_counts = torch.full((1, N), s, dtype=torch.int32)
    table = torch.randperm(S).to(torch.int32) if tables else None
    sizes = {"query_rows": s, "first_rows": 0, "kv_first": 0, "kv_video": N, "slots": s, "capacity": 2}
    how = {**sizes, "scale": 0.3, "partial": False, "q_tokens": table, "kv_tokens": table}

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        rest = (bits, counts, kv_counts, None, None)
        out, lse = forward.forward(q, k, v, *rest, **how)
        return [out, lse, *backward.backward(grad, None, q, k, v, out, lse, *rest, **how)[:3]]

    near = [torch.randn(1, 1, S, D) for _ in range(4)]
    there = [far(x, ROW, 33_000_000_000) for x in near]
    assert (S - 1) * there[0].stride(2) > 2**34 and strides(q=there[0])["ALIGN"] == 16
    assert all(torch.equal(one, other) for one, other in zip(run(*there), run(*near), strict=True))


@pytest.mark.parametrize("by", [BATCH, HEAD, ROW])
def test_other_kernels(far: Far, by: str) -> None:
    """Strides of nearly 2^31 elements in batch and head."""
    layout = fs.TileLayout(grid=(4, 4, 6), tile=(2, 4, 4))
    tokens, _, tile_counts = layout.index()
    n, s, S = layout.num_tiles, layout.slots, layout.seq_len

    def there(x: Tensor) -> Tensor:
        return far(x, by, 6_400_000_000)

    x, tiles = torch.randn(4, 4, S, 16), torch.randn(4, 4, n * s, 16)
    far_x, far_tiles = there(x), there(tiles)
    windows, centres = window_table((4, 4, 6), (2, 4, 4), (2, 2, 2), torch.device("cpu"))

    def run(x: Tensor, tiles: Tensor) -> list[Tensor]:
        found = [*tiling.tile_tokens([x], [tokens])]
        found += pool.pool([(x, tile_counts, False)], (tokens.view(n, s),))
        found += pool.pool([(tiles.unflatten(2, (n, s)), tile_counts, True)])
        pruned = [
            prune.prune(
                x if slots else tiles.unflatten(2, (n, s)), windows, centres, tokens, 0.5, 0, S, 16, *fill, slots
            )
            for fill in [("representative", "center")]
            for slots in (0, s)
        ]
        _, kept, counts, _, position = pruned[1]
        rows = pack.pack_rows(x, kept, counts, tokens, None, 0, 0)
        spread = pack.unpack_rows_backward(x, position, tokens, rows.shape[2], 0, 0, 16)
        return [*found, *(each for one in pruned for each in one), rows, spread]

    for one, other in zip(run(far_x, far_tiles), run(x, tiles), strict=True):
        assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))


def test_pooling_slots_that_lie_far_apart(far: Far) -> None:
    """A crash: tokens 40 million elements apart (samples beside each other in a token) took the product in int32."""
    x, counts = torch.randn(1, 1, 64, 16), torch.full((1,), 64, dtype=torch.int32)
    apart = far(x, ROW, 63 * 40_000_000).unflatten(2, (1, 64))
    assert apart.stride(3) * 63 > 2**31
    (expected,) = pool.pool([(x.unflatten(2, (1, 64)), counts, True)])
    assert torch.equal(pool.pool([(apart, counts, True)])[0], expected)
