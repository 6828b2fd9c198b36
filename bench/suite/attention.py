"""A whole attention as a model calls it: raster order in and out, gate, selection and tiling included.

Shape letters: B batch, H heads, S tokens, N query tiles, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.baselines.protocol import Problem
from bench.check import first_heads
from bench.suite import bsa_parts, data, oracle, parts, tuning
from bench.suite.cases import DENSE, OURS, Case, Tile
from bench.suite.contender import Contender, Expected, Found, Missing, Results, training_results
from bench.suite.device import Device
from bench.suite.fine import Peers, rivals, selected_pairs
from flexsparse.attention import reads_raster
from flexsparse.gated import broadcast_coarse

Call = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def eager(case: Case, device: Device, layout: fs.TileLayout, kv_layout: fs.TileLayout) -> Call:
    """`fs.sparse_attention`, uncompiled."""
    builder, options = case.builder, {"kv_layout": kv_layout, "backend": device.backend}

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        heads = None if gate is None else gate.unflatten(-1, (case.H, case.D)).transpose(1, 2)
        return fs.sparse_attention(q, k, v, layout, builder, gate=heads, **options)

    return attend


def compiled(case: Case, device: Device, layout: fs.TileLayout) -> tuple[Call, fs.compiler.Backend]:
    """What a wrapped model runs: a dense call under a gate's mark, compiled by `fs.backend`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            torch.ops.flexsparse.mark_gate(gate)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    options = {"tile": layout.sides, "grid": layout.grid, "expect": 1, **device.compile_options}
    backend = fs.backend(case.builder, **options)
    return torch.compile(attend, backend=backend, fullgraph=True, dynamic=False), backend


def not_lowered(backend: fs.compiler.Backend) -> str | None:
    """Why a compiled call did not become our kernels; None where it did."""
    for call in backend.report().calls:
        if not (call.sparse and call.lowered):
            return f"the compiled call is not lowered: {call.reason}"
    return None if backend.report().calls else "nothing was compiled"


def contenders(case: Case, device: Device, peers: Peers) -> Found:
    """Ours, compiled and not, in each tile of the case; the dense baselines; the pieces of ours.

    Where the winners of `tune` bring tokens to tile order, which it never timed, the defaults are timed as well.
    """
    training = case.kind == "attention_training"
    q, k, v, grad = data.tokens(case, device.torch)
    gate = data.gate(case, device.torch) if case.method == "vsa" else None
    dense_truth = once(lambda: dense_expected(case, q, k, v, grad if training else None))
    for tile in (case.tile, *case.others):
        layout = case.layout_of(tile)
        kv_layout = layout if case.kv_tile is None else case.kv_layout
        selection = case.builder.select(q, k, layout, kv_layout=kv_layout)
        truth = once(
            lambda layout=layout, selection=selection: sparse_expected(  # type: ignore[misc]
                case, q, k, v, gate, grad if training else None, layout, selection
            )
        )
        pairs = selected_pairs(selection)
        ours = {
            "impl": OURS,
            "expected": truth,
            "flops": (14 if training else 4) * case.D * pairs,
            "density": selection.density,
            "tile": layout.sides,
        }
        own = partial(of_tile, case, device, (q, k, v, gate), grad, tile, (layout, kv_layout), selection, ours)
        yield from own()
        if changes_order(case, device, q, layout, kv_layout):
            with tuning.unforced():  # pieces ask for the order of tokens while they are made
                defaults = [tuning.by_default(one) for one in own()]
            yield from defaults
    yield from dense(case, device, peers, (q, k, v), grad, dense_truth)


def of_tile(
    case: Case,
    device: Device,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad: Tensor,
    tile: Tile,
    layouts: tuple[fs.TileLayout, fs.TileLayout],
    selection: fs.TileSelection,
    fields: dict[str, Any],
) -> Found:
    """Ours in one tile, compiled and not; and in pieces, where the tile is the case's."""
    layout, kv_layout = layouts
    for mode in modes(case, device, kv_layout, layout):
        call, backend = (
            compiled(case, device, layout) if mode == "compiled" else (eager(case, device, layout, kv_layout), None)
        )
        training = case.kind == "attention_training"
        yield whole(case, call, inputs, grad, training, config={"mode": mode}, **fields, backend=backend)
    if case.parts and tile == case.tile:
        pieces = parts.contenders if case.method == "vsa" else bsa_parts.contenders
        yield from pieces(case, device, inputs, layout, selection)


def changes_order(case: Case, device: Device, q: Tensor, layout: fs.TileLayout, kv_layout: fs.TileLayout) -> bool:
    """Whether kernels that are forced read tile order, where the defaults would leave tokens in raster order."""
    training = case.kind == "attention_training"

    def in_raster() -> bool:
        return reads_raster(q, layout, kv_layout, case.builder, device.backend, training)

    with tuning.unforced():
        before = in_raster()
    return before and not in_raster()


