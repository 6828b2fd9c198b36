"""FLOPs that torch's counter sees of the attention ops, against the products that their plain torch computes, and the plan."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flexsparse as fs
from flexsparse.ops import gathered
from flexsparse.packing import pack_queries
from flexsparse.planning.attention import Call
from flexsparse.selection import TileSelection

LAYOUTS = {
    "whole": fs.TileLayout(grid=(2, 8, 8), tile=(2, 2, 4)),
    "ragged, text": fs.TileLayout(grid=(3, 5, 6), tile=(2, 3, 4), text_first=3, text_last=40),
}
BUILDERS = {
    "vsa": fs.VSA(top_k=2),
    "bsa": fs.BSA(keep_queries=0.5, threshold="mass", mass=1.0, max_tiles=3),
}


def _inputs(layout: fs.TileLayout, builder: fs.masks.MaskBuilder) -> tuple[list[Tensor], TileSelection]:
    q, k, v = (torch.randn(2, 4 if name == "q" else 2, layout.seq_len, 8, requires_grad=True) for name in "qkv")
    return [q, k, v], builder.select(q, k, layout)


def _products(qkv: list[Tensor], selection: TileSelection, training: bool) -> int:
    """What plain torch multiplies; every row of a builder here keeps as many tiles, so that no chunk is padded."""
    layout = selection.layout
    q = pack_queries(qkv[0], None, selection).detach()
    k, v = (layout.to_tiles(x).contiguous().detach() for x in qkv[1:])
    bits, counts, kv_counts, rows, first, _, *sizes, _, _, _ = selection.operands()
    assert counts.unique().numel() == 1
    rest = (bits, counts, kv_counts, rows, first, *sizes, 0.3)
    in_place = {
        torch.ops.aten.addmm_: lambda _, x, y, out_shape: 2 * x[0] * x[1] * y[1]
    }  # torch's counter leaves it out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        out, lse = gathered.forward(q, k, v, *rest, True)
        if training:
            gathered.backward(torch.ones_like(out), None, q, k, v, out, lse, *rest)
    return counter.get_total_flops()


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gather_counts_the_products_that_it_computes(name: str, builder: str, training: bool) -> None:
    layout = LAYOUTS[name]
    qkv, selection = _inputs(layout, BUILDERS[builder])
    with FlopCounterMode(display=False) as counter:
        out = fs.sparse_attention(*qkv, layout, selection, backend="gather")
        if training:
            out.sum().backward()
    assert counter.get_total_flops() == _products(qkv, selection, training) > 0


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("raster", (False, True))
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_op_of_the_templates_counts_the_same(name: str, raster: bool, training: bool) -> None:
    layout = LAYOUTS[name]
    qkv, selection = _inputs(layout, BUILDERS["vsa"])
    tables = (layout.index()[0], layout.index()[0]) if raster else ()
    given = qkv if raster else [layout.to_tiles(x).contiguous() for x in qkv]
    with FlopCounterMode(display=False) as counter:
        out, _ = torch.ops.flexsparse.tile_attention(*given, None, None, *selection.operands(), 0.3, True, *tables)
        if training:
            out.sum().backward()
    assert counter.get_total_flops() == _products(qkv, selection, training) > 0


def test_a_row_that_keeps_less_counts_less() -> None:
    layout = LAYOUTS["whole"]
    keep = torch.zeros(1, 2, layout.num_tiles, layout.num_tiles, dtype=torch.bool)
    keep[..., 0] = keep[0, 1, 3] = True
    q = torch.randn(1, 2, layout.seq_len, 8)
    with FlopCounterMode(display=False) as counter:
        fs.sparse_attention(q, q, q, layout, TileSelection.from_mask(keep, layout), backend="gather")
    assert counter.get_total_flops() == 4 * layout.slots**2 * 8 * int(keep.sum())


@pytest.mark.parametrize("gated", (False, True))
def test_a_whole_call_counts_what_a_plan_does(gated: bool) -> None:
    layout = LAYOUTS["ragged, text"]
    qkv = [torch.randn(2, 4, layout.seq_len, 8) for _ in range(3)]
    gate = torch.randn(2, 4, layout.seq_len, 8) if gated else None
    call = Call(
        batch=2, heads=4, head_dim=8, layout=layout, builder=fs.VSA(top_k=2), dtype=torch.float32, gates=int(gated)
    )
    with FlopCounterMode(display=False) as counter:
        fs.sparse_attention(*qkv, layout, call.builder, gate=gate)
    pooling = 2 * 4 * layout.num_tokens * 8 * (3 if gated else 2)
    assert counter.get_total_flops() == call.flops().fine + call.flops().coarse - pooling


@pytest.mark.parametrize("builder", [*BUILDERS.values(), fs.TopP(mass=0.5)], ids=lambda builder: type(builder).__name__)
def test_tensors_without_values_have_shapes(builder: fs.masks.MaskBuilder) -> None:
    layout = LAYOUTS["ragged, text"]
    q = torch.empty(1, 2, layout.seq_len, 8, device="meta", requires_grad=True)
    out, aux = fs.sparse_attention(q, q, q, layout, builder, return_aux=True)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape and {out.device, aux.lse.device, q.grad.device} == {q.device}
    with pytest.raises(ValueError, match=r"backend is 'flex'.*meta.*'gather'"):
        fs.sparse_attention(q, q, q, layout, builder, backend="flex")


def test_a_selection_without_values_is_an_error() -> None:
    layout = LAYOUTS["whole"]
    q = torch.empty(1, 2, layout.seq_len, 8, device="meta")
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match=r"without values .* `flexsparse plan`"):
        fs.sparse_attention(q, q, q, layout, fs.VSA(top_k=2))


def test_a_compiler_that_weighs_nodes_by_their_flops() -> None:
    """Inductor counts them of fake tensors: the most it can be, exact where a builder fills every row."""
    layout = LAYOUTS["ragged, text"]
    qkv, selection = _inputs(layout, BUILDERS["vsa"])
    given = (*(layout.to_tiles(x).contiguous().detach() for x in qkv), None, None, *selection.operands(), 0.3, True)
    mode = FakeTensorMode()
    with mode, torch._guards.tracing(torch._guards.TracingContext(mode)), FlopCounterMode(display=False) as counter:
        fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]
        torch.ops.flexsparse.tile_attention(*fake)
    assert counter.get_total_flops() == _products(qkv, selection, False) > 0
