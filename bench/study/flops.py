"""FLOPs of a training step, counted from a model's modules and from the selections measured while it ran.

A multiply-add is two FLOPs, as `torch.utils.flop_counter` counts. Matrix products and pooling are counted; what else is
elementwise (norms, RoPE, softmax, GELU, the loss, the optimizer) is not, nor are comparisons.
Shape letters: B batch, T H W token grid, S tokens, D head dim; in formulas of attention, N query tiles and M KV tiles.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.study.factorized import POOL, CompressedKV, SpatialAttention, TemporalAttention
from bench.study.models import make
from bench.study.settings import Method, Size
from flexsparse.analysis import SparseCall, watch
from flexsparse.demo.model import SelfAttention, VideoDiT
from flexsparse.layout import TileLayout
from flexsparse.masks import BSA, VSA, StaticBuilder, TopP
from flexsparse.planning.attention import BACKWARD, Call
from flexsparse.training.errors import RunError
from flexsparse.wrap import state_of

aten = torch.ops.aten
FIRST = ("patch_in", "time_in.0")
"""Linear layers whose input needs no gradient."""
ONE_ROW = ("time_in.", ".modulation")
"""Parts of the names of linear layers that see one row a sample: the diffusion time. The others see all tokens."""
DENSE: tuple[Any, ...] = ("dense", "spatial", "spatial_temporal", "spatial_full", "compressed_kv")


def _forward(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


FLASH_ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Fused attention on the CPU, which FlopCounterMode does not know: the formulas that it has for fused attention."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one training step, forward and backward.

    Attributes:
        attention: dense attention, or the fine stage: kept tiles whole, padding included.
        selection: the coarse stage: pooling, scores between tiles, the coarse output and its backward, similarities.
        other: linear layers, gates included.
    """

    attention: float
    selection: float
    other: float

    @property
    def total(self) -> float:
        """Everything counted."""
        return self.attention + self.selection + self.other


def count(
    model: nn.Module, size: Size, method: Method, channels: int, kept: tuple[float, float] | None = None
) -> Flops:
    """FLOPs of one training step.

    Args:
        model: of `models.make`.
        size: its size; its batch is the step's.
        method: how it attends.
        channels: of the video or the latents.
        kept: for "sparse", as measured (`Observed.kept`): KV tiles that a row keeps, computed query rows of a tile.

    Raises:
        RunError: arguments that do not go together.
    """
    where = f"{size.name}/{method.name}"
    if not isinstance(model, VideoDiT) or model.patch_in.in_features != channels * size.patch**2:
        raise RunError(f"{where}: channels is {channels}: give the model, the size and the channels it was made with")
    if (kept is None) == (method.attention == "sparse"):
        remedy = "leave it out" if kept is not None else "give what observe() measured"
        raise RunError(f"{where}: kept is {kept} and attention {method.attention!r}: {remedy}")
    other = linear_flops(model, size)
    if kept is None:
        forward = sum(size.batch * size.heads * 4.0 * size.head_dim * pairs(block.attn, size) for block in model.blocks)
        return Flops(attention=(1 + BACKWARD) * forward, selection=0.0, other=other)
    layout = TileLayout(grid=size.grid, tile=method.tile)
    fine = size.depth * fine_flops(size, layout, *kept)
    return Flops(attention=fine, selection=size.depth * selection_flops(size, method, layout), other=other)


def linear_flops(model: nn.Module, size: Size) -> float:
    """FLOPs of all linear layers: a product forward, two backward (one where the input needs no gradient)."""
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows = size.batch * (1 if any(part in name for part in ONE_ROW) else size.tokens)
            products = 2 if name in FIRST else 3
            total += products * 2.0 * rows * module.in_features * module.out_features
    return total


def pairs(attention: SelfAttention, size: Size) -> int:
    """Pairs of query and key that a module of dense attention computes, for one head of one sample."""
    frames, places = size.grid[0], size.grid[1] * size.grid[2]
    if isinstance(attention, SpatialAttention):
        return frames * places**2
    if isinstance(attention, TemporalAttention):
        return places * frames**2
    if isinstance(attention, CompressedKV):
        return size.tokens * math.prod(math.ceil(extent / POOL) for extent in size.grid)
    return size.tokens**2


def fine_flops(size: Size, layout: TileLayout, tiles: float, rows: float) -> float:
    """FLOPs of the fine stage of one block, forward and backward.

    Args:
        size: of the model.
        layout: of queries and keys.
        tiles: KV tiles that a query tile keeps.
        rows: query rows of a tile as computed: its slots, or the packed queries of BSA.
    """
    queries, keys = layout.num_tiles * rows, tiles * layout.slots
    return (1 + BACKWARD) * 4.0 * size.batch * size.heads * size.head_dim * queries * keys


