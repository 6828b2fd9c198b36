"""Properties of `sparse_attention` that hold for every grid, tile, number of heads and builder."""

import oracle
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases
from torch import Tensor

import flexsparse as fs
from flexsparse.masks import MaskBuilder

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = st.sampled_from(("reference", "gather"))


@st.composite
def builders(draw: st.DrawFn, coarse: bool = False) -> MaskBuilder:
    """Any builder that fits any grid; with ``coarse`` one that has a coarse output."""
    within = draw(st.sampled_from((None, fs.SlidingTile(window=(2, 2, 2)))))
    vsa = fs.VSA(sparsity=draw(st.sampled_from((0.3, 0.6, 0.9))), within=within)
    top_p = fs.TopP(mass=draw(st.sampled_from((0.3, 0.7))), within=within)
    if coarse:
        return draw(st.sampled_from((vsa, top_p, fs.Union(vsa, fs.SlidingTile(window=(1, 1, 1))))))
    bsa = fs.BSA(kv_density=draw(st.sampled_from((0.2, 0.5))), within=within)
    return draw(st.sampled_from((vsa, top_p, bsa, fs.Radial(), fs.Intersection(vsa, top_p))))


def run(case: Case, builder: object, backend: str, qkv: tuple[Tensor, ...], **options: object) -> Tensor:
    return fs.sparse_attention(*qkv, case.layout, builder, backend=backend, **options)  # type: ignore[arg-type]


@given(cases(dtypes=(torch.float32, torch.float64), cross=True), BACKENDS)
def test_keeping_every_tile_is_dense_attention(case: Case, backend: str) -> None:
    q, k, v = case.qkv()
    heads = case.H // case.G
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    )
    M = case.kv_layout.num_tiles
    for builder in (fs.VSA(top_k=M), fs.VSA(sparsity=0.0), fs.TopP(mass=1), fs.Dense()):
        out = run(case, builder, backend, (q, k, v), kv_layout=case.kv_layout)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


@given(cases(dtypes=(torch.float64,)), builders(), BACKENDS)
def test_samples_of_a_batch_are_independent(case: Case, builder: MaskBuilder, backend: str) -> None:
    qkv = case.qkv()
    together = run(case, builder, backend, qkv)
    for b in range(case.B):
        alone = run(case, builder, backend, tuple(x[b : b + 1] for x in qkv))
        torch.testing.assert_close(together[b : b + 1], alone)


@given(cases(dtypes=(torch.float64,)), builders(), BACKENDS)
def test_heads_are_independent_and_read_their_groups_keys(case: Case, builder: MaskBuilder, backend: str) -> None:
    q, k, v = case.qkv()
    together = run(case, builder, backend, (q, k, v))
    for h in range(case.H):
        g = h // (case.H // case.G)
        alone = run(case, builder, backend, (q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1]))
        torch.testing.assert_close(together[:, h : h + 1], alone)


@given(cases(dtypes=(torch.float64,)), builders(coarse=True), BACKENDS)
def test_the_output_is_fine_times_its_gate_plus_gate_times_coarse(
    case: Case, builder: MaskBuilder, backend: str
) -> None:
    qkv = case.qkv()
    gate, other, fine_gate = (case.randn(case.H, case.layout, salt) for salt in (5, 6, 7))
    fine = run(case, builder, backend, qkv)
    assert torch.equal(run(case, builder, backend, qkv, gate=torch.zeros_like(gate)), fine)
    torch.testing.assert_close(run(case, builder, backend, qkv, fine_gate=fine_gate), fine * fine_gate)
    one, two = (run(case, builder, backend, qkv, gate=x) - fine for x in (gate, other))
    mixed = run(case, builder, backend, qkv, gate=2 * gate - 3 * other) - fine
    torch.testing.assert_close(mixed, 2 * one - 3 * two)
    _, aux = fs.sparse_attention(*qkv, case.layout, builder, backend=backend, return_aux=True)
    assert aux.coarse_out is not None
    first = case.layout.tiles_first
    for token, (tile, _) in enumerate(oracle.places(case.layout)):
        row = tile - first
        is_video = 0 <= row < case.layout.num_tiles
        expected = gate[:, :, token] * (aux.coarse_out[:, :, row] if is_video else 0)
        torch.testing.assert_close(one[:, :, token], expected)


@given(cases(dtypes=(torch.float64,), text=False), BACKENDS)
def test_tokens_of_a_tile_may_be_exchanged_among_themselves(case: Case, backend: str) -> None:
    layout = case.layout
    order = torch.arange(layout.seq_len)
    tiles = torch.tensor([place.tile for place in oracle.places(layout)])
    for tile in range(layout.num_tiles):
        inside = (tiles == tile).nonzero()[:, 0]
        order[inside] = inside[torch.randperm(len(inside), generator=case.generator(9))]
    qkv = case.qkv()
    builder = fs.VSA(sparsity=0.6)
    exchanged = run(case, builder, backend, tuple(x[:, :, order] for x in qkv))
    torch.testing.assert_close(exchanged, run(case, builder, backend, qkv)[:, :, order])


