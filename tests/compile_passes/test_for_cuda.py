"""What Inductor makes of wrapped models for CUDA, seen without a GPU: its code, its kernels, what it runs around our ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from for_cuda import NO_STAND_IN, Compiled, Launch, h100, memory, on_cuda, recording
from torch import Tensor, nn

import flexsparse as fs

pytestmark = pytest.mark.skipif(NO_STAND_IN is not None, reason=str(NO_STAND_IN))
C, HEADS, D = 64, 2, 32
WHOLE, PARTIAL = (4, 8, 8), (4, 8, 9)
SELECT, ATTEND = "flexsparse::coarse_select", "flexsparse::tile_attention"


def rotated(x: Tensor) -> Tensor:
    """Pairs of numbers are turned, as Wan writes it."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None, None].expand(-1, 1, x.shape[3] // 2)
    out = torch.empty_like(x)
    out[..., 0::2] = a * angle.cos() - b * angle.sin()
    out[..., 1::2] = a * angle.sin() + b * angle.cos()
    return out.type_as(x)


class Block(nn.Module):
    """Attention as video models have it: Inductor makes queries and keys, the values come from their linear map."""

    def __init__(self, norm: Any = nn.RMSNorm) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(C, C) for _ in range(4))
        self.norm, self.norm_q, self.norm_k = nn.LayerNorm(C), norm(D), norm(D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (to(h).unflatten(-1, (HEADS, D)) for to in (self.to_q, self.to_k, self.to_v))
        if isinstance(
            self.norm_q, nn.LayerNorm
        ):  # whose result is contiguous: it lies head by head, as CogVideoX's does
            q, k, v = self.norm_q(q.transpose(1, 2)), self.norm_k(k.transpose(1, 2)), v.transpose(1, 2)
        else:
            q, k, v = (each.transpose(1, 2) for each in (rotated(self.norm_q(q)), rotated(self.norm_k(k)), v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(out.transpose(1, 2).flatten(2))


class Video(nn.Module):
    """A model that says its grid by its input ``[B, 3, T, H, W]``."""

    def __init__(self, norm: Any = nn.RMSNorm) -> None:
        super().__init__()
        self.patch, self.blocks, self.head = nn.Conv3d(3, C, 1), nn.ModuleList([Block(norm)]), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2).contiguous()  # else linear maps add their bias in a kernel
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def graphs_of(
    *grids: tuple[int, int, int],
    builder: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    train: bool = False,
    batch: int = 1,
    norm: Any = nn.RMSNorm,
    **options: Any,
) -> list[Compiled]:
    """The graphs of a wrapped model, called on some grids."""
    given = {"gates": builder is None, **options}
    model = fs.wrap(Video(norm), fs.VSA(top_k=3) if builder is None else builder, **given)
    with h100(), recording() as graphs:
        on_cuda(model, dtype)
        for grid in grids:
            with torch.set_grad_enabled(train):
                out = model(torch.empty(batch, 3, *grid, dtype=dtype, device="cuda"))
            if train:
                out.float().sum().backward()
    assert all(call.lowered for call in fs.report(model).calls if call.sparse)
    return graphs


def maker(graph: Compiled, reader: Launch, x: Tensor) -> Launch:
    """What wrote a tensor that something reads."""
    before = graph.launches[: graph.launches.index(reader)]
    return next(launch for launch in reversed(before) if memory(x) in launch.writes)


def readers(graph: Compiled, maker: Launch, x: Tensor) -> list[str]:
    """What reads a result; of kernels only that they are some."""
    after = graph.launches[graph.launches.index(maker) + 1 :]
    return ["kernel" if each.kernel else each.name for each in after if memory(x) in each.reads]


def copies(graph: Compiled) -> list[str]:
    """Kernels that do nothing but bring a tensor to another memory format."""
    return [
        launch.name
        for launch in graph.launches
        if launch.kernel
        and "clone" in launch.name
        and len({x.numel() for x in launch.tensors}) == 1 < len(launch.tensors) < 3
    ]


def check_devices(graphs: list[Compiled]) -> None:
    """Kernels and ops get tensors of the GPU alone."""
    for graph in graphs:
        for launch in graph.launches:
            assert all(x.is_cuda for x in launch.tensors), launch.name


@pytest.mark.parametrize("grid", (WHOLE, PARTIAL), ids=("tile order", "raster order"))
def test_an_attention_is_our_two_ops_between_its_linear_maps(grid: tuple[int, int, int]) -> None:
    (graph,) = graphs = graphs_of(grid)
    (select,), (attend,) = graph.ops(SELECT), graph.ops(ATTEND)
    assert attend.args[3] is not None, "the op adds the gated coarse output"
    assert [memory(x) for x in select.args[:3]] == [memory(x) for x in attend.args[:3]], "something is copied"
    made = [maker(graph, attend, x) for x in (*attend.args[:3], attend.args[4])]
    assert [each.kernel for each in made] == [True, True, False, False], "values and gates come from their linear maps"
    assert readers(graph, attend, attend.result[0])[:1] == ["aten::addmm"]
    assert not copies(graph)
    check_devices(graphs)


@pytest.mark.parametrize("grid", (WHOLE, PARTIAL), ids=("tile order", "raster order"))
def test_backward_is_our_two_ops_and_copies_nothing(grid: tuple[int, int, int]) -> None:
    forward, backward = graphs = graphs_of(grid, train=True)
    assert (forward.backward, backward.backward) == (False, True)
    (attend,) = forward.ops(ATTEND)
    assert attend.args[3] is not None and readers(forward, attend, attend.result[0])[:1] == ["aten::addmm"]
    (fine,) = backward.ops(f"{ATTEND}_backward")
    (coarse,) = backward.ops(f"{SELECT}_backward")
    assert all(x.shape[3] == 1 for x in coarse.result), "a row for each tile, not one for each of its tokens"
    assert None not in fine.args[7:9] and fine.result[3].numel() and fine.result[4].numel(), "it gives their gradients"
    assert not [name for name in backward.kernels if "index_add" in name or "index_put" in name], "rows are added"
    grad = maker(backward, fine, fine.args[0])
    assert grad.name == "aten::mm", "the output's gradient is read where the projection's backward leaves it"
    assert not copies(forward) and not copies(backward)
    check_devices(graphs)


@pytest.mark.parametrize(
    ("batch", "grids"),
    [(1, (PARTIAL,)), pytest.param(2, (PARTIAL, WHOLE), marks=pytest.mark.slow)],
    ids=("", "two resolutions"),
)
def test_an_output_is_written_where_the_projection_reads_it_wherever_queries_lie(batch: int, grids: Any) -> None:
    graphs = graphs_of(*grids, train=True, batch=batch, norm=nn.LayerNorm)
    assert [graph.backward for graph in graphs] == [False, True] * len(grids)
    for forward in graphs[::2]:
        (attend,) = forward.ops(ATTEND)
        q, out = attend.args[0], attend.result[0]
        assert q.stride(2) == D < out.stride(2) and out.transpose(1, 2).is_contiguous()
        assert readers(forward, attend, out)[:1] == ["aten::addmm"]
        assert not copies(forward)


def test_a_batch_of_any_resolution_is_read_in_raster_order() -> None:
    """Classifier-free guidance is a batch of two: a symbolic batch leaves slices that take everything around gathers."""
    graphs = graphs_of(WHOLE, PARTIAL, train=True, batch=2)
    *_, forward, backward = graphs
    assert len(graphs) == 4 and (forward.backward, backward.backward) == (False, True)
    names = [launch.name for graph in (forward, backward) for launch in graph.launches if not launch.kernel]
    assert len(forward.ops(ATTEND)) == len(backward.ops(f"{ATTEND}_backward")) == 1
    assert not [name for name in names if "tile_tokens" in name]
    assert not [name for name in (*forward.kernels, *backward.kernels) if "index_put" in name]
    check_devices(graphs)


BUILDERS: dict[str, dict[str, Any]] = {
    "PerHead": {"builder": fs.PerHead(builders=(fs.VSA(top_k=2), fs.TopP(mass=0.5)), heads=(1, 0)), "gates": True},
    "PerHead, one static": {"builder": fs.PerHead(builders=(fs.VSA(top_k=2), fs.Radial()), heads=(0, 1))},
    "fine gates": {"builder": fs.VSA(top_k=3), "gates": True, "fine_gates": True},
    "BSA": {"builder": fs.BSA(kv_density=0.4)},
    "BSA, all queries scored": {"builder": fs.BSA(kv_density=0.4, score_queries="all", representative="medoid")},
    "BSA, of a head": {"builder": fs.BSA(kv_density=0.4, statistics="head")},
    "BSA, of a head, probability": {"builder": fs.BSA(kv_density=0.4, statistics="head", threshold="probability")},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize(
    ("name", "grids"),
    [
        pytest.param(
            name,
            grids,
            id=f"{name}{', two resolutions' if len(grids) > 1 else ''}",
            marks=() if name in ("PerHead", "BSA") and len(grids) == 1 else pytest.mark.slow,
        )
        for name in BUILDERS
        for grids in ((PARTIAL,), (WHOLE, PARTIAL))
    ],
)
def test_training_reads_raster_order_and_adds_nothing_atomically(name: str, grids: Any) -> None:
    graphs = graphs_of(*grids, train=True, batch=len(grids), **BUILDERS[name])
    assert [graph.backward for graph in graphs] == [False, True] * len(grids)
    for graph in graphs[-2:]:
        ops = [launch.name.partition("::")[2] for launch in graph.launches if "flexsparse::" in launch.name]
        assert ("tile_tokens" in ops) == ("of a head" in name), "statistics of a head are made from tiles"
        assert not [kernel for kernel in graph.kernels if "index_put" in kernel or "index_add" in kernel]
        assert name not in ("PerHead", "fine gates") or not copies(graph)
        (attend,) = graph.ops(ATTEND) or graph.ops(f"{ATTEND}_backward")
        if name == "PerHead":
            assert attend.args[3 if not graph.backward else 7] is not None, "the coarse outputs of all heads are one"
        if name == "BSA":
            way = ["unpack_rows_backward", "tile_attention_backward", "pack_rows_backward"]
            call = ["prune_queries", "coarse_select", "pack_rows", "tile_attention", "unpack_rows"]
            assert [op for op in ops if op != "tile_index"] == (way if graph.backward else call)
    check_devices(graphs)


def test_what_float32_training_adds_apart_is_written_where_the_projection_reads_it() -> None:
    forward, _ = graphs_of(WHOLE, train=True, dtype=torch.float32)
    (attend,) = forward.ops(ATTEND)
    assert attend.args[3] is None and readers(forward, attend, attend.result[0])[:1] == ["kernel"]
    assert not copies(forward)
