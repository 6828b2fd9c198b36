"""Step time by roofline: each part takes the longer of its work and its memory traffic; parts follow one another.

Matrix products: one by one. Compiled, between two products stands one fused kernel that moves their operands once more;
uncompiled, each op moves its own, and where kernels find no tokens in raster order they are put in tile order and back.
FSDP's and the replicas' collectives run beside the computation, Ulysses' all-to-alls do not. A part is spread evenly over
the GPUs of a sequence, attention by whole heads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from flexsparse.planning.attention import BACKWARD, Call, dense_flops
from flexsparse.planning.costs import Communication, token_share
from flexsparse.planning.counting import Counts
from flexsparse.planning.machines import CPU
from flexsparse.planning.measured import Measured
from flexsparse.planning.settings import Settings
from flexsparse.planning.shares import Shares

OPTIMIZER = 7 * 4
"""Bytes that AdamW moves for a parameter: four tensors read, three written, in float32."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one GPU's step.

    Attributes:
        products: matrix products outside of attention.
        elementwise: what lies between them.
        dense_calls: attention that stays dense in either case.
        attention: the calls in question, if dense; 0 in a sparse step.
        coarse: the coarse stage; 0 in a dense step, as the next two.
        selection: the choice of tiles.
        fine: the fine stage.
        tiling: into tile order and back, and gates, of uncompiled sparse calls.
        optimizer: AdamW.
        ulysses: all-to-alls.
        beside: FSDP's and the replicas' collectives, which run beside the computation.
    """

    products: float
    elementwise: float
    dense_calls: float
    attention: float = 0.0
    coarse: float = 0.0
    selection: float = 0.0
    fine: float = 0.0
    tiling: float = 0.0
    optimizer: float
    ulysses: float
    beside: float

    @property
    def compute(self) -> float:
        """Without communication and optimizer."""
        around = self.products + self.elementwise + self.dense_calls
        return around + self.attention + self.coarse + self.selection + self.fine + self.tiling

    @property
    def total(self) -> float:
        """Of a step."""
        return max(self.compute + self.ulysses, self.beside) + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine reaches, in FLOP/s, operations/s and bytes/s."""

    products: float
    dense: tuple[float, float]
    fine: tuple[float, float]
    coarse: float
    selection: float
    elementwise: float
    memory: float
    sequence: float
    weights: float
    replicas: float


def rates(settings: Settings, shares: Shares) -> Rates:
    """Peaks times shares; a group that does not fit into a node goes over the network."""
    machine = settings.machine
    peak = machine.products[settings.dtype]

    def link(size: int) -> float:
        speed = (machine.nvlink if size <= machine.node else machine.network) * shares.links.value
        return speed or math.inf  # a CPU has none, and needs none

    return Rates(
        products=peak * shares.products.value,
        dense=(peak * shares.dense_forward.value, peak * shares.dense_backward.value),
        fine=(peak * shares.fine_forward.value, peak * shares.fine_backward.value),
        coarse=machine.products["float32"] * shares.coarse.value,
        selection=machine.scalar * shares.selection.value,
        elementwise=machine.hbm * shares.elementwise.value,
        memory=machine.hbm * shares.memory.value,
        sequence=link(settings.ulysses),
        weights=link(settings.fsdp),
        replicas=link(settings.gpus),
    )


def _around(share: float, counts: Counts, rate: Rates, compiled: bool) -> tuple[float, float]:
    """Seconds of matrix products and of what lies between them, for a share of the tokens."""
    every = counts.products + counts.backward
    work = math.fsum(n * max(flops / rate.products, moved / rate.memory) for (flops, moved), n in every.items())
    fused = math.fsum(n * moved for (_, moved), n in every.items())
    moved = fused if compiled else counts.moved + counts.moved_backward
    return share * work, share * moved / rate.elementwise


