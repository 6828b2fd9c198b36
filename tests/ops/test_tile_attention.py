"""`flexsparse::tile_attention`: the fine stage with the gated coarse output, against the oracle and the gather backend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, cases
from tolerance import assert_as_good, assert_lse, rms
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flexsparse as fs
from flexsparse.backends import gather
from flexsparse.ops import gathered
from flexsparse.ops.tile_attention import HEAD_DIMS, ROWS, run_backward, run_forward, templates_refuse
from flexsparse.packing import pack_queries, unpack_lse, unpack_rows
from flexsparse.selection import TileSelection
from flexsparse.tile_bits import pack_bits

pytestmark = pytest.mark.usefixtures("poisoned")

op = torch.ops.flexsparse.tile_attention
TEXT = fs.TileLayout(grid=(3, 5, 4), tile=(2, 2, 4), text_first=3, text_last=20)
PLAIN = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 4))
NAMES = ("out", "dq", "dk", "dv", "dcoarse", "dgate")


def coarse_and_gate(case: Case) -> tuple[Tensor, Tensor]:
    """A coarse output ``[B, H, N, D]``, at least float32, and a gate ``[B, H, S, D]``."""
    coarse = torch.randn(case.B, case.H, case.layout.num_tiles, case.D, generator=case.generator(8))
    dtype = torch.promote_types(case.dtype, torch.float32)
    return (coarse * case.scale).to(dtype), case.randn(case.H, case.layout, 5)


def by_op(case: Case, selection: TileSelection, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in raster order."""
    q, k, v, *gated = inputs
    layout, kv_layout = case.layout, case.kv_layout
    coarse, gate = gated if gated else (None, None)
    tiles = [
        None if x is None else one.to_tiles(x)
        for x, one in ((q, layout), (k, kv_layout), (v, kv_layout), (gate, layout))
    ]
    rows = pack_queries(q, tiles[0], selection)  # type: ignore[arg-type]
    out, lse = op(rows, *tiles[1:3], coarse, tiles[3], *selection.operands(), case.D**-0.5, True)
    return unpack_rows(out, selection), unpack_lse(lse, selection)


