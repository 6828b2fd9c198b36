"""Dense attention in the first denoising steps, where a video's layout is decided."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flexsparse.given import to_float
from flexsparse.wrap import state_of


class DenseSteps:
    """Runs wrapped models densely for the first part of denoising; a diffusers ``callback_on_step_end``.

    >>> # not run: needs a pipeline
    >>> dense_steps = fs.DenseSteps(pipe.transformer, fraction=0.2)
    >>> pipe(prompt, callback_on_step_end=dense_steps)

    The models are dense from the moment this is made, and again after the last step, for the next run. A dense step of a
    compiled model runs a compiled form of the model as it was, which its first dense step compiles. A run that ended early
    (interrupted, or an error) leaves the models where they were: call `reset` before the next one. To train after a
    validation, call `remove`, or let ``with fs.DenseSteps(...) as dense_steps:`` do so: a dense step that has gradients is an
    error.

    Args:
        models: one or several wrapped models (Wan 2.2 has two).
        fraction: share of the steps that are dense, in [0, 1]: the first ``round(fraction * steps)``; without ``steps`` at
            least one, unless the fraction is 0: the first step runs before the pipeline has said how many there are.
        steps: number of steps of a run; None to ask the pipeline, which the callback is given.

    Raises:
        ValueError: fraction or steps out of range, or a model that is not wrapped.
        TypeError: models are none.
    """

    def __init__(self, models: nn.Module | Sequence[nn.Module], fraction: float, steps: int | None = None) -> None:
        share = to_float(fraction)
        if share is None or not 0 <= share <= 1:
            raise ValueError(f"fraction is {fraction!r}: give the share of denoising steps to run densely, in [0, 1]")
        if steps is not None:
            steps = _whole(steps)
        if not isinstance(models, nn.Module | Sequence):
            raise TypeError(
                f"models is {type(models).__name__}: give one or several wrapped models (a pipeline's .transformer)"
            )
        self.states = [state_of(model) for model in ([models] if isinstance(models, nn.Module) else models)]
        self.fraction, self.steps = share, steps
        self.reset()

    def __enter__(self) -> DenseSteps:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the models alone, sparse from now on."""
        self._set(False)
        self.states = []

    def dense_until(self, steps: int) -> int:
        """How many of so many steps are dense."""
        return round(self.fraction * steps)

    def reset(self) -> None:
        """As before a run's first step."""
        self._set(self.fraction > 0 and (self.steps is None or self.dense_until(self.steps) > 0))

    def _set(self, dense: bool) -> None:
        for state in self.states:
            state.dense = dense

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """After a denoising step, counted from 0: what the next one runs.

        Raises:
            ValueError: no number of steps given, and a pipeline that does not say it.
        """
        steps = self.steps if self.steps is not None else getattr(pipe, "num_timesteps", None)
        if steps is None:
            raise ValueError(
                f"{type(pipe).__name__} has no num_timesteps: give fs.DenseSteps(..., steps=number of steps)"
            )
        if step + 1 >= steps:
            self.reset()
        else:
            self._set(step + 1 < self.dense_until(steps))
        return callback_kwargs


def _whole(steps: Any) -> int:
    try:
        found = 0 if isinstance(steps, bool) else operator.index(steps)
    except TypeError:
        found = 0
    if found < 1:
        raise ValueError(f"steps is {steps!r}: give the number of denoising steps of a run, at least 1, or None")
    return found
