"""Real models and rarer settings compiled for CUDA without a GPU: what runs is ours, on the GPU, in every graph."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from for_cuda import CUDA, NO_STAND_IN, Compiled, h100, memory, on_cuda, recording
from models.zoo import ZOO

import flexsparse as fs

pytestmark = pytest.mark.skipif(NO_STAND_IN is not None, reason=str(NO_STAND_IN))
ATTEND = "flexsparse::tile_attention"
WHOLE, PARTIAL, OTHER, THIRD = (4, 8, 8), (4, 8, 9), (4, 8, 12), (5, 8, 4)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A wrapped model and how it is called.

    Attributes:
        model: name in the zoo.
        grids: called one after the other.
        builder: gates where it is None, and VSA.
        graphs: how many are compiled for all grids, backward ones apart.
    """

    model: str = "wan"
    grids: tuple[tuple[int, int, int], ...] = (PARTIAL,)
    builder: Any = None
    dtype: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = None
    train: bool = False
    checkpointed: bool = False
    batch: int = 1
    graphs: int = 1
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "Wan, training in bfloat16": Case(train=True, grids=(WHOLE,)),
    "partial tiles, training in float16": Case(train=True, dtype=torch.float16),
    "float32": Case(dtype=torch.float32, train=True, grids=(WHOLE,)),
    "float32 parameters under autocast": Case(dtype=torch.float32, autocast=torch.bfloat16, train=True),
    "two resolutions more, one graph": Case(grids=(PARTIAL, OTHER, THIRD), graphs=2),
    "two resolutions in training": Case(grids=(PARTIAL, OTHER), graphs=2, train=True),
    "BSA": Case(builder=fs.BSA(kv_density=0.4), train=True, grids=(WHOLE, OTHER), graphs=2),
    "a regional form": Case(options={"compile": "regional"}, train=True),
    "checkpointed blocks": Case(checkpointed=True, train=True),
    "HunyuanVideo, padded text": Case(model="hunyuan", batch=2),
    "HunyuanVideo, padded text, training": Case(model="hunyuan", batch=2, grids=(PARTIAL, OTHER), graphs=2, train=True),
    "CogVideoX": Case(model="cogvideox", train=True),
}


def run(case: Case) -> tuple[list[Compiled], fs.reporting.Report]:
    entry = ZOO[case.model]
    name, config = entry.make
    model = replace(entry, make=(name, {**config, "num_layers": 1})).model()
    builder = fs.VSA(top_k=3) if case.builder is None else case.builder
    fs.wrap(model, builder, **{"gates": case.builder is None, **case.options})
    if case.checkpointed:
        model.enable_gradient_checkpointing()
    model.train(case.train)
    with h100(), recording() as graphs:
        on_cuda(model, case.dtype)
        for grid in case.grids:
            inputs = {name: on_cuda(x, case.dtype) for name, x in entry.inputs(grid, case.batch).items()}
            cast = contextlib.nullcontext() if case.autocast is None else torch.autocast("cuda", case.autocast)
            with torch.set_grad_enabled(case.train), cast:
                (out,) = model(**inputs, return_dict=False)
            assert out.device == CUDA
            if case.train:
                out.float().sum().backward()
    return graphs, fs.report(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_model_compiles_and_runs_our_ops_on_the_gpu_alone(name: str) -> None:
    case = CASES[name]
    graphs, report = run(case)
    sparse = [call for call in report.calls if call.sparse]
    assert sparse and all(call.lowered and call.fused and call.backend == "triton" for call in sparse), report
    forward = [graph for graph in graphs if graph.ops(ATTEND)]
    backward = [graph for graph in graphs if graph.ops(f"{ATTEND}_backward")]
    assert len([graph for graph in forward if not graph.backward]) == case.graphs
    assert len(backward) == case.graphs * case.train
    for graph in graphs:
        assert all(x.device == CUDA for launch in graph.launches for x in launch.tensors)
        assert not any("flex_attention" in kernel for kernel in graph.kernels), "stock FlexAttention is left"
        assert not any("index_add" in kernel or "index_put" in kernel for kernel in graph.kernels), "rows are added"
        for select, attend in zip(graph.ops("flexsparse::coarse_select"), graph.ops(ATTEND)):
            if case.model == "hunyuan":
                assert [memory(x) for x in select.args[1:3]] == [memory(x) for x in attend.args[1:3]], "masked twice"
        for launch in graph.ops(ATTEND):
            half = case.dtype != torch.float32 or case.autocast is not None
            if case.builder is None and (half or not case.train):
                assert launch.args[3] is not None, "the gated coarse output is added elsewhere"


@pytest.mark.slow
def test_the_flex_backend_compiles_forward_and_backward() -> None:
    """Uncompiled by us: stock FlexAttention's kernels for CUDA."""
    layout = fs.TileLayout(grid=(4, 8, 16), tile=(4, 8, 4))
    with h100(), recording() as graphs:
        q, k, v = (torch.empty(1, 2, layout.seq_len, 64, device="cuda", requires_grad=True) for _ in range(3))
        attend = torch.compile(fs.sparse_attention, fullgraph=True)
        attend(q, k, v, layout, fs.VSA(top_k=2), backend="flex").sum().backward()
    forward, backward = graphs
    assert any("flex_attention" in kernel for kernel in forward.kernels)
    assert any("flex_attention" in kernel for kernel in backward.kernels)