def by_definition(case: Case, mask: Tensor, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same, token by token."""
    q, k, v, *gated = inputs
    out, lse = oracle.attention(q, k, v, mask, case.D**-0.5)
    if gated:
        tile = torch.tensor([place.tile for place in oracle.places(case.layout)]) - case.layout.tiles_first
        video = (tile >= 0) & (tile < case.layout.num_tiles)
        of_token = gated[0][:, :, tile.clamp(0, case.layout.num_tiles - 1)] * video[:, None]
        out = (out + gated[1] * of_token).to(q.dtype)
    return out, lse


def outcome(function: Any, inputs: list[Tensor], grad: Tensor, grad_lse: Tensor | None) -> tuple[list[Tensor], Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = function(leaves)
    outputs = [out] if grad_lse is None else [out, lse]
    cotangents = [grad.to(out.dtype)] if grad_lse is None else [grad.to(out.dtype), grad_lse.to(lse.dtype)]
    return [out.detach(), *torch.autograd.grad(outputs, leaves, cotangents)], lse.detach()


def noise(case: Case, name: str) -> float:
    """RMS rounding error of the accumulation where a result cancels to nothing."""
    q, k, v = (rms(x) for x in case.qkv())
    eps, tokens = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps, case.layout.seq_len**0.5
    dp = v * case.D**0.5 * 2
    sizes = {"dq": dp * k * case.D**-0.5, "dk": dp * q * case.D**-0.5 * tokens, "dv": tokens}
    return 2 * eps * (1 + q * k) * sizes.get(name, v)


def compare(case: Case, selection: TileSelection, gated: bool, with_lse: bool = False) -> None:
    """Output and every gradient against the oracle, by the numerical rule."""
    mask = oracle.token_mask(selection.keep(), case.layout, case.kv_layout, selection.tile_counts)
    inputs = [*case.qkv(), *(coarse_and_gate(case) if gated else ())]
    grad = case.randn(case.H, case.layout, 7, 1 / case.scale)
    grad_lse = torch.randn(grad.shape[:3], generator=case.generator(9)) / case.scale if with_lse else None
    seen = mask.any(-1)
    if grad_lse is not None:
        grad_lse = grad_lse * seen
    mine, lse = outcome(lambda x: by_op(case, selection, x), inputs, grad, grad_lse)
    reference, _ = outcome(lambda x: by_definition(case, mask, x), inputs, grad, grad_lse)
    exact, exact_lse = outcome(
        lambda x: by_definition(case, mask, x), [x.double() for x in inputs], grad.double(), grad_lse
    )
    for name, one, two, three in zip(NAMES, mine, reference, exact):
        assert_as_good(one, two, three, name, noise(case, name))
    q, k, _ = (float(x.double().norm(dim=-1).max()) for x in case.qkv())
    assert_lse(lse, exact_lse, q * k * case.D**-0.5)


@given(cases(cross=True), st.floats(0, 1), st.booleans(), st.booleans())
def test_attention_and_gradients_are_the_definitions(case: Case, share: float, gated: bool, with_lse: bool) -> None:
    compare(case, case.selection(share, empty=True), gated, with_lse)


@pytest.mark.parametrize("scale", (1.0, 4.0, 8.0, 16.0))
@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("float32", "bfloat16", "float16")
)
@pytest.mark.parametrize("gated", (False, True), ids=("", "gated"))
@pytest.mark.parametrize("layout", (PLAIN, TEXT), ids=("whole tiles", "partial tiles and text"))
def test_low_precision_is_as_good_as_the_definition(
    layout: fs.TileLayout, gated: bool, dtype: torch.dtype, scale: float
) -> None:
    case = Case(layout, layout, B=1, H=2, G=1, D=16, dtype=dtype, scale=scale, seed=int(scale))
    compare(case, case.selection(0.5), gated)


@pytest.mark.parametrize("gated", (False, True), ids=("", "gated"))
def test_gradients_are_those_of_finite_differences(gated: bool) -> None:
    layout = fs.TileLayout(grid=(2, 2, 3), tile=(2, 1, 2), text_first=1, text_last=2)
    case = Case(layout, layout, B=1, H=2, G=1, D=2, dtype=torch.float64, scale=1.0, seed=1)
    selection = case.selection(0.5)
    inputs = [*case.qkv(), *(coarse_and_gate(case) if gated else ())]
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: by_op(case, selection, list(x)), leaves, fast_mode=True)


@given(cases(dtypes=(torch.float32, torch.bfloat16, torch.float64), cross=True), st.floats(0, 1))
def test_without_a_gate_it_is_the_gather_backend_to_the_bit(case: Case, share: float) -> None:
    selection, inputs = case.selection(share, empty=True), [*case.qkv()]
    grad = case.randn(case.H, case.layout, 7)

    def by_gather(x: list[Tensor]) -> tuple[Tensor, Tensor]:
        k, v = (case.kv_layout.to_tiles(y) for y in x[1:])
        out, lse = gather.attend(x[0], k, v, selection, case.D**-0.5, wants_lse=True)
        assert lse is not None
        return out, lse

    mine, other = (outcome(f, inputs, grad, None) for f in (lambda x: by_op(case, selection, x), by_gather))
    assert all(torch.equal(one, two) for one, two in zip(mine[0], other[0], strict=True))
    assert torch.equal(mine[1], other[1])


@pytest.mark.parametrize("per_batch", (False, True))
@pytest.mark.parametrize("gated", (False, True), ids=("", "gated"))
def test_tokens_past_given_counts_are_not_seen(gated: bool, per_batch: bool) -> None:
    case = Case(TEXT, TEXT, B=2, H=2, G=1, D=8, dtype=torch.float32, scale=1.0, seed=5)
    most = TEXT.index("cpu")[2]
    counts = torch.minimum(torch.randint(0, 17, (2, len(most)) if per_batch else (len(most),)).int(), most)
    counts[..., 1] = 0
    selection = replace(case.selection(0.6), tile_counts=counts)
    compare(case, selection, gated)


def test_packed_queries_are_computed_alone() -> None:
    layout = fs.TileLayout(grid=(4, 4, 4), tile=(2, 4, 4), text_last=5)
    case = Case(layout, layout, B=1, H=2, G=2, D=8, dtype=torch.float32, scale=1.0, seed=2)
    q, k, v = case.qkv()
    selection = fs.BSA(kv_density=0.5).select(q, k, layout)
    assert selection.query_rows < layout.slots
    out, lse = by_op(case, selection, [q, k, v])
    mask = oracle.token_mask(selection.keep(), layout)
    expected, expected_lse = oracle.attention(q, k, v, mask, case.D**-0.5)
    assert selection.queries is not None
    source = selection.queries.source.long()
    torch.testing.assert_close(out, expected.gather(2, source[..., None].expand_as(out)))
    torch.testing.assert_close(lse, expected_lse.gather(2, source))


@pytest.mark.parametrize("gated", (False, True), ids=("", "gated"))
def test_rows_that_see_nothing_are_zero_and_move_nothing(gated: bool) -> None:
    case = Case(PLAIN, PLAIN, B=1, H=1, G=1, D=8, dtype=torch.float32, scale=1.0, seed=6)
    keep = torch.zeros(1, 1, PLAIN.num_tiles, PLAIN.num_tiles, dtype=torch.bool)
    inputs = [*case.qkv(), *(coarse_and_gate(case) if gated else ())]
    grad = case.randn(1, PLAIN, 7)
    (out, dq, dk, dv, *rest), lse = outcome(
        lambda x: by_op(case, TileSelection.from_mask(keep, PLAIN), x), inputs, grad, None
    )
    assert bool((lse == -math.inf).all())
    for x in (dq, dk, dv, *(() if gated else (out,))):
        assert bool((x == 0).all())
    assert all(bool(x.abs().sum() > 0) for x in rest)


def test_gate_and_coarse_output_of_extra_rows_have_no_part() -> None:
    case = Case(TEXT, TEXT, B=1, H=2, G=2, D=8, dtype=torch.float32, scale=1.0, seed=3)
    selection, (coarse, gate) = case.selection(0.5), coarse_and_gate(case)
    ungated, _ = by_op(case, selection, [*case.qkv()])
    out, _ = by_op(case, selection, [*case.qkv(), coarse, gate])
    ends = [*range(3), *range(TEXT.seq_len - 20, TEXT.seq_len)]
    assert torch.equal(out[:, :, ends], ungated[:, :, ends])
    assert not torch.equal(out, ungated)
    results, _ = outcome(lambda x: by_op(case, selection, x), [*case.qkv(), coarse, gate], torch.ones_like(out), None)
    assert bool((results[-1][:, :, ends] == 0).all())


def test_a_gate_of_zero_is_no_gate_and_one_adds_the_coarse_output() -> None:
    case = Case(PLAIN, PLAIN, B=1, H=2, G=2, D=8, dtype=torch.float32, scale=1.0, seed=3)
    selection, (coarse, gate) = case.selection(0.5), coarse_and_gate(case)
    plain, _ = by_op(case, selection, [*case.qkv()])
    assert torch.equal(by_op(case, selection, [*case.qkv(), coarse, gate * 0])[0], plain)
    added, _ = by_op(case, selection, [*case.qkv(), coarse, torch.ones_like(gate)])
    tiles = PLAIN.to_raster(coarse.repeat_interleave(PLAIN.slots, 2))
    torch.testing.assert_close(added, plain + tiles)


def test_a_gated_sum_is_rounded_once() -> None:
    """A fine output rounded to bfloat16 before the sum would lose what the coarse output cancels."""
    case = Case(PLAIN, PLAIN, B=1, H=1, G=1, D=8, dtype=torch.bfloat16, scale=1.0, seed=3)
    q, k, v = (x.abs() + 1 for x in case.qkv())
    keep = TileSelection.from_mask(torch.ones(1, 1, *(PLAIN.num_tiles,) * 2, dtype=torch.bool), PLAIN)
    fine, _ = oracle.attention(q.float(), k.float(), v.float(), oracle.token_mask(keep.keep(), PLAIN), 8**-0.5)
    coarse = -PLAIN.video(PLAIN.to_tiles(fine)).mean(3)
    out, _ = by_op(case, keep, [q, k, v, coarse, torch.ones_like(q)])
    expected = fine + PLAIN.to_raster(coarse.repeat_interleave(PLAIN.slots, 2))
    torch.testing.assert_close(out, expected.bfloat16(), atol=2e-5, rtol=2**-7)


def test_the_log_sum_exp_is_left_out_where_it_is_not_wanted() -> None:
    case = Case(PLAIN, PLAIN, B=1, H=1, G=1, D=8, dtype=torch.float32, scale=1.0, seed=3)
    tiles = [PLAIN.to_tiles(x) for x in case.qkv()]
    rest = (None, None, *case.selection(0.5).operands(), 0.3)
    (out, lse), (other, none) = op(*tiles, *rest, True), op(*tiles, *rest, False)
    assert torch.equal(out, other)
    assert (tuple(lse.shape), tuple(none.shape)) == ((1, 1, PLAIN.padded_len), (1, 1, 0))


def flops(share: int, direction: str, layout: fs.TileLayout) -> int:
    """Multiplications and additions with ``share`` of 8 tiles kept in every row."""
    keep = torch.zeros(1, 2, layout.num_tiles, layout.num_tiles, dtype=torch.bool)
    keep[..., :share] = True
    case = Case(layout, layout, B=1, H=2, G=1, D=8, dtype=torch.float32, scale=1.0, seed=3)
    selection = TileSelection.from_mask(keep, layout)
    q, k, v = (layout.to_tiles(x).contiguous() for x in case.qkv())
    bits, counts, kv_counts, rows, first, _, *sizes, _, _, _ = selection.operands()
    tensors, sizes = (bits, counts, kv_counts), (rows, first, *sizes)
    out, lse = gathered.forward(q, k, v, *tensors, *sizes, 0.3, True)
    with FlopCounterMode(display=False) as counter:
        if direction == "forward":
            gathered.forward(q, k, v, *tensors, *sizes, 0.3, True)
        else:
            gathered.backward(torch.ones_like(out), None, q, k, v, out, lse, *tensors, *sizes, 0.3)
    return counter.get_total_flops()


@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_half_the_tiles_are_half_the_work(direction: str) -> None:
    layout = fs.TileLayout(grid=(2, 8, 8), tile=(2, 2, 4))
    one, two, four, eight = (flops(n, direction, layout) for n in (1, 2, 4, 8))
    products = {"forward": 2, "backward": 5}[direction]
    tokens = layout.seq_len
    assert eight == products * 2 * 2 * tokens * tokens * 8, "heads x multiply and add x pairs x head dim"
    assert eight == 2 * four == 4 * two == 8 * one


@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_rows_of_different_counts_cost_their_own_counts(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row that keeps everything does not make the others pay, where chunks are of a row each."""
    layout = fs.TileLayout(grid=(2, 8, 8), tile=(2, 2, 4))
    monkeypatch.setitem(gathered.CHUNK_ENTRIES, direction, 1)
    keep = torch.zeros(1, 1, layout.num_tiles, layout.num_tiles, dtype=torch.bool)
    keep[..., 0] = keep[0, 0, 3] = True
    q = torch.randn(1, 1, layout.padded_len, 8)
    bits, counts = pack_bits(keep), keep.sum(-1, dtype=torch.int32)
    arguments = (bits, counts, layout.index("cpu")[2], layout.slots, 0, 0, layout.num_tiles, layout.slots, 0.3)
    out, lse = gathered.forward(q, q, q, *arguments, True)
    with FlopCounterMode(display=False) as counter:
        if direction == "forward":
            gathered.forward(q, q, q, *arguments, True)
        else:
            gathered.backward(torch.ones_like(out), None, q, q, q, out, lse, *arguments)
    products = {"forward": 2, "backward": 5}[direction]
    assert counter.get_total_flops() == products * 2 * layout.slots**2 * 8 * int(counts.sum())


def test_what_the_templates_refuse_is_said_with_a_remedy() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(templates_refuse(dtype, d, r, s) is None for d in HEAD_DIMS for r in ROWS for s in ROWS)
    for case, word in (
        ((torch.float64, 64, 64, 64), "float64"),
        ((torch.float32, 12, 64, 64), "head dims"),
        ((torch.float32, 264, 64, 64), "head dims"),
        ((torch.float32, 64, 512, 64), "tiles of 16 to 256 slots"),
        ((torch.float32, 64, 64, 8), "tiles of 16 to 256 slots"),
    ):
        reason = templates_refuse(*case)
        assert reason is not None and word in reason and "use" in reason


@settings(max_examples=10)
@given(st.integers(0, 100))
def test_results_are_contiguous_whatever_the_strides_of_the_inputs(seed: int) -> None:
    case = Case(PLAIN, PLAIN, B=2, H=2, G=2, D=8, dtype=torch.float32, scale=1.0, seed=seed)
    tiles = [PLAIN.to_tiles(x) for x in case.qkv()]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tiles]
    plain = [x.clone().requires_grad_() for x in tiles]
    rest = (None, None, *case.selection(0.5).operands(), 0.3, True)
    results = []
    for inputs in (plain, strided):
        out, lse = op(*inputs, *rest)
        assert out.is_contiguous() and lse.is_contiguous()
        grad = torch.ones(out.shape).transpose(1, 2).contiguous().transpose(1, 2)
        results.append([out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad)])
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, atol=0, rtol=0)


