"""What watches a model that runs on fake tensors: matrix products, live memory, and what autograd saves.

Fake tensors have shapes and no values. A few inputs (masks) are real, so that a model whose sizes depend on them runs as well.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

SMALL = 2**22
"""Elements of a tensor that is computed with its values; a larger one becomes fake."""
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Ops that make a tensor and write nothing."""
BY_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten._index_put_impl_.default)


def nbytes(x: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return x.numel() * x.element_size()


def identity(x: Tensor) -> int:
    """The same number for tensors of one storage, fake ones included."""
    return int(x.untyped_storage()._cdata)


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions: those that torch's FLOP counter knows, by its own formulas.

    Attributes:
        phase: under which name they are counted.
        found: for each phase, how often a product of (FLOPs, bytes of operands and result) ran.
        moved: for each phase, bytes that all other ops read and write, one after the other as uncompiled PyTorch runs them.
        peak: the most bytes that were alive at once, of what was made under the mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.found: dict[str, Counter[tuple[float, int]]] = {"forward": Counter(), "backward": Counter()}
        self.moved = {"forward": 0, "backward": 0}
        self.live: set[int] = set()
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = with_values(func, args, kwargs)
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        formula = flop_registry.get(func._overloadpacket)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if formula is not None:
            moved = sum(nbytes(x) for x in (*operands, *tensors))
            self.found[self.phase][(float(formula(*args, **kwargs, out_val=out)), moved)] += 1
        else:
            self.moved[self.phase] += traffic(func, operands, tensors)
        for x in tensors:
            self.alive(x)
        return out

    def alive(self, x: Tensor) -> None:
        """Count a tensor's storage until nothing holds it any more, autograd included."""
        storage, key = x.untyped_storage(), identity(x)
        if key in self.live:
            return
        self.live.add(key)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(
            storage, self.gone, key, storage.nbytes()
        ).atexit = False  # a storage's object lives as long as it

    def gone(self, key: int, size: int) -> None:
        """A storage is gone."""
        self.live.discard(key)
        self.bytes -= size


def traffic(func: Any, read: list[Tensor], written: list[Tensor]) -> int:
    """Bytes that an op moves: what it reads, each tensor no further than its storage reaches, and what it writes.

    Views move nothing, nor does what only makes room.
    """
    name = func._overloadpacket.__name__
    if name in EMPTY:
        return 0
    own = {identity(x) for x in read}
    if not func._schema.is_mutable and all(
        identity(x) in own for x in written
    ):  # aten._unsafe_view, which no schema tells
        return 0
    like = name.endswith("_like") or name.startswith("new_")  # reads a shape and no values
    return sum(min(nbytes(x), x.untyped_storage().nbytes()) for x in (*(() if like else read), *written))


def with_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op: with values where all its tensors have some and its result is small, else on fake tensors."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    real = [x for x in tensors if not isinstance(x, FakeTensor)]
    if tensors and not real:
        return func(*args, **kwargs)
    if not tensors:  # a new tensor: integers may be masks and indices
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.is_floating_point() or out.numel() > SMALL:
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    if len(real) == len(tensors):
        try:
            size = max((x.numel() for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)), default=0)
        except (torch._subclasses.fake_tensor.UnsupportedFakeTensorException, RuntimeError):
            size = sum(x.numel() for x in real)  # its size depends on values
        if size <= SMALL:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
    elif func in BY_INDEX:  # by a mask with values: as many rows as it leaves
        args = (args[0], [index for mask in args[1] for index in _positions(mask)], *args[2:])
    return func(*args, **kwargs)


def _positions(mask: Tensor | None) -> list[Tensor | None]:
    if mask is None or isinstance(mask, FakeTensor) or mask.dtype is not torch.bool:
        return [mask]
    with unset_fake_temporarily():
        return list(mask.nonzero(as_tuple=True))


class Saved:
    """What autograd saves for backward, of each storage once, without the model's own tensors.

    Args:
        model: its parameters and buffers are not counted.
        blocks: its repeated blocks.

    Attributes:
        largest: bytes first saved in a forward of one block, of the block that saves most.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        self.own = {identity(x) for x in (*model.parameters(), *model.buffers())}
        self.held: dict[int, Tensor] = {}  # held, so that no storage's identity is given out again
        self.sizes: dict[int, int] = {}
        self.by_block: Counter[int] = Counter()
        self.blocks = blocks
        self.inside: int | None = None

    def pack(self, x: Tensor) -> Tensor:
        """Hook of autograd."""
        key = identity(x)
        if key not in self.own and key not in self.held:
            self.held[key] = x
            self.sizes[key] = x.untyped_storage().nbytes()
            if self.inside is not None:
                self.by_block[self.inside] += self.sizes[key]
        return x

    @property
    def bytes(self) -> int:
        """Of everything saved."""
        return sum(self.sizes.values())

    @property
    def largest(self) -> int:
        """Of the block that saves most."""
        return max(self.by_block.values(), default=0)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is saved in here."""

        def enter(number: int) -> Any:
            return lambda *_: setattr(self, "inside", number)

        def leave(*_: Any) -> None:
            self.inside = None

        handles = [block.register_forward_pre_hook(enter(i)) for i, block in enumerate(self.blocks)]
        handles += [block.register_forward_hook(leave) for block in self.blocks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
                yield
        finally:
            self.held.clear()  # what backward has read must be free to go
            for handle in handles:
                handle.remove()


def values(sizes: Counter[tuple[float, int]]) -> float:
    """FLOPs of a phase."""
    return math.fsum(flops * count for (flops, _), count in sizes.items())


def as_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
