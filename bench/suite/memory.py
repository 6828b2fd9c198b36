"""Bytes instead of time: what autograd keeps for backward, and what lists take.

Shape letters: B batch, H heads, P padded tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.suite import attention, data, parts
from bench.suite.cases import OURS, Case
from bench.suite.device import Device
from bench.suite.rows import Row

MIB = 2**20


def saved_bytes(call: Callable[[], Tensor], without: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd saves while ``call`` runs, those of ``without`` left out."""
    seen: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its address given out again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in left_out:
            seen[storage.data_ptr()] = storage.nbytes()
        held.append(x)
        return x

    left_out = {x.untyped_storage().data_ptr() for x in without}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(seen.values())


def rows(case: Case, device: Device) -> list[Row]:
    """Two rows: saved for backward, against padded q, k, v, o and lse, the gate left out; lists, against 12 bytes an entry."""
    q, k, v, _ = data.tokens(case, device.torch)
    gate = data.gate(case, device.torch)
    layout, mode = case.layout, device.modes[0]
    call = (
        attention.compiled(case, device, layout)[0]
        if mode == "compiled"
        else attention.eager(case, device, layout, layout)
    )
    leaves = tuple(x.requires_grad_() for x in (q, k, v, gate))
    measured = saved_bytes(lambda: call(*leaves), without=(gate,))
    size = q.element_size()
    needed = case.B * case.H * layout.padded_len * (4 * case.D * size + 4)
    fields: dict[str, Any] = {"config": {"mode": mode}, "checked": True, "density": case.density}
    saved = case.row("memory", OURS, part="saved", mib=[measured / MIB], needed_mib=needed / MIB, **fields)
    with torch.no_grad():
        selection = case.builder.select(q.detach(), k.detach(), layout)
        kept = int(selection.counts.sum())
        found = [
            parts.lists_of(selection, device)(),
            parts.columns_of(selection, device)(),
            selection.bits,
            selection.counts,
        ]
    tensors = [x for one in found for x in ([one] if isinstance(one, Tensor) else one)]
    index = sum(x.numel() * x.element_size() for x in tensors)
    lists = case.row("memory", OURS, part="index", mib=[index / MIB], needed_mib=12 * kept / MIB, **fields)
    return [saved, lists]
