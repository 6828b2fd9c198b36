"""Lists are workspace: what is kept for the backward is a bitmask and counts, and the lists of one direction live at a time."""

import weakref

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.compile_passes.templates.backward import backward
from flexsparse.compile_passes.templates.forward import forward

LAYOUT = fs.TileLayout(grid=(2, 20, 20), tile=(1, 4, 4))
HEADS, KEPT, D = 1, 5, 16  # 5 of 50 tiles: density 0.1


class Peak:
    """Bytes of integer tensors alive at once, of those that `torch.empty` and its kin made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        for name in ("empty", "zeros", "cumsum"):
            patch.setattr(torch, name, self.watched(getattr(torch, name)))

    def watched(self, make):  # type: ignore[no-untyped-def]
        def run(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            if not out.is_floating_point():
                size = out.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(out, self.free, size)
            return out

        return run

    def free(self, size: int) -> None:
        self.now -= size


def test_lists_of_both_directions_stay_below_three_entries_for_each_kept_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = torch.randn(4, 1, HEADS, LAYOUT.padded_len, D).unbind()
    scores = torch.rand(1, HEADS, LAYOUT.num_tiles, LAYOUT.num_tiles)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(KEPT).indices, True)
    selection = fs.TileSelection.from_mask(keep, LAYOUT, capacity=KEPT)
    sizes = {"query_rows": 16, "first_rows": 0, "kv_first": 0, "kv_video": LAYOUT.num_tiles, "slots": 16}
    sizes |= {"capacity": KEPT, "partial": False}
    operands = (selection.bits, selection.counts, selection.kv_tile_counts()[None], None, None)
    peak = Peak(monkeypatch)
    out, lse = forward(q, k, v, *operands, scale=0.25, **sizes)  # type: ignore[arg-type]
    assert 0 < peak.most <= 3 * 4 * int(keep.sum())
    backward(grad, None, q, k, v, out, lse, *operands, scale=0.25, **sizes)  # type: ignore[arg-type]
    assert peak.most <= 3 * 4 * int(keep.sum()), peak.most


def test_the_backward_keeps_no_list() -> None:
    inputs = [torch.randn(1, HEADS, LAYOUT.seq_len, D, requires_grad=True) for _ in range(3)]
    saved: list[Tensor] = []
    selection = fs.VSA(top_k=KEPT).select(inputs[0], inputs[1], LAYOUT)
    rows, k, v = (LAYOUT.to_tiles(x) for x in inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        torch.ops.flexsparse.tile_attention(rows, k, v, None, None, *selection.operands(), 0.25, True)
    integers = {x.data_ptr(): x.untyped_storage().nbytes() for x in saved if not x.is_floating_point()}
    assert sum(integers.values()) == sum(
        x.nbytes for x in (selection.bits, selection.counts, selection.kv_tile_counts())
    )
