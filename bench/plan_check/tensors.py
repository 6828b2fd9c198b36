"""Bytes of a real step's tensors beside those of its plan: weights, gradients, optimizer, saved activations, lists."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.plan_check.cases import Case, inputs_of, model_of, optimizer_of, step_of
from flexsparse.analysis.capture import watch
from flexsparse.planning import evaluate, measure


class Alive(TorchDispatchMode):
    """The most bytes of storages that were alive at once, of what was made under the mode.

    What a kernel needs in passing is not seen: attention is one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.held:
                self.count(x.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        """One that was just made; its object lives as long as its memory."""
        place, size = storage._cdata, storage.nbytes()
        self.held.add(place)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def gone() -> None:
            self.held.discard(place)
            self.bytes -= size

        weakref.finalize(storage, gone).atexit = False


def alive(case: Case, model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes alive at once in a forward and backward; gradients are there before."""
    with Alive() as mode:
        step_of(case, model, inputs)()
    return mode.peak


def saved(model: nn.Module, inputs: dict[str, Any]) -> int:
    """What autograd saves in a forward, each storage once, without parameters and buffers."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(**inputs)[0]
    del out
    return sum(x.untyped_storage().nbytes() for place, x in held.items() if place not in own)


def lists(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """(bitmasks of all sparse calls, lists and columns of the call that has most)."""
    masks, most = [0], [0]

    def each(call: Any) -> None:
        found = call.selection
        masks.append(found.bits.nbytes + found.counts.nbytes)
        most.append(found.kv_indices.nbytes + sum(x.nbytes for x in found.transpose()))

    with torch.no_grad(), watch(model, each):
        model(**inputs)
    return sum(masks), max(most)


def counted(case: Case, folder: Path) -> dict[str, tuple[float, int]]:
    """(planned, real) bytes of a training step, by quantity.

    Args:
        case: trains, sparse, uncompiled.
        folder: where the model's configuration is written to.
    """
    settings = case.settings(folder)
    counts = measure(settings)
    memory = evaluate(settings, counts).memory
    model = model_of(case, folder)
    inputs, optimizer = inputs_of(case, model), optimizer_of(case, model)
    step_of(case, model, inputs, optimizer)()
    parameters = list(model.parameters())
    state = [] if optimizer is None else [x for each in optimizer.state.values() for x in each.values()]
    masks, most = lists(model, inputs)
    return {
        "weights": (memory.weights, sum(x.nbytes for x in parameters)),
        "gradients": (memory.gradients, sum(x.grad.nbytes for x in parameters if x.grad is not None)),
        "AdamW's averages": (memory.optimizer, sum(x.nbytes for x in state if x.dim())),
        "alive at once": (counts.sparse.peak, alive(case, model, inputs)),
        "saved for backward": (counts.sparse.saved, saved(model, inputs)),
        "bitmasks": (memory.bitmasks, masks),
        "lists of one call": (memory.lists, most),
    }
