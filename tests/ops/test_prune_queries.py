"""`flexsparse::prune_queries`: its promises, and what its results mean. `masks/test_bsa.py` holds it against loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.compile_passes.templates import prune
from flexsparse.ops import prune_queries as module
from flexsparse.ops.prune_queries import prune_queries
from flexsparse.ops.windows import window_table

SCHEMA = (
    "flexsparse::prune_queries(Tensor q, Tensor tokens, Tensor? now, float share, SymInt[] grid, SymInt[] tile, "
    "SymInt[] window, SymInt first_rows, SymInt length, SymInt packed, str fill, str representative, SymInt slots=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LAYOUT = fs.TileLayout(grid=(3, 5, 6), tile=(2, 3, 4), text_first=3, text_last=40)  # 32 slots for 24 tokens, borders


def arguments(
    layout: fs.TileLayout, q: Tensor, now: Tensor | None = None, packed: int = 16, **options: Any
) -> tuple[Any, ...]:
    how = {"share": 0.5, "window": (2, 2, 2), "fill": "representative", "representative": "center"} | options
    tiles = layout.video(layout.to_tiles(q))
    sizes = (layout.tiles_first * layout.slots, layout.seq_len, packed)
    kinds = (how["fill"], how["representative"])
    return (tiles, layout.index()[0], now, how["share"], layout.grid, layout.sides, how["window"], *sizes, *kinds)


def test_the_schema_is_frozen() -> None:
    assert str(torch.ops.flexsparse.prune_queries.default._schema) == SCHEMA


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("scheduled", (False, True))
def test_it_keeps_its_promises_to_the_compiler(scheduled: bool, dtype: torch.dtype) -> None:
    now = torch.tensor(0.3, dtype=torch.float64) if scheduled else None
    q = torch.randn(2, 2, LAYOUT.seq_len, 8).to(dtype)
    every = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    tiles = arguments(LAYOUT, q, now, fill="nearest")
    torch.library.opcheck(prune_queries, tiles, test_utils=every)
    torch.library.opcheck(prune_queries, (q, *tiles[1:], LAYOUT.slots), test_utils=every)
    for mine, other in zip(prune_queries(q, *tiles[1:], LAYOUT.slots), prune_queries(*tiles), strict=True):
        assert torch.equal(mine, other)


def test_a_row_of_the_packed_order_is_the_tokens_of_its_kept_slot() -> None:
    q = torch.randn(2, 3, LAYOUT.seq_len, 8)
    total, kept, counts, source, position = prune_queries(*arguments(LAYOUT, q))
    first = LAYOUT.tiles_first * LAYOUT.slots
    assert total.dtype == torch.float32 and {kept.dtype, counts.dtype, source.dtype, position.dtype} == {torch.int32}
    for b, h, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(LAYOUT.num_tiles)).tolist():
        tokens = kept[b, h, n, : counts[n]].long()
        assert torch.equal(source[b, h, tokens], tokens.int())  # its own source
        assert position[b, h, tokens].tolist() == [first + n * 16 + row for row in range(len(tokens))]
        torch.testing.assert_close(total[b, h, n, 0], q[b, h, tokens].sum(0))
    pruned = source != torch.arange(LAYOUT.seq_len)
    taken = position.gather(-1, source.long())
    assert torch.equal(position[pruned], taken[pruned]) and bool(pruned.any())
    extra = torch.cat([torch.arange(3), torch.arange(LAYOUT.seq_len - 40, LAYOUT.seq_len)])
    assert torch.equal(source[0, 0, extra], extra.int())
    rows = torch.cat([torch.arange(3), first + LAYOUT.num_tiles * 16 + torch.arange(40)])
    assert torch.equal(position[0, 0, extra], rows.int())


def test_the_share_is_taken_in_float64() -> None:
    layout = fs.TileLayout(grid=(1, 1, 30), tile=(1, 1, 30))
    q = torch.randn(1, 1, 30, 8)
    for share, window, kept in ((0.1, 10, 3), (0.7, 10, 21), (0.1 + 1e-12, 10, 6), (0.3, 30, 9)):
        for now in (None, torch.tensor(share, dtype=torch.float64)):
            given = arguments(layout, q, now, packed=32, share=share, window=(1, 1, window))
            assert prune_queries(*given)[2].tolist() == [kept], (share, window)


@pytest.mark.parametrize("fill", ("representative", "nearest"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("representative", ("center", "medoid"))
def test_a_query_that_is_not_finite_is_computed_and_nobody_elses_source(
    representative: str, bad: float, fill: str
) -> None:
    """What took its representative's row would be finite, and the fault in the model hidden."""
    token = 37
    q = torch.randn(1, 2, LAYOUT.seq_len, 8)
    q[..., token, 2] = bad
    *_, source, _ = prune_queries(*arguments(LAYOUT, q, fill=fill, representative=representative))
    assert source[..., token].tolist() == [[token, token]]
    assert (source == token).sum() == 2


def test_no_gradient_and_no_token_past_a_tiles_count() -> None:
    q = torch.randn(1, 2, LAYOUT.seq_len, 8)
    given = arguments(LAYOUT, q)
    expected = prune_queries(*given)
    padding = given[1][32 : 32 + LAYOUT.num_tiles * 32].view(-1, 32) < 0
    q_tiles = given[0].masked_fill(padding[..., None], 7.0)
    found = prune_queries(q_tiles, *given[1:])
    for one, two in zip(found[1:], expected[1:]):
        assert torch.equal(one, two)
    assert not any(x.requires_grad for x in found)


def test_what_the_kernel_does_not_do_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    windows = window_table((2, 8, 8), (2, 8, 8), (1, 1, 1), torch.device("cpu"))[0]
    assert prune.refusal(torch.float32, windows) is None
    assert "float64" in str(prune.refusal(torch.float64, windows))
    many = window_table((8, 16, 16), (8, 16, 16), (2, 2, 2), torch.device("cpu"))[0]
    assert "256 windows of 8 tokens" in str(prune.refusal(torch.bfloat16, many))
    module._say_once.cache_clear()
    with caplog.at_level("INFO", logger="flexsparse"):
        for _ in range(2):
            module._say_once("BSA's queries are pruned in plain torch: because")
    assert [record.message for record in caplog.records] == ["BSA's queries are pruned in plain torch: because"]


@pytest.mark.parametrize("window", ((2, 2, 2), (3, 2, 1), (4, 4, 4)))
def test_every_token_of_a_tile_is_in_one_window_and_its_centre_too(window: tuple[int, int, int]) -> None:
    layout = fs.TileLayout(grid=(3, 5, 6), tile=(2, 4, 4))
    sides = tuple(map(min, window, layout.sides))
    slots, centres = window_table(layout.grid, layout.sides, sides, torch.device("cpu"))  # type: ignore[arg-type]
    for tile, listed, places in zip(layout.tile_counts.tolist(), slots, centres):
        assert sorted(listed[listed >= 0].tolist()) == list(range(tile))
        for members, place in zip(listed, places):
            assert int(members[place]) >= 0 or int((members >= 0).sum()) == 0