def selection_flops(size: Size, method: Method, layout: TileLayout) -> float:
    """FLOPs of the coarse stage of one block, forward and backward; none for a static builder.

    Raises:
        RunError: a builder of which nothing is known.
    """
    builder = method.builder
    if isinstance(builder, StaticBuilder):
        return 0.0
    if not isinstance(builder, VSA | TopP | BSA):
        raise RunError(
            f"{size.name}/{method.name}: builder is {builder!r}, whose FLOPs are not known: give VSA, TopP, BSA or a static "
            "builder"
        )
    call = Call(
        batch=size.batch,
        heads=size.heads,
        head_dim=size.head_dim,
        layout=layout,
        builder=builder if isinstance(builder, BSA) else VSA(sparsity=0.0),  # its coarse stage asks not for how many
        dtype=torch.float32,
        gates=int(method.gates),
    )
    found = call.flops()
    return found.coarse + found.coarse_backward


@dataclass
class Observed:
    """Means over the attention calls of a model, as they ran.

    Attributes:
        calls: sparse calls seen.
    """

    calls: int = 0
    _tiles: float = 0.0
    _rows: float = 0.0
    _density: float = 0.0
    _dense: float | None = field(default=None)

    def add(self, call: SparseCall) -> None:
        """Note one sparse call."""
        selection = call.selection
        self.calls += 1
        self._tiles += float(selection.counts.double().mean())
        self._rows += selection.query_rows
        self._density += selection.density

    @property
    def kept(self) -> tuple[float, float] | None:
        """(KV tiles that a row keeps, computed query rows of a tile); None for attention that is not sparse.

        Raises:
            RunError: a sparse model that was not called.
        """
        return None if self._dense is not None else (self._mean(self._tiles), self._mean(self._rows))

    @property
    def density(self) -> float:
        """Share of the pairs of tokens that attention computed; of the definition where it is not sparse."""
        return self._mean(self._density) if self._dense is None else self._dense

    def _mean(self, total: float) -> float:
        if not self.calls:
            raise RunError("the model made 0 sparse calls under observe(): call it there, uncompiled")
        return total / self.calls


@contextlib.contextmanager
def observe(model: nn.Module) -> Iterator[Observed]:
    """Collect what the attention calls of a model compute, while the context is entered.

    >>> # not run: needs a model
    >>> with torch.no_grad(), observe(model) as seen:
    ...     evaluate(model)
    >>> seen.density, seen.kept

    Args:
        model: of `models.make`, uncompiled.

    Raises:
        RunError: a sparse model that is compiled, or watched already.
    """
    if not _wrapped(model):
        kinds = [block.attn for block in model.blocks]  # type: ignore[union-attr]
        yield Observed(_dense=sum(density_of(attention) for attention in kinds) / len(kinds))
        return
    seen = Observed()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(watch(model, seen.add))
        except ValueError as error:
            raise RunError(f"{error}") from error
        yield seen


def _wrapped(model: nn.Module) -> bool:
    try:
        state_of(model)
    except ValueError:
        return False
    return True


def density_of(attention: SelfAttention) -> float:
    """Share of all pairs of tokens that a module of dense attention computes."""
    grid: tuple[int, int, int] = getattr(attention, "grid", (1, 1, 1))
    if isinstance(attention, SpatialAttention):
        return 1 / grid[0]
    if isinstance(attention, TemporalAttention):
        return 1 / (grid[1] * grid[2])
    if isinstance(attention, CompressedKV):
        return math.prod(math.ceil(extent / POOL) / extent for extent in grid)
    return 1.0


def flop_counter() -> FlopCounterMode:
    """torch's counter, which knows fused attention on the CPU as well."""
    return FlopCounterMode(display=False, custom_mapping=FLASH_ON_CPU)


def counted(counter: FlopCounterMode) -> dict[str, int]:
    """What a counter saw: FLOPs of "linear" layers (products of two matrices) and of "attention" (fused, dense)."""
    seen = counter.get_flop_counts().get("Global", {})
    linear = sum(flops for op, flops in seen.items() if op in (aten.mm, aten.addmm))
    attention = sum(flops for op, flops in seen.items() if op in FLASH_ON_CPU)
    return {"linear": linear, "attention": attention}


def verify(size: Size, channels: int) -> None:
    """Compare `count` with torch's FlopCounterMode, for one training step of this size on tensors without values.

    Raises:
        RunError: the counts differ.
    """
    for attention in DENSE:
        method = Method(name=attention, attention=attention)
        with FakeTensorMode(), torch.device("cpu"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            model = make(size, method, 0, channels)
            video = torch.empty(size.batch, channels, size.frames, size.height, size.width)
            with flop_counter() as counter:
                model(video, torch.empty(size.batch)).sum().backward()
        ours, theirs = count(model, size, method, channels), counted(counter)
        for name, mine in (("linear", ours.other), ("attention", ours.attention)):
            if mine != theirs[name]:
                raise RunError(
                    f"{size.name}/{attention}: {name} FLOPs of a step are {mine:.0f} as counted from the modules, and "
                    f"{theirs[name]} as torch counts: make flops.py and the model agree"
                )
