"""Many resolutions, and how many graphs they cost; runs on the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from wrap.conftest import Stranger

import flexsparse as fs
from distributed import joint
from distributed.training import _same_gradient
from flexsparse.distributed.heads import Exchange, Heads
from flexsparse.distributed.tokens import Ranks, Segment, gather_tokens, own_part, segments_of
from flexsparse.models import Part, Whole

# tokens leave every remainder by 2, 3 and 4 after the first one
GRIDS = [(3, 5, 5), (4, 6, 5), (5, 5, 7), (3, 6, 7), (5, 7, 7)]


def graphs() -> int:
    """Compiled so far."""
    return counters["stats"]["unique_graphs"]


def of_exchange(text: str) -> list[int]:
    """What cuts, exchanges and joins tokens, compiled once for symbolic sizes; graphs after each grid.

    Args:
        text: as `SequenceParallel`.
    """
    ranks = Ranks.of(init_device_mesh("cpu", (dist.get_world_size(),)), "mesh")
    heads = Heads(5, 1, ranks.size)

    def run(x: Tensor, video: int) -> Tensor:
        segments = segments_of(6, Segment.of(video, ranks.size), 3, text)
        exchange = Exchange(segments, ranks, heads)
        own = own_part(x, segments, ranks.rank, 2)
        q, k, v, _ = exchange.to_heads(own, own[:, :1], own[:, 1:2], (None, None))
        return gather_tokens(exchange.to_tokens(q * k + v), segments, ranks, 2)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    counters.clear()
    found = []
    for video in (77, 60, 61, 62, 63, 64):
        x = torch.randn(1, 5, video + 9, 8, generator=torch.Generator().manual_seed(video))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        wanted, got = (one(own, video) for one, own in zip((run, compiled), inputs))
        torch.testing.assert_close(got, x * x[:, :1] + x[:, 1:2])
        factor = torch.randn(x.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
        for out in (wanted, got):
            (out * factor).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        found.append(graphs())
    return found


def of_stranger(compile: bool | str, inner: str = "aot_eager") -> list[int]:
    """A model that flexsparse does not know, by a plan; graphs after each grid."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    alone = Stranger(16 * (ranks + 1), ranks + 1)
    model = Stranger(16 * (ranks + 1), ranks + 1)
    model.load_state_dict(alone.state_dict())
    fs.wrap(alone, fs.VSA(top_k=2), tile=(2, 4, 4), compile=False)
    fs.wrap(model, fs.VSA(top_k=2), tile=(2, 4, 4), compile=compile, inner=inner)
    plan = {"blocks.0": {"x": Part(1, 3)}, "head": Whole(1)}
    fs.distributed.ulysses(model, init_device_mesh("cpu", (ranks,)), plan)
    counters.clear()
    found = []
    for T, H, W in GRIDS:
        video = torch.randn(2, 3, T, 2 * H, 2 * W, generator=torch.Generator().manual_seed(T * H * W))
        outs = [one(video) for one in (alone, model)]
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
        for one, out in zip((alone, model), outs):
            one.zero_grad()
            out.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in alone.named_parameters()}
        for name, parameter in model.named_parameters():
            _same_gradient(name, parameter, gradients[name])
        found.append(graphs())
    return found


def of_model(name: str, compile: bool | str, options: dict[str, Any]) -> list[int]:
    """One of the zoo, equal to one process (`joint.compared`); graphs after each grid."""
    counters.clear()
    return [graphs() for _ in joint.compared(name, compile, {"grids": GRIDS, **options})]
