"""Attention of a sequence on several ranks against the same attention in one process; runs on the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import flexsparse as fs
from flexsparse.distributed import SequenceParallel


@dataclass(frozen=True, kw_only=True)
class Case:
    """An attention.

    Attributes:
        builder: a mask builder.
        heads: query heads.
        kv_heads: KV heads.
        grid: of the video.
        tile: of the layout.
        first: extra tokens before it.
        last: extra tokens after it.
        text: how they lie on the ranks.
        gate: whether there is a gate.
        fine_gate: whether there is a fine gate.
        batch: B.
        dtype: of q, k, v.
        mesh: ranks of (tiles, ulysses).
        counts: valid tokens of the last extra tile, where they are given for each sample.
        compile: None, "inductor" (torch's own backend), "flexsparse" or "aot_eager" (ours, with or without code generation).
        given: whether attention gets the selection instead of the builder.
    """

    builder: Any = field(default_factory=lambda: fs.VSA(top_k=3))
    heads: int = 4
    kv_heads: int = 4
    grid: tuple[int, int, int] = (4, 8, 8)
    tile: Any = (2, 4, 4)
    first: int = 0
    last: int = 0
    text: str = "replicated"
    gate: bool = False
    fine_gate: bool = False
    batch: int = 1
    dtype: torch.dtype = torch.float32
    mesh: tuple[int, int] = (1, 2)
    counts: tuple[int, ...] | None = None
    compile: str | None = None
    given: bool = False

    @property
    def layout(self) -> fs.TileLayout:
        return fs.TileLayout(grid=self.grid, tile=self.tile, text_first=self.first, text_last=self.last)

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v and gates of the whole sequence; the same on every rank."""
        g = torch.Generator().manual_seed(7)
        names = ["q", "k", "v"] + ["gate"] * self.gate + ["fine_gate"] * self.fine_gate
        heads = {"k": self.kv_heads, "v": self.kv_heads}
        shapes = {name: (self.batch, heads.get(name, self.heads), self.layout.seq_len, 16) for name in names}
        return {name: torch.randn(shape, generator=g).to(self.dtype) for name, shape in shapes.items()}

    def tile_counts(self) -> Tensor | None:
        if self.counts is None:
            return None
        counts = self.layout.tile_counts.repeat(self.batch, 1)
        counts[:, -1] = torch.tensor(self.counts, dtype=torch.int32)
        return counts


def parallel_of(case: Case) -> SequenceParallel:
    """Over all ranks of the default group."""
    tiles, ulysses = case.mesh
    assert tiles * ulysses == dist.get_world_size()
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=("tiles", "ulysses"))
    dims: dict[str, Any] = {
        "ulysses": mesh["ulysses"] if ulysses > 1 else None,
        "tiles": mesh["tiles"] if tiles > 1 else None,
    }
    return SequenceParallel(**dims, text=case.text)


def close(name: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the order of sums."""
    limit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    assert got.shape == wanted.shape, (name, got.shape, wanted.shape)
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-6)
    assert error < limit, f"{name} is off by {float(error):.3g} of its largest value"


def attend(parallel: SequenceParallel, case: Case, builder: Any, local: dict[str, Tensor]) -> Tensor:
    """What is compiled."""
    rest = {name: x for name, x in local.items() if name not in "qkv"}
    out = parallel.attention(
        local["q"], local["k"], local["v"], case.layout, builder, tile_counts=case.tile_counts(), **rest
    )
    return parallel.unshard(out, case.layout, dim=2)


def compiled(case: Case) -> Callable[..., Tensor]:
    if case.compile is None:
        return attend
    inner = {"inner": "aot_eager"} if case.compile == "aot_eager" else {}
    backend = "inductor" if case.compile == "inductor" else fs.backend(case.builder, expect=0, **inner)
    return torch.compile(attend, fullgraph=True, backend=backend)


def compare(case: Case) -> None:
    """Forward, backward and selection on this rank against one process."""
    parallel, layout = parallel_of(case), case.layout
    whole = {name: x.requires_grad_() for name, x in case.tensors().items()}
    rest = {name: x for name, x in whole.items() if name not in "qkv"}
    counts = case.tile_counts()
    options: dict[str, Any] = {"tile_counts": counts, "return_aux": True, **rest}
    wanted, aux = fs.sparse_attention(whole["q"], whole["k"], whole["v"], layout, case.builder, **options)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(8)).to(case.dtype)
    (wanted * weight).sum().backward()

    builder = aux.selection if case.given else case.builder
    local = {name: parallel.shard(x.detach(), layout, dim=2).clone().requires_grad_() for name, x in whole.items()}
    for x in local.values():
        assert x.shape[2] == parallel.length(layout)
    got = compiled(case)(parallel, case, builder, local)
    close("the output", got, wanted, case.dtype)
    (got * weight).sum().backward()
    ranks = dist.get_world_size()
    for name, x in local.items():  # every rank has the whole loss: gradients are those of `ranks` times it
        close(f"the gradient of {name}", *_gradients(parallel, case, x, whole[name], ranks), case.dtype)

    _, mine = parallel.attention(
        *(local[name].detach() for name in "qkv"), layout, builder, tile_counts=counts, return_aux=True
    )
    heads = slice(*parallel.exchange(whole["q"], whole["k"], layout).heads.query(parallel.ulysses.rank))
    rows = slice(*parallel.own_tiles(layout).tiles)
    assert torch.equal(mine.selection.keep(), aux.selection.keep()[:, heads, rows]), "other tiles are selected"


def _gradients(parallel: SequenceParallel, case: Case, x: Tensor, whole: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's gradient and the one wanted; those of replicated tokens are summed over the copies."""
    assert x.grad is not None and whole.grad is not None
    layout = case.layout
    grad, wanted = x.grad.clone() / ranks, parallel.shard(whole.grad, layout, dim=2)
    if case.text != "replicated" or not (case.first or case.last):
        return grad, wanted
    for part in (slice(0, case.first), slice(grad.shape[2] - case.last, None)):
        total = grad[:, :, part].contiguous()
        dist.all_reduce(total)
        grad[:, :, part] = total
    return grad, wanted


def infer(case: Case) -> None:
    """In inference mode, before and after training (what is cached serves both)."""
    whole = case.tensors()
    rest = {name: x for name, x in whole.items() if name not in "qkv"}
    parallel = parallel_of(case)
    with torch.inference_mode():
        wanted = fs.sparse_attention(whole["q"], whole["k"], whole["v"], case.layout, case.builder, **rest)
        local = {name: parallel.shard(x, case.layout, dim=2) for name, x in whole.items()}
        close("the output", attend(parallel, case, case.builder, local), wanted, case.dtype)
    compare(case)


def raised(case: Case) -> str:
    """What this rank says to a case that cannot be."""
    try:
        parallel = parallel_of(case)
        local = {name: parallel.shard(x, case.layout, dim=2) for name, x in case.tensors().items()}
        attend(parallel, case, case.builder, local)
    except ValueError as error:
        return str(error)
    return "nothing"
