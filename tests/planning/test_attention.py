"""FLOPs and bytes of a sparse call against real selections."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flexsparse as fs
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.planning.attention import Call

B, H, D = 2, 3, 16
WHOLE, RAGGED = (4, 8, 8), (5, 6, 7)
TEXT = {"text_first": 3, "text_last": 20}


def _call(builder, grid=WHOLE, gates=0, **layout) -> Call:
    layout = fs.TileLayout(grid=grid, tile=(4, 4, 4), **layout)
    return Call(batch=B, heads=H, head_dim=D, layout=layout, builder=builder, dtype=torch.float32, gates=gates)


def _selection(call: Call):
    q, k = (torch.randn(B, H, call.layout.seq_len, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    return call.builder.select(q, k, call.layout)


@pytest.mark.parametrize("text", [{}, TEXT], ids=["video", "text"])
@pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_fine_stages_flops_are_those_of_the_kept_tiles(grid, top_k, text):
    call = _call(fs.VSA(top_k=top_k), grid, **text)
    kept = _selection(call).to_dense()  # text tiles included
    slots = call.layout.slots
    assert call.flops().fine == 4 * D * int(kept.sum()) * slots * slots


@pytest.mark.parametrize("text", [{}, TEXT], ids=["video", "text"])
def test_valid_flops_are_those_of_the_kept_pairs(text):
    for builder, grid in (
        (fs.VSA(top_k=2), WHOLE),
        (fs.VSA(sparsity=0), RAGGED),
    ):  # partial tiles: exact if all are kept
        call = _call(builder, grid, **text)
        assert call.flops().fine_valid == pytest.approx(4 * D * float(_selection(call).valid_pairs()[0]))


@pytest.mark.parametrize("text", [{}, TEXT], ids=["video", "text"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 1])
def test_pruned_queries_are_packed_and_are_not_computed(keep, text):
    call = _call(fs.BSA(keep_queries=keep, kv_density=1), **text)
    selection = _selection(call)
    slots, dense = call.layout.slots, selection.to_dense()
    rows = torch.full(dense.shape[2:3], slots)
    first = call.layout.tiles_first
    rows[first : first + call.layout.num_tiles] = selection.query_rows
    assert call.rows == selection.query_rows
    assert call.flops().fine == 4 * D * int((dense.sum(-1) * rows).sum()) * slots
    assert call.flops().fine_valid == pytest.approx(4 * D * float(selection.valid_pairs()[0]))


@pytest.mark.parametrize(
    "builder",
    [fs.VSA(top_k=3), fs.VSA(sparsity=0.7), fs.BSA(kv_density=0.2), fs.BSA(kv_density=0.2, max_tiles=2)],
    ids=["top_k", "sparsity", "bsa", "bsa-capped"],
)
@pytest.mark.parametrize("grid", [RAGGED, (12, 12, 16)])
def test_list_and_bitmask_bytes_are_those_of_a_selection(builder, grid):
    call = _call(builder, grid, **TEXT)
    found = _selection(call)
    assert call.list_bytes == found.kv_indices.nbytes
    assert call.bitmask_bytes == found.bits.nbytes + found.counts.nbytes
    if isinstance(builder, fs.VSA):
        assert call.column_bytes == sum(x.nbytes for x in found.transpose())


@pytest.mark.parametrize("gated", [False, True])
def test_coarse_products_are_those_that_torch_counts(gated):
    call = _call(fs.VSA(top_k=2), RAGGED, gates=int(gated))
    layout = call.layout
    q, k, v = (layout.to_tiles(torch.randn(B, H, layout.seq_len, D)) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    tiles = [layout.video(x) for x in leaves]
    coarse = CoarseInputs(tiles[0], tiles[1], layout, layout, D**-0.5)
    with FlopCounterMode(display=False) as counter:
        out = call.builder.plan(coarse, tiles[2] if gated else None)[1]
        forward = counter.get_total_flops()
        if out is not None:
            out.sum().backward()
    pooling = B * H * layout.num_tokens * D * (3 if gated else 2)
    flops = call.flops()
    assert flops.coarse - pooling == forward > 0
    assert flops.coarse_backward == (counter.get_total_flops() - forward if gated else 0)


ROWS = json.loads((Path(__file__).parents[2] / "bench" / "results" / "saved.json").read_text())["rows"]


@pytest.mark.parametrize("row", [row for row in ROWS if row["mode"] == "compiled"], ids=lambda row: row["case"])
def test_saved_bytes_are_those_that_autograd_counts(row):
    builder = fs.BSA(keep_queries=0.5, kv_density=0.1) if row["case"] == "BSA" else fs.VSA(sparsity=0.9)
    layout = fs.TileLayout(grid=row["grid"], tile=row["tile"])
    sizes = {"batch": row["B"], "heads": row["H"], "head_dim": row["D"], "dtype": getattr(torch, row["dtype"])}
    call = Call(**sizes, layout=layout, builder=builder, gates=int("gated" in row["case"]))
    bytes_ = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in call.saved())
    assert bytes_ == pytest.approx(row["bytes"], rel=0.002)  # the layout's tables are not counted
    assert bytes_ <= row["bytes"]
