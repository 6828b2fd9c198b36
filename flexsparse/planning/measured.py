"""A model's step, run once for every way that a plan needs: sparse and dense, with and without checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from flexsparse.grids import Grid
from flexsparse.models import known
from flexsparse.planning.counting import Counts, PlanError, count, fake
from flexsparse.planning.models import Source, build, example, find, grid_of, heads_of
from flexsparse.planning.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Counts of one model, grid and builder; they hold for any number of GPUs.

    Attributes:
        source: the model's configuration.
        grid: tokens.
        sparse: the step as planned.
        dense: the same with dense attention and without gates.
        plain: the sparse step without checkpointing; None for inference.
        checkpointed: the sparse step with it; None for inference, and where the model has none.
    """

    source: Source
    grid: Grid
    sparse: Counts
    dense: Counts
    plain: Counts | None
    checkpointed: Counts | None

    @property
    def parameters(self) -> int:
        """Of the model as planned, gates included."""
        return self.sparse.parameters


def check_heads(settings: Settings, heads: int) -> None:
    """Raise a `PlanError` where more GPUs share a sequence than there are heads."""
    if settings.ulysses > heads:
        raise PlanError(f"ulysses is {settings.ulysses}, but the model has {heads} heads: give at most one GPU a head")


def _check_ulysses(model: nn.Module) -> None:
    """Raise a `PlanError` for a class that `fs.distributed.ulysses` refuses without a plan of the user's."""
    about = known(model)
    if about.watched_by or not (about.plan or getattr(model, "_cp_plan", None)):
        raise PlanError(
            f"ulysses: {type(model).__name__} is not known to run sequence parallel: leave it at 1, and spread samples instead"
        )


def measure(settings: Settings) -> Measured:
    """Run the model on fake tensors.

    Raises:
        PlanError: settings that do not fit the model.
    """
    source = find(settings.model)
    heads = heads_of(source)
    if heads is not None:
        check_heads(settings, heads)
    training, gates = settings.training, settings.gates
    with fake():
        model = build(source, settings.torch_dtype)
        if settings.ulysses > 1:
            _check_ulysses(model)
        grid = settings.grid or grid_of(model, source, settings.pixels or (1, 1, 1))
        inputs = example(model, grid, settings.batch, settings.torch_dtype, settings.text)
        how: dict[str, Any] = {"builder": settings.builder, "tile": settings.tile, "gates": gates, "training": training}
        able = bool(getattr(model, "_supports_gradient_checkpointing", False))
        own = training and settings.checkpointing
        plain = count(model, inputs, **how) if not own or training else None
        checkpointed = count(model, inputs, **how, checkpointing=True) if training and (own or able) else None
        dense = count(model, inputs, tile=settings.tile, training=training, checkpointing=own)
    sparse = checkpointed if own else plain
    if sparse is None:
        raise PlanError(f"{source.kind}: nothing was counted")
    return Measured(
        source=source,
        grid=grid,
        sparse=sparse,
        dense=dense,
        plain=plain if training else None,
        checkpointed=checkpointed,
    )
