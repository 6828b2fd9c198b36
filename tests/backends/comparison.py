"""One case through a backend, a same-precision reference and the float64 oracle: outputs, lse, all gradients."""

import oracle
import torch
from strategies import Case
from tolerance import assert_as_good, assert_lse, rms
from torch import Tensor

import flexsparse as fs

NAMES = ("out", "dq", "dk", "dv", "dgate", "dfine_gate")


def gates(case: Case) -> tuple[Tensor, Tensor]:
    """A gate of the coarse output and one of the fine output."""
    return case.randn(case.H, case.layout, 5), case.randn(case.H, case.layout, 6)


def gradient_of_output(case: Case) -> Tensor:
    """Small where inputs are large, so that float16 gradients do not overflow."""
    return case.randn(case.H, case.layout, 7, 1 / case.scale)


def defined(case: Case, mask: Tensor, dtype: torch.dtype, source: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Output and gradients in a dtype by the definition, and the log-sum-exp. The gate's factor is the tile mean of v."""
    inputs = [x.to(dtype).requires_grad_() for x in (*case.qkv(), *gates(case))]
    q, k, v, gate, fine_gate = inputs
    out, lse = oracle.attention(q, k, v, mask, case.D**-0.5)
    if source is not None:
        out = out.gather(2, source[..., None].expand_as(out))
        lse = lse.gather(2, source)
    out = out * fine_gate + gate * coarse(case, q, k, v).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, gradient_of_output(case).to(dtype))
    return [out.detach(), *grads], lse.detach()


def coarse(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Pooled attention of each token's tile, zero for extra tokens, from token-level membership matrices."""
    dtype = torch.promote_types(q.dtype, torch.float32)

    def membership(layout: fs.TileLayout) -> Tensor:  # [tiles, tokens], video tiles only
        tile = torch.tensor([place.tile for place in oracle.places(layout)]) - layout.tiles_first
        return (torch.arange(layout.num_tiles)[:, None] == tile).to(dtype)

    rows, columns = membership(case.layout), membership(case.kv_layout)
    pool_q, pool_k = (x / x.sum(-1, keepdim=True) for x in (rows, columns))
    heads = case.H // case.G
    k, v = (x.to(dtype).repeat_interleave(heads, 1) for x in (k, v))
    weights = ((pool_q @ q.to(dtype)) @ (pool_k @ k).transpose(-1, -2) * case.D**-0.5).softmax(-1)
    return rows.T @ (weights @ (pool_k @ v))


class Fixed(fs.VSA):
    """VSA's coarse stage with a selection that is given: top-k itself is not continuous."""

    def plan(self, coarse, v=None):  # type: ignore[no-untyped-def]
        return self.selection, super().plan(coarse, v)[1]  # type: ignore[attr-defined]


def fixed(selection: fs.TileSelection) -> Fixed:
    builder = Fixed(top_k=1)
    object.__setattr__(builder, "selection", selection)
    return builder


def noise_floor(case: Case, name: str) -> float:
    """RMS rounding error of the accumulation where a result cancels to nothing, as with a single key in sight."""
    q, k, v = case.qkv()
    g = gradient_of_output(case)
    eps = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    dp = rms(g) * rms(v) * max(1.0, rms(gates(case)[1])) * case.D**0.5 * 2
    logits = rms(q) * rms(k)
    tokens = case.layout.seq_len**0.5
    sizes = {
        "dq": dp * rms(k) * case.D**-0.5,
        "dk": dp * rms(q) * case.D**-0.5 * tokens,
        "dv": rms(g) * tokens,
    }
    return 2 * eps * (1 + logits) * sizes.get(name, rms(v))


def compare(case: Case, selection: fs.TileSelection, backend: str) -> None:
    """Assert the tolerance rule for output, log-sum-exp and all gradients of a case given a selection."""
    mask = oracle.token_mask(selection.keep(), case.layout, case.kv_layout, selection.tile_counts)
    source = None if selection.queries is None else selection.queries.source.long()
    gold, lse = defined(case, mask, torch.float64, source)
    reference, _ = defined(case, mask, case.dtype, source)
    inputs = [x.requires_grad_() for x in (*case.qkv(), *gates(case))]
    q, k, v, gate, fine_gate = inputs
    out, aux = fs.sparse_attention(
        *(q, k, v, case.layout, fixed(selection)),
        gate=gate,
        fine_gate=fine_gate,
        kv_layout=case.kv_layout,
        backend=backend,
        return_aux=True,
    )
    grads = torch.autograd.grad(out, inputs, gradient_of_output(case))
    assert aux.backend == backend
    for name, actual, same, exact in zip(NAMES, (out, *grads), reference, gold):
        assert_as_good(actual, same, exact, f"{backend} {name}", noise_floor(case, name))
    largest = float((q.detach().norm(dim=-1).max() * k.detach().norm(dim=-1).max()).double() * case.D**-0.5)
    assert_lse(aux.lse, lse, largest)
