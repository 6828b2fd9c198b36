"""Memory and communication of one GPU, the busiest one.

Letters: R GPUs that share a sequence, F GPUs that share the weights, P parameters, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flexsparse.distributed.traffic import traffic
from flexsparse.layout import TileLayout
from flexsparse.planning.attention import Call
from flexsparse.planning.counting import Counts
from flexsparse.planning.measured import Measured
from flexsparse.planning.settings import Settings

MASTER = 4
"""Bytes of a parameter, of its gradient and of each of AdamW's two averages in training: float32."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        weights: its part of the parameters.
        compute_weights: the copies in which a step computes: of all parameters, or under FSDP of two blocks and of what is in
            no block.
        gradients: its part.
        optimizer: its part of AdamW's two averages.
        activations: what backward needs, or for inference the most that is alive at once.
        temporaries: what is alive beside them at the worst moment of the backward; 0 for inference.
        plain: activations without checkpointing; 0 for inference.
        checkpointed: activations with it, and one block's that are computed again; None where the model has none.
        bitmasks: of all sparse calls, among the activations in training; of one call for inference.
        lists: of one call, workspace; columns too in training.
    """

    weights: float
    compute_weights: float
    gradients: float
    optimizer: float
    activations: float
    temporaries: float
    plain: float
    checkpointed: float | None
    bitmasks: float
    lists: float

    @property
    def total(self) -> float:
        """Without what libraries and the allocator hold."""
        fixed = self.weights + self.compute_weights + self.gradients + self.optimizer
        return fixed + self.activations + self.temporaries + self.lists


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes that one GPU receives in a step.

    Attributes:
        ulysses: the all-to-alls around sparse attention; of each direction on the rank that receives most in it.
        gather: FSDP's all-gathers of weights.
        scatter: FSDP's reduce-scatter of gradients.
        replicas: the all-reduce of gradients between groups that share weights.
    """

    ulysses: float
    gather: float
    scatter: float
    replicas: float


def head_share(heads: int, ranks: int) -> float:
    """The busiest GPU's share of the heads."""
    return math.ceil(heads / ranks) / heads


def token_share(layout: TileLayout, ranks: int) -> float:
    """A GPU's share of the tokens: its part of the video, and all text that joins it."""
    return (layout.num_tokens / ranks + layout.text_first + layout.text_last) / layout.seq_len


def memory_of(settings: Settings, measured: Measured, calls: list[Call]) -> Memory:
    """Memory of a step."""
    R, F, size = settings.ulysses, settings.fsdp, settings.torch_dtype.itemsize
    training, P = settings.training, measured.parameters
    stored = MASTER if training else size
    copies = 0.0
    if F > 1:
        counts = measured.sparse
        copies = float(2 * counts.block_parameters + counts.parameters - counts.in_blocks) * size
    elif training and size != MASTER:
        copies = float(P * size)
    share = token_share(calls[0].layout, R)
    plain = measured.plain.saved * share if measured.plain else 0.0
    checkpointed = None
    if measured.checkpointed is not None and measured.plain is not None:
        checkpointed = (measured.checkpointed.saved + measured.plain.largest_block) * share
    own = checkpointed if settings.checkpointing and checkpointed is not None else plain
    peak = measured.sparse.peak * share
    of = [head_share(call.heads, R) for call in calls]
    bitmasks = [call.bitmask_bytes * h for call, h in zip(calls, of)]
    workspace = max((call.list_bytes + training * call.column_bytes) * h for call, h in zip(calls, of))
    return Memory(
        weights=P * stored / F,
        compute_weights=copies,
        gradients=training * P * MASTER / F,
        optimizer=training * 2 * P * MASTER / F,
        activations=own if training else peak,
        temporaries=max(0.0, peak - own) if training else 0.0,
        plain=plain,
        checkpointed=checkpointed,
        bitmasks=math.fsum(bitmasks) if training else max(bitmasks),
        lists=workspace,
    )


def communication_of(settings: Settings, counts: Counts, calls: list[Call]) -> Communication:
    """By the formulas of docs/distributed.md, all in the dtype that computes; of the sparse or of the dense step's counts.

    FSDP2 gathers the weights of blocks again in backward; what is in no block stays gathered (`fully_shard` of the model).
    """
    F, size, training = settings.fsdp, settings.torch_dtype.itemsize, settings.training
    weights = counts.parameters * size
    gathered = weights + training * counts.in_blocks * size
    copies = settings.gpus // F
    return Communication(
        ulysses=math.fsum(_ulysses(settings, call) for call in calls),
        gather=gathered * (F - 1) / F,
        scatter=training * weights * (F - 1) / F,
        replicas=training * 2 * weights / F * (copies - 1) / copies,
    )


def _ulysses(settings: Settings, call: Call) -> int:
    """Bytes of a step for one call."""
    if settings.ulysses == 1:
        return 0
    sizes: dict[str, Any] = {"heads": call.heads, "head_dim": call.head_dim, "batch": call.batch}
    one = traffic(call.layout, **sizes, ulysses=settings.ulysses, gates=call.gates, itemsize=call.dtype.itemsize)
    return settings.forwards * one.total + settings.training * one.backward