@pytest.mark.parametrize("gated", (False, True), ids=("", "gated"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64), ids=str)
def test_the_output_is_saved_once(dtype: torch.dtype, gated: bool) -> None:
    case = Case(PLAIN, PLAIN, B=1, H=2, G=2, D=8, dtype=dtype, scale=1.0, seed=3)
    tiles = [PLAIN.to_tiles(x).requires_grad_() for x in case.qkv()]
    coarse, gate = coarse_and_gate(case)
    extra = (coarse, PLAIN.to_tiles(gate)) if gated else (None, None)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        out, lse = op(*tiles, *extra, *case.selection(0.5).operands(), 0.3, True)
    assert out.dtype == dtype
    for result in (out, lse):
        assert sum(x.data_ptr() == result.data_ptr() for x in saved) == 1


def test_the_templates_need_the_output() -> None:
    x = torch.zeros(1, 1, 16, 16)
    with pytest.raises(ValueError, match="out is None"):
        run_backward(x, None, x, x, x, None, x[..., 0], None, None, x, x, x, *(0,) * 9)


def fused(x: Tensor) -> Tensor:
    """One of three tensors that a linear map leaves in each row."""
    return torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)


MEMORY = {
    "contiguous": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused": fused,
    "expanded": lambda x: x[:1].transpose(1, 2).contiguous().transpose(1, 2).expand(x.shape),
    "tokens first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "rows apart": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize(("kv", "gated"), (("contiguous", True), ("fused", False)), ids=("gated", "fused kv"))
@pytest.mark.parametrize(
    "rows", [pytest.param(x, marks=pytest.mark.slow if x in ("contiguous", "tokens first") else ()) for x in MEMORY]
)
def test_strides_on_cuda_are_those_that_a_compiler_is_told(rows: str, kv: str, gated: bool) -> None:
    """The templates' results in Triton's interpreter against the ops' fake ones for a GPU."""
    case = Case(PLAIN, PLAIN, B=2, H=4, G=2, D=16, dtype=torch.float32, scale=1.0, seed=3)
    q, k, v = (PLAIN.to_tiles(x) for x in case.qkv())
    coarse, gate = coarse_and_gate(case)
    q, k, v = MEMORY[rows](q), MEMORY[kv](k), MEMORY[rows](v)
    extra = (coarse, MEMORY[rows](PLAIN.to_tiles(gate))) if gated else (None, None)
    grad = MEMORY[kv](torch.ones(q.shape))
    operands = case.selection(0.5).operands()
    out, lse = run_forward(q, k, v, *extra, *operands, 0.3, True)
    grads = run_backward(grad, None, q, k, v, out, lse, *extra, *operands, 0.3)
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(x: Any) -> Any:
            return (
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
            )

        told = op(*map(fake, (q, k, v, *extra, *operands)), 0.3, True)
        backward = torch.ops.flexsparse.tile_attention_backward
        told += backward(*map(fake, (grad, None, q, k, v, out, lse, *extra, *operands)), 0.3)
    for name, real, other in zip(("out", "lse", *NAMES[1:]), (out, lse, *grads), told, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (other.shape, other.stride(), other.dtype), name
