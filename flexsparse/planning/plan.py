"""The plan: FLOPs, memory, communication and time of a step, from its counts.

FLOPs are those of one replica, on all GPUs that share its sequence; memory, bytes and times are one GPU's, the busiest one's.
Letters: R GPUs that share a sequence, F GPUs that share the weights, H heads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from flexsparse.planning.attention import BACKWARD, Call, dense_flops
from flexsparse.planning.costs import Communication, Memory, communication_of, memory_of
from flexsparse.planning.measured import Measured, check_heads, measure
from flexsparse.planning.modes import values
from flexsparse.planning.settings import Settings
from flexsparse.planning.shares import Shares, assumed, shares
from flexsparse.planning.times import Times, dense_times, sparse_times


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one replica's step; a backward holds what checkpointing computes again.

    Attributes:
        other: outside of attention.
        dense_calls: attention that stays dense: over text, and cross-attention.
        coarse: pooling, scores between tiles, coarse output.
        selection: comparisons of the choice, no FLOPs.
        fine: the kept tiles, padding included.
        fine_valid: the pairs of valid tokens among them, forward; expected.
        attention: the same calls, if they were dense.
        other_dense: outside of attention, without gates.
    """

    other: tuple[float, float]
    dense_calls: tuple[float, float]
    coarse: tuple[float, float]
    selection: tuple[float, float]
    fine: tuple[float, float]
    fine_valid: float
    attention: tuple[float, float]
    other_dense: tuple[float, float]

    @property
    def sparse_total(self) -> float:
        """Of the step as planned."""
        return sum(map(sum, (self.other, self.dense_calls, self.coarse, self.fine)))

    @property
    def dense_total(self) -> float:
        """Of the dense step."""
        return sum(map(sum, (self.other_dense, self.dense_calls, self.attention)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step costs.

    Attributes:
        settings: what was planned.
        kind: the model's class.
        grid: tokens.
        calls: (sparse, dense) attention calls.
        tiles: of a call: (query tiles, tiles that a row keeps, slots of a tile).
        padding: padded tokens over the tokens.
        parameters: of the model.
        density: share of pairs that the builder aims at, in tiles.
        flops: of a replica.
        memory: of a GPU.
        communication: of a GPU.
        shares: what is assumed or was measured of the GPU.
        sparse: times of the step.
        dense: times of the dense step.
        notes: what a reader must know.
    """

    settings: Settings
    kind: str
    grid: tuple[int, int, int]
    calls: tuple[int, int]
    tiles: tuple[int, float, int]
    padding: float
    parameters: int
    density: float
    flops: Flops
    memory: Memory
    communication: Communication
    shares: Shares
    sparse: Times
    dense: Times
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Of a step over the dense one."""
        return self.dense.total / self.sparse.total


def plan(settings: Settings) -> Plan:
    """Run the model on fake tensors, and evaluate.

    Raises:
        PlanError: settings that do not fit the model.
    """
    return evaluate(settings, measure(settings))


def evaluate(settings: Settings, measured: Measured) -> Plan:
    """A plan from counts, which hold for any builder of the same kind and any GPUs.

    Raises:
        PlanError: fewer heads than GPUs share a sequence.
    """
    calls = [dataclasses.replace(call, builder=settings.builder) for call in measured.sparse.sparse]
    first = max(calls, key=lambda call: call.heads * call.layout.num_tokens)
    check_heads(settings, min(call.heads for call in calls))
    communication = communication_of(settings, measured.sparse, calls)
    flops = _flops(settings, measured, calls)
    found = shares(settings.machine, first.head_dim, settings.dtype, settings.results)
    dense = communication_of(settings, measured.dense, [dataclasses.replace(call, gates=0) for call in calls])
    layout = first.layout
    return Plan(
        settings=settings,
        kind=measured.source.kind,
        grid=measured.grid,
        calls=(len(calls), len(measured.sparse.dense)),
        tiles=(layout.num_tiles, first.kept_tiles, layout.slots),
        padding=layout.padded_len / layout.seq_len - 1,
        parameters=measured.parameters,
        density=settings.builder.nominal_density(layout, layout),
        flops=flops,
        memory=memory_of(settings, measured, calls),
        communication=communication,
        shares=found,
        sparse=sparse_times(settings, measured, calls, communication, found),
        dense=dense_times(settings, measured, calls, dense, found),
        notes=_notes(settings, measured, found),
    )


def _flops(settings: Settings, measured: Measured, calls: list[Call]) -> Flops:
    again = settings.forwards - 1
    parts = [call.flops() for call in calls]

    def both(forward: float, backward: float) -> tuple[float, float]:
        return forward, again * forward + (backward if settings.training else 0.0)

    def own(name: str) -> float:
        return math.fsum(getattr(part, name) for part in parts)

    attention = math.fsum(
        dense_flops(call.batch, call.heads, call.layout.seq_len, call.layout.seq_len, call.head_dim) for call in calls
    )
    dense_calls = measured.sparse.dense_attention
    return Flops(
        other=(measured.sparse.other, values(measured.sparse.backward)),
        dense_calls=both(dense_calls, BACKWARD * dense_calls),
        coarse=both(own("coarse"), own("coarse_backward")),
        selection=both(own("selection"), 0.0),
        fine=both(own("fine"), BACKWARD * own("fine")),
        fine_valid=own("fine_valid"),
        attention=both(attention, BACKWARD * attention),
        other_dense=(measured.dense.other, values(measured.dense.backward)),
    )


def _notes(settings: Settings, measured: Measured, found: Shares) -> tuple[str, ...]:
    guesses, machine = assumed(found), settings.machine
    notes = []
    if guesses:
        every = len(guesses) == len(dataclasses.fields(found))
        notes.append(
            f"Times are estimates and no measurements: a roofline with {'measured' if machine.measured else 'published'} "
            f"peaks, of which {'every share' if every else 'the share of ' + ', '.join(guesses)} reached is an assumption "
            "that nobody measured."
        )
    elif machine.measured:
        notes.append(
            f"Times are estimates: a roofline whose peaks and shares were measured on {machine.name}, by operation and not by "
            f"model, in {found.products.origin}."
        )
    else:
        notes.append("Times are estimates: a roofline with shares of the peaks that result files of this GPU say.")
    if settings.ulysses > 1:
        notes.append(
            "What is not attention is taken to be spread over the GPUs of a sequence as the tokens are: text that joins the "
            "video is on each of them, everything else is divided evenly."
        )
    notes.append(
        "What lies between matrix products is taken to be fused, one kernel between two of them (torch.compile)."
        if settings.compiled
        else "Each operation is taken to read and write memory by itself, as PyTorch does uncompiled."
    )
    if settings.training:
        notes.append(
            "Weights, gradients and AdamW's averages are taken to be float32, all of them trained; what travels and what a "
            f"step computes with is {settings.dtype}."
        )
        notes.append(
            "Activations are those that autograd saves in uncompiled PyTorch, and temporaries its own; torch.compile has "
            "fewer of both."
        )
    return tuple(notes)