def modes(case: Case, device: Device, kv_layout: fs.TileLayout, layout: fs.TileLayout) -> tuple[str, ...]:
    """A compiled model's queries and keys share one layout."""
    return device.modes if kv_layout == layout else ("eager",)


def whole(
    case: Case,
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad: Tensor,
    training: bool,
    backend: fs.compiler.Backend | None = None,
    **fields: Any,
) -> Contender:
    """A contender of ``attention_forward`` or ``attention_training``."""
    names = ("dq", "dk", "dv", "dgate")
    leaves = tuple(x.detach().requires_grad_(training) for x in inputs if x is not None)
    gated = leaves if len(leaves) == 4 else (*leaves, None)

    def run(turn: int) -> Any:
        if not training:
            with torch.no_grad():
                return call(*gated)
        return torch.autograd.grad(call(*gated), leaves, grad)

    def results() -> Results:
        if training:
            found = training_results(call(*gated), leaves, names, grad)
        else:
            with torch.no_grad():
                found = {"out": call(*gated)}
        reason = None if backend is None else not_lowered(backend)
        if reason is not None:
            raise RuntimeError(reason)
        if "dgate" in found:
            found["dgate"] = found["dgate"].unflatten(-1, (case.H, case.D)).transpose(1, 2)
        return found

    return Contender(op=case.kind, run=run, results=results, **fields)


def dense(
    case: Case,
    device: Device,
    peers: Peers,
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    truth: Callable[[], Expected],
) -> Found:
    """The dense baselines, on tokens in raster order: all they ask of a layout is that it has no padding."""
    training = case.kind == "attention_training"
    q, k, v = inputs
    layout = fs.TileLayout(grid=(4, 4, 4))
    selection = fs.Dense().select(q[:, :, :64], k[:, :, :64], layout)
    problem = Problem(q_BHPD=q, k_BGPD=k, v_BGPD=v, layout=layout, selection=selection, scale=case.D**-0.5)
    wanted = replace(case, baselines=tuple(name for name in case.baselines if name in DENSE))
    for found in rivals(wanted, problem, peers, training, device):
        if isinstance(found, Missing):
            yield found
            continue
        name, attend, fields = found

        def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, attend: Any = attend) -> Tensor:
            return attend(q, k, v)

        flops = (14 if training else 4) * float(case.B * case.H) * case.S**2 * case.D
        extra = {"impl": name, "expected": truth, "flops": flops, "density": 1.0, "fields": fields}
        yield whole(case, call, (*inputs, None), grad, training, **extra)


def once(make: Callable[[], Expected]) -> Callable[[], Expected]:
    """Computed when first asked for."""
    found: list[Expected] = []

    def get() -> Expected:
        if not found:
            found.append(make())
        return found[0]

    return get


def sparse_expected(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    grad: Tensor | None,
    layout: fs.TileLayout,
    selection: fs.TileSelection,
) -> Expected:
    """The first head of a sparse attention with these tiles, its coarse output computed anew."""
    one = first_heads(selection, 1)
    gates = None if gate is None else gate[..., : case.D].unsqueeze(1)
    counts = layout.index(q.device)[2]

    def truth(dtype: torch.dtype) -> Results:
        leaves = [x[:, :1].to(dtype).requires_grad_(grad is not None) for x in (q, k, v)]
        if gates is not None:
            leaves.append(gates.to(dtype).requires_grad_(grad is not None))
        out = fs.sparse_attention(*leaves[:3], layout, one, kv_layout=one.kv_layout, backend="gather")
        if gates is not None:
            of_tiles = [layout.video(layout.to_tiles(x))[0, 0] for x in leaves[:3]]
            pooled = oracle.coarse(*of_tiles, counts, counts, case.D**-0.5)
            out = out + leaves[3] * broadcast_coarse(pooled[None, None], layout)
        return _with_gradients(out, leaves, grad)

    return _expected(case, truth)


def dense_expected(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> Expected:
    """The first head of dense attention."""
    layout = case.layout_of((4, 4, 4))
    everything = fs.Dense().select(q[:, :1], k[:, :1], layout)

    def truth(dtype: torch.dtype) -> Results:
        leaves = [x[:, :1].to(dtype).requires_grad_(grad is not None) for x in (q, k, v)]
        return _with_gradients(fs.sparse_attention(*leaves, layout, everything, backend="gather"), leaves, grad)

    return _expected(case, truth)


def _with_gradients(out: Tensor, leaves: list[Tensor], grad: Tensor | None) -> Results:
    if grad is None:
        return {"out": out.detach()}
    return training_results(out, tuple(leaves), ("dq", "dk", "dv", "dgate"), grad[:, :1].to(out.dtype))


def _expected(case: Case, truth: Callable[[torch.dtype], Results]) -> Expected:
    reference = {name: x.to(case.torch_dtype) for name, x in truth(torch.float32).items()}
    return Expected(take=lambda x: x[:, :1], exact=truth(torch.float64), reference=reference)
