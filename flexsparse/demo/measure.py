"""What a run measures after training: selections, errors, FLOPs and times of real attention calls.

Letters: B batch, H heads, S tokens, D head dim, N query tiles, M KV tiles.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flexsparse as fs
from flexsparse.demo.data import Batch
from flexsparse.demo.methods import build_builder, build_model
from flexsparse.demo.settings import Settings
from flexsparse.demo.train import Training, synchronize
from flexsparse.training import flow

_REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """What one trained attention layer is given for a held-out window.

    q, k, v: `[B, H, S, D]` after QK-norm and RoPE; gate: VSA's gate `[B, H, S, D]`, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SparseResult:
    """One sparse method on its own trained layer."""

    keep: Tensor
    """Critical tiles, bool `[H, N, M]` of the first sample."""
    numbers: dict[str, Any]
    """Density, FLOPs, errors; JSON values."""


def attention_inputs(training: Training, settings: Settings, batch: Batch, layer: int) -> AttentionInputs:
    """Runs an eager copy of a trained model and records what attention layer `layer` is given."""
    model = build_model(training.method, settings, compiled=False)
    model.load_state_dict(training.model.state_dict())
    attention: Any = model.blocks[layer].attn
    recorded: list[tuple[Tensor, ...]] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs))
    with torch.no_grad():
        model(flow.noisy(batch.clean, batch.noise, batch.t), batch.t)
        hook.remove()
        q, k, v = attention.project(*recorded[0])
        gate = None
        if training.method == "vsa":
            gate = attention.to_gate_compress(recorded[0][0]).unflatten(-1, (settings.heads, -1)).transpose(1, 2)
    return AttentionInputs(q=q, k=k, v=v, gate=gate)


def dense_flops(settings: Settings) -> int:
    """Multiplications and additions of one dense attention forward, one layer: QK^T and PV."""
    return 4 * settings.tokens**2 * settings.dim


def coarse_flops(method: str, settings: Settings) -> int:
    """The same for the coarse stage: scores between tiles, and for VSA the coarse output."""
    return (4 if method == "vsa" else 2) * settings.num_tiles**2 * settings.dim


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt()).item()


def analyse(method: str, settings: Settings, inputs: AttentionInputs) -> SparseResult:
    """Selection, density, FLOPs and errors of one sparse method."""
    layout = fs.TileLayout(grid=settings.grid, tile=settings.tile)
    q, k, v = inputs.q, inputs.k, inputs.v
    builder = build_builder(method, settings)
    assert builder is not None, "dense has no selection"
    with torch.no_grad():
        selection = builder.select(q, k, layout)
        out = fs.sparse_attention(q, k, v, layout, selection)
        oracle = torch.cat([_oracle(q, k, v, selection, head) for head in range(settings.heads)], dim=1)
        dense = F.scaled_dot_product_attention(q, k, v)
    density = float(selection.density)
    flops = round(density * dense_flops(settings)) + coarse_flops(method, settings)
    counts = selection.kv_counts.float()
    numbers: dict[str, Any] = {
        "density": density,
        "tiles_kept_mean": counts.mean().item(),
        "tiles_kept_min": int(counts.min()),
        "tiles_kept_max": int(counts.max()),
        "rows_capped": 0 if selection.capped is None else int(selection.capped),
        "attention_flops": flops,
        "attention_flops_ratio": flops / dense_flops(settings),
        "error_to_oracle": relative_rms(out, oracle),
        "distance_to_dense": relative_rms(out, dense),
    }
    if inputs.gate is not None:
        numbers["gate_rms"] = inputs.gate.square().mean().sqrt().item()
    return SparseResult(keep=selection.to_dense()[0].cpu(), numbers=numbers)


def _oracle(q: Tensor, k: Tensor, v: Tensor, selection: fs.TileSelection, head: int) -> Tensor:
    """float64 reference attention of one head, same tiles, `[B, 1, S, D]`; all heads at once take GBs."""
    one = slice(head, head + 1)
    queries = selection.queries
    if queries is not None:
        fields = {name: getattr(queries, name)[:, one] for name in ("kept", "source", "position")}
        queries = replace(queries, **fields)
    selection = replace(selection, bits=selection.bits[:, one], counts=selection.counts[:, one], queries=queries)
    q, k, v = (x[:, one].double() for x in (q, k, v))
    return fs.sparse_attention(q, k, v, selection.layout, selection, backend="reference")


def attention_times(
    inputs: dict[str, AttentionInputs], settings: Settings, tick: Callable[[], None] = lambda: None
) -> dict[str, dict[str, float]]:
    """Forward and backward of attention alone, selection and tiling included, against dense on the same
    tensors.

    Args:
        inputs: for each sparse method its layer's q, k, v.
        settings: of the run.
        tick: called after each round.

    Returns:
        For each method the medians `seconds`, `dense_seconds` and their `ratio`; the two are run in turn.
    """
    device = torch.device(settings.device)
    layout = fs.TileLayout(grid=settings.grid, tile=settings.tile)
    times: dict[str, dict[str, float]] = {}
    for method, tensors in inputs.items():
        builder = build_builder(method, settings)

        def sparse(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, builder: Any = builder) -> Tensor:
            return fs.sparse_attention(q, k, v, layout, builder, gate=gate)

        def dense(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        samples: dict[str, list[float]] = {"sparse": [], "dense": []}
        for round_number in range(_REPEATS + 1):
            for name, function in (("sparse", sparse), ("dense", dense)):
                seconds = _forward_backward(function, tensors, device)
                if round_number:  # the first round warms up
                    samples[name].append(seconds)
            tick()
        medians = {name: statistics.median(values) for name, values in samples.items()}
        times[method] = {
            "seconds": medians["sparse"],
            "dense_seconds": medians["dense"],
            "ratio": medians["sparse"] / medians["dense"],
        }
    return times


def _forward_backward(function: Callable[..., Tensor], inputs: AttentionInputs, device: torch.device) -> float:
    """Seconds of one forward and backward."""
    tensors = [
        None if tensor is None else tensor.detach().requires_grad_()
        for tensor in (inputs.q, inputs.k, inputs.v, inputs.gate)
    ]
    grad_out = torch.ones_like(inputs.q)
    synchronize(device)
    start = time.perf_counter()
    function(*tensors).backward(grad_out)
    synchronize(device)
    return time.perf_counter() - start


def step_times(trainings: list[Training]) -> dict[str, dict[str, float]]:
    """Median time of a whole training step of each method, and its ratio to dense where dense was trained.

    The methods take turns step by step, so these are interleaved runs on the same inputs.
    """
    medians = {
        training.method: statistics.median(times)
        for training in trainings
        if (times := [seconds for seconds in training.curves.step_seconds if seconds is not None])
    }
    dense = medians.get("dense")
    return {
        method: {"seconds": seconds} | ({"ratio": seconds / dense} if dense else {})
        for method, seconds in medians.items()
    }


def attention_calls(training: Training) -> list[dict[str, Any]]:
    """What `fs.report` says of every attention call of a wrapped model that has run; empty for dense."""
    if training.method == "dense":
        return []
    fields = ("name", "sparse", "backend", "reason")
    return [{field: getattr(call, field) for field in fields} for call in fs.report(training.model).calls]


def denoised(trainings: list[Training], batch: Batch) -> dict[str, Tensor]:
    """One-step denoising of a held-out batch by every method: `[3, T, H, W]` on the CPU."""
    z = flow.noisy(batch.clean, batch.noise, batch.t)
    return {
        training.method: flow.denoise(z, training.model(z, batch.t), batch.t).detach()[0].cpu()
        for training in trainings
    }