def _tiling(call: Call, training: bool, cpu: bool) -> tuple[float, float]:
    """Bytes moved around the fine stage of an uncompiled call, forward and backward.

    Forward: on a CPU q, k and v into tile order and the output out of it, each read and written; elsewhere, where the templates
    read tokens where they lie, pruned queries packed and the output's rows brought to all tokens; each gate reads itself and
    the output and writes it, and the coarse output is spread to tokens, written and read. Backward: the same the other way.
    """
    layout, one = call.layout, float(call.batch * call.heads * call.head_dim * call.dtype.itemsize)
    packed = layout.padded_len * call.rows / layout.slots
    around = one * (3 * packed + layout.seq_len) if call.prunes else 0.0
    tiling = 4 * one * (layout.seq_len + layout.padded_len) if cpu else around
    gates = one * layout.seq_len * (5 * min(call.gates, 1) + 3 * max(call.gates - 1, 0))
    return tiling + gates, training * (tiling + 2 * gates)


def _attention(flops: float, moved: float, speeds: tuple[float, float], settings: Settings, memory: float) -> float:
    """Seconds of one call: its forwards, and its backward, which moves twice as much."""
    found = settings.forwards * max(flops / speeds[0], moved / memory)
    return found + settings.training * max(BACKWARD * flops / speeds[1], 2 * moved / memory)


def _common(
    settings: Settings, measured: Measured, dense: bool, communication: Communication, rate: Rates
) -> dict[str, float]:
    counts = measured.dense if dense else measured.sparse
    size = settings.torch_dtype.itemsize
    share = token_share(measured.sparse.sparse[0].layout, settings.ulysses)
    products, elementwise = _around(share, counts, rate, settings.compiled)
    calls = 0.0
    for call in measured.sparse.dense:
        B, H, queries, keys, D = call.shape
        moved = 2.0 * B * H * (queries + keys) * D * size
        calls += _attention(call.flops, moved, rate.dense, settings, rate.memory) / settings.ulysses
    beside = (communication.gather + communication.scatter) / rate.weights + communication.replicas / rate.replicas
    return {
        "products": products,
        "elementwise": elementwise,
        "dense_calls": calls,
        "optimizer": settings.training * OPTIMIZER * counts.parameters / settings.fsdp / rate.memory,
        "ulysses": communication.ulysses / rate.sequence,
        "beside": beside,
    }


def dense_times(
    settings: Settings, measured: Measured, calls: list[Call], communication: Communication, shares: Shares
) -> Times:
    """Of the dense step."""
    rate = rates(settings, shares)
    found = 0.0
    for call in calls:
        S, busiest = call.layout.seq_len, math.ceil(call.heads / settings.ulysses)
        flops = dense_flops(call.batch, busiest, S, S, call.head_dim)
        moved = 4.0 * call.batch * busiest * S * call.head_dim * call.dtype.itemsize
        found += _attention(flops, moved, rate.dense, settings, rate.memory)
    return Times(**_common(settings, measured, True, communication, rate), attention=found)


def sparse_times(
    settings: Settings, measured: Measured, calls: list[Call], communication: Communication, shares: Shares
) -> Times:
    """Of the step as planned."""
    rate = rates(settings, shares)
    again = settings.forwards
    coarse = selection = fine = tiling = 0.0
    for whole in calls:
        call = dataclasses.replace(whole, heads=math.ceil(whole.heads / settings.ulysses))
        flops = call.flops()
        one = call.batch * call.heads * call.layout.padded_len * call.head_dim * call.dtype.itemsize
        coarse += again * max(flops.coarse / rate.coarse, (3 if call.gates else 2) * one / rate.memory)
        coarse += settings.training * flops.coarse_backward / rate.coarse
        selection += again * flops.selection / rate.selection
        fine += _attention(flops.fine, 4.0 * one, rate.fine, settings, rate.memory)
        if not settings.compiled:
            forward, backward = _tiling(call, settings.training, settings.gpu == CPU)
            tiling += (again * forward + backward) / rate.elementwise
    own = {"coarse": coarse, "selection": selection, "fine": fine, "tiling": tiling}
    return Times(**_common(settings, measured, False, communication, rate), **own)
