"""The gather backend's op: gradients by finite differences, promises to the compiler, chunks, padding."""

import oracle
import pytest
import torch
from hypothesis import given
from strategies import Case, cases
from torch import Tensor

import flexsparse as fs
from flexsparse.backends import gather
from flexsparse.ops import gathered

pytestmark = pytest.mark.usefixtures("poisoned")

TEXT = fs.TileLayout(grid=(2, 3, 3), tile=(2, 2, 2), text_first=2, text_last=3)
SMALL = Case(TEXT, TEXT, B=2, H=2, G=1, D=2, dtype=torch.float64, scale=1.0, seed=3)


def arguments(case: Case, wants_lse: bool = True) -> tuple[object, ...]:
    """Arguments of the op for a random selection."""
    layout, selection = case.layout, case.selection(0.4, empty=True)
    q, k, v = (layout.to_tiles(x).detach() for x in case.qkv())
    tiles = (
        layout.slots,
        layout.tiles_first * layout.slots,
        layout.tiles_first,
        layout.num_tiles,
        layout.slots,
    )
    return (q, k, v, selection.bits, selection.counts, layout.tile_counts, *tiles, case.D**-0.5, wants_lse)


@pytest.mark.parametrize("backend", ("reference", "gather"))
@pytest.mark.parametrize("share", (0.0, 0.5))
def test_gradients_are_those_of_finite_differences(backend: str, share: float) -> None:
    selection = SMALL.selection(share, empty=True)
    inputs = tuple(x.requires_grad_() for x in SMALL.qkv())

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = fs.sparse_attention(*qkv, TEXT, selection, backend=backend, return_aux=True)
        return out, aux.lse

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)  # along one random direction


@pytest.mark.parametrize("backend", ("reference", "gather"))
def test_gradients_through_gates_and_pruned_queries_are_those_of_finite_differences(backend: str) -> None:
    layout = fs.TileLayout(grid=(2, 3, 3), tile=(2, 2, 3))
    case = Case(layout, layout, B=1, H=2, G=2, D=4, dtype=torch.float64, scale=1.0, seed=4)
    q, k, v = case.qkv()
    pruned = fs.BSA(kv_density=0.5).select(q, k, layout)
    vsa = fs.VSA(top_k=1)  # finite differences move no score past another
    gates = torch.randn(2, 1, 2, layout.seq_len, 4, dtype=torch.float64).unbind()
    inputs = tuple(x.requires_grad_() for x in (q, k, v, *gates))

    def with_pruning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, layout, pruned, backend=backend)

    def with_gates(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, fine_gate: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, layout, vsa, gate=gate, fine_gate=fine_gate, backend=backend)

    assert torch.autograd.gradcheck(with_pruning, inputs[:3], fast_mode=True)  # along one random direction
    assert torch.autograd.gradcheck(with_gates, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("wants_lse", (False, True))
def test_the_op_keeps_its_promises_to_the_compiler(dtype: torch.dtype, wants_lse: bool) -> None:
    case = Case(TEXT, TEXT, B=2, H=2, G=1, D=4, dtype=dtype, scale=1.0, seed=3)
    given_ = arguments(case, wants_lse)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gather.gather_attention, given_, test_utils=tests)
    if wants_lse:
        q, k, v = (x.detach().requires_grad_() for x in given_[:3])  # type: ignore[attr-defined]
        torch.library.opcheck(gather.gather_attention, (q, k, v, *given_[3:]), atol=1e-2, rtol=1e-2)


@given(cases(cross=True))
def test_chunks_of_any_size_compute_the_same(case: Case) -> None:
    selection = case.selection(0.4, empty=True)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for entries in (1, 3000, 1 << 30):
            for budget in list(gathered.CHUNK_ENTRIES):
                patch.setitem(gathered.CHUNK_ENTRIES, budget, entries)
            out, aux = fs.sparse_attention(
                q, k, v, case.layout, selection, kv_layout=case.kv_layout, backend="gather", return_aux=True
            )
            results.append((out, aux.lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one in results[1:]:
        for actual, expected in zip(one, results[0]):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@given(cases(dtypes=(torch.float32, torch.bfloat16), scales=(1.0, 8.0)))
def test_whatever_finite_stands_in_padding_is_not_seen(case: Case) -> None:
    given_ = arguments(case)
    clean = [x.requires_grad_() for x in given_[:3]]  # type: ignore[attr-defined]
    padding = (case.layout.index()[0] < 0)[:, None]
    dirty = [x.detach().masked_fill(padding, 1e4).requires_grad_() for x in clean]
    results = []
    for q, k, v in ((clean[0], *clean[1:]), (clean[0], *dirty[1:])):
        out, lse = gather.gather_attention(q, k, v, *given_[3:])
        g = case.layout.to_tiles(case.randn(case.H, case.layout, 7))
        results.append((out, lse, *torch.autograd.grad(out, (q, k, v), g)))
    rows = ~padding[:, 0]
    for actual, expected in zip(results[1], results[0]):
        assert torch.equal(actual[:, :, rows], expected[:, :, rows])


@given(cases(cross=True, text=False))
def test_tiles_that_no_row_keeps_get_exactly_no_gradient(case: Case) -> None:
    keep = case.keep()
    keep[..., 0] = False
    selection = fs.TileSelection.from_mask(keep, case.layout, case.kv_layout)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    for backend in ("reference", "gather"):
        out = fs.sparse_attention(q, k, v, case.layout, selection, kv_layout=case.kv_layout, backend=backend)
        _, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
        unseen = ~oracle.token_mask(keep, case.layout, case.kv_layout).any(2)  # [B, H, Z]
        unseen = unseen.unflatten(1, (case.G, -1)).all(2)
        assert bool(unseen.any()) and bool((dk[unseen] == 0).all()) and bool((dv[unseen] == 0).all())


def test_the_gradient_of_the_log_sum_exp_alone_is_right() -> None:
    selection = SMALL.selection(0.5)
    grads = []
    for backend in ("reference", "gather"):
        q, k, v = (x.requires_grad_() for x in SMALL.qkv())
        _, aux = fs.sparse_attention(q, k, v, TEXT, selection, backend=backend, return_aux=True)
        grads.append(torch.autograd.grad(aux.lse.square().sum(), (q, k)))
    torch.testing.assert_close(grads[0], grads[1])