@given(cases(dtypes=(torch.float64,)), st.data())
def test_a_larger_top_k_keeps_what_a_smaller_one_keeps(case: Case, data: st.DataObject) -> None:
    q, k, _ = case.qkv()
    M = case.layout.num_tiles
    low = data.draw(st.integers(1, M))
    high = data.draw(st.integers(low, M))
    less, more = (fs.VSA(top_k=n).select(q, k, case.layout).keep() for n in (low, high))
    assert not bool((less & ~more).any())
    assert bool((more.sum(-1) == high).all())


@given(cases(dtypes=(torch.float32, torch.bfloat16), scales=(1.0, 16.0)), builders(), BACKENDS)
def test_outputs_and_gradients_are_finite_and_of_the_inputs_dtype(
    case: Case, builder: MaskBuilder, backend: str
) -> None:
    inputs = [x.requires_grad_() for x in case.qkv()]
    out = run(case, builder, backend, tuple(inputs))
    grads = torch.autograd.grad(out.float().square().sum(), inputs, allow_unused=True)
    for x in (out, *grads):
        assert x is not None and x.dtype == case.dtype and bool(x.isfinite().all())


@given(cases(dtypes=(torch.float64,), text=False), builders(), BACKENDS)
def test_unselected_tokens_change_nothing_and_get_exactly_no_gradient(
    case: Case, builder: MaskBuilder, backend: str
) -> None:
    q, k, v = (x.requires_grad_() for x in case.qkv())
    selection = builder.select(q, k, case.layout)
    seen = oracle.token_mask(selection.keep(), case.layout)  # [B, H, S, S]
    token = 0  # what the first query sees, and what it does not
    out = run(case, selection, backend, (q, k, v))[:, :, token]
    source = token if selection.queries is None else selection.queries.source[..., token].long()
    visible = (
        seen[:, :, token]
        if selection.queries is None
        else seen.gather(
            2,
            source[..., None, None].expand(*seen.shape[:2], 1, seen.shape[3]),  # type: ignore[union-attr]
        )[:, :, 0]
    )
    unseen = ~visible.unflatten(1, (case.G, -1)).any(2)
    _, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert bool((dk[unseen] == 0).all()) and bool((dv[unseen] == 0).all())
    other_k, other_v = (x.detach().masked_fill(unseen[..., None], 50.0) for x in (k, v))
    again = run(case, selection, backend, (q.detach(), other_k, other_v))[:, :, token]
    torch.testing.assert_close(again, out.detach())


@given(cases(dtypes=(torch.float64,)))
def test_planted_tiles_are_found_and_attended_end_to_end(case: Case) -> None:
    """Each query tile points at one KV tile, far above the others: the result is known without any selection."""
    layout = case.layout
    q, k, v = case.qkv()
    N = layout.num_tiles
    target = torch.randperm(N, generator=case.generator(8))
    code = torch.eye(N, dtype=torch.float64)
    first, last = layout.tiles_first, layout.tiles_first + N
    tile = torch.tensor([place.tile for place in oracle.places(layout)])
    video = (tile >= first) & (tile < last)
    row = (tile - first).clamp(0, N - 1)
    wide_q, wide_k, wide_v = (
        torch.cat([x, torch.zeros(*x.shape[:3], N, dtype=x.dtype)], -1) for x in (q * 0.01, k * 0.01, v)
    )
    wide_q[..., case.D :] += (code[target][row] * 100) * video[:, None]
    wide_k[..., case.D :] += (code[row] * 100) * video[:, None]
    out = fs.sparse_attention(wide_q, wide_k, wide_v, layout, fs.VSA(top_k=1), scale=1.0)
    keep = code[target].bool().expand(case.B, case.H, N, N)
    mask = oracle.token_mask(keep, layout)
    expected, _ = oracle.attention(wide_q, wide_k, wide_v, mask, 1.0)
    torch.testing.assert_close(out, expected)


@given(cases(), builders(), BACKENDS)
def test_strides_do_not_matter(case: Case, builder: MaskBuilder, backend: str) -> None:
    """Models hand in transposed views, and the gradient of a sum is an expanded scalar."""
    plain = [x.requires_grad_() for x in case.qkv()]
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in plain]
    results = []
    for inputs in (plain, strided):
        out = run(case, builder, backend, tuple(inputs))
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@given(cases(dtypes=(torch.float64,)), st.sampled_from((0, 1, 2)), BACKENDS)
def test_one_input_may_be_trained_alone(case: Case, which: int, backend: str) -> None:
    inputs = list(case.qkv())
    selection = case.selection()
    inputs[which].requires_grad_()
    (alone,) = torch.autograd.grad(run(case, selection, backend, tuple(inputs)).square().sum(), inputs[which])
    everything = [x.detach().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(run(case, selection, backend, tuple(everything)).square().sum(), everything)
    torch.testing.assert_close(alone, grads[which])


@given(cases(dtypes=(torch.float32, torch.bfloat16)), BACKENDS)
def test_a_checkpointed_call_recomputes_the_same(case: Case, backend: str) -> None:
    inputs = [x.requires_grad_() for x in case.qkv()]
    builder = fs.BSA(kv_density=0.4)

    def attend(*qkv: Tensor) -> Tensor:
        return run(case, builder, backend, qkv)

    expected = torch.autograd.grad(attend(*inputs).float().square().sum(), inputs)
    out = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(out.float().square().sum(), inputs), expected):
        assert torch.equal(actual, wanted)
