"""Annealing: a ratio that moves from a start to a target in steps, and is read by compiled graphs as a tensor."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexsparse.errors import RewriteError
from flexsparse.given import keywords_only, to_float, to_int
from flexsparse.ops.choice import Rule


def _refuse_in_a_graph(name: str) -> None:
    """Raise where a builder is traced: what it reads is a constant of the graph. Dynamo sees the number change itself."""
    if not torch.compiler.is_dynamo_compiling() and torch._guards.TracingContext.try_get() is not None:
        raise RewriteError(
            f"a builder reads SparsitySchedule.{name}, a plain number, which its graph would keep for good: read .tensor, "
            "which the schedule changes in place"
        )


@keywords_only()
class SparsitySchedule:
    """A ratio (sparsity, or a kept density) that goes from ``start`` to ``target`` in equal steps.

    The value is ``start`` for the first ``every`` training steps, then moves by ``step`` every ``every`` steps and
    is exactly ``target`` from then on: steps are counted as integers, so that no float error piles up (a floor of
    ``0.8 / 0.03`` ends at 0.78). Compiled graphs read the value from a 0-d tensor: a new step recompiles nothing.

    >>> schedule = SparsitySchedule(start=0.0, target=0.9, step=0.03, every=50)     # VSA, arXiv 2505.13389, App. C
    >>> builder = fs.VSA(sparsity=schedule)
    >>> # not run: needs data
    >>> for batch in data:
    ...     train(batch); schedule.advance()

    Args:
        target: the ratio at the end, in [0, 1].
        start: the ratio at the beginning, in [0, 1]; 0 for a sparsity (dense), 1 for a density.
        step: how much the ratio moves at a time, above 0.
        every: training steps between moves, at least 1.

    Raises:
        ValueError: an argument out of range or not a number.
    """

    def __init__(self, *, target: float, start: float = 0.0, step: float = 0.03, every: int = 50) -> None:
        ratios = []
        for name, given in (("target", target), ("start", start)):
            ratio = to_float(given)
            if ratio is None or not 0 <= ratio <= 1:
                raise ValueError(f"SparsitySchedule {name} is {given!r}: give a ratio in [0, 1]")
            ratios.append(ratio)
        move, period = to_float(step), to_int(every)
        if move is None or not move > 0 or not math.isfinite(move):
            raise ValueError(
                f"SparsitySchedule step is {step!r}: give how much the ratio moves at a time, a finite number above 0"
            )
        if period is None or period < 1:
            raise ValueError(
                f"SparsitySchedule every is {every!r}: give the training steps between moves, an int of at least 1"
            )
        (self.target, self.start), self.every, self.step = ratios, period, move
        self.steps_done = 0
        with torch.inference_mode(False):  # a normal tensor of the CPU, whatever a model is being built under
            self.tensor: Tensor = torch.tensor(self.start, dtype=torch.float64, device="cpu")
        self.seek(0)

    @property
    def moves(self) -> int:
        """Moves from start to target. A last move may be smaller than ``step``."""
        return math.ceil(round(min(abs(self.target - self.start) / self.step, sys.maxsize), 9))

    def value_at(self, step: int) -> float:
        """The ratio at a training step, counted from 0.

        Raises:
            ValueError: a step below 0.
        """
        if step < 0:
            raise ValueError(f"SparsitySchedule step is {step}: give a training step of at least 0")
        done = step // self.every
        if done >= self.moves:
            return self.target
        return self.start + math.copysign(done * self.step, self.target - self.start)

    @property
    def value(self) -> float:
        """The ratio now, for a log; a builder of your own reads ``tensor``, a 0-d float64 tensor on the CPU.

        Raises:
            RewriteError: read while a graph is made, which would keep it.
        """
        _refuse_in_a_graph("value")
        return self.value_at(self.steps_done)

    @property
    def finished(self) -> bool:
        """Whether the target is reached; not for a builder, as `value`."""
        _refuse_in_a_graph("finished")
        return self.steps_done // self.every >= self.moves

    def seek(self, step: int) -> None:
        """Go to a training step.

        Raises:
            ValueError: a step that is no int of at least 0.
        """
        place = to_int(step)
        if place is None or place < 0:
            raise ValueError(f"SparsitySchedule step is {step!r}: give a training step, an int of at least 0")
        self.steps_done = place
        self.tensor.fill_(self.value_at(place))  # in place: compiled graphs hold this very tensor

    def advance(self, steps: int = 1) -> float:
        """Count training steps; returns the ratio that holds from now on.

        Raises:
            ValueError: a number of steps that is no int, or goes back beyond step 0.
        """
        count = to_int(steps)
        if count is None or self.steps_done + count < 0:
            raise ValueError(
                f"SparsitySchedule steps is {steps!r} at step {self.steps_done}: give how many training steps, an int; it "
                "cannot go below step 0"
            )
        self.seek(self.steps_done + count)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs; plain numbers."""
        return {
            "steps_done": self.steps_done,
            "target": self.target,
            "start": self.start,
            "step": self.step,
            "every": self.every,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            TypeError: the state is no dict.
            ValueError: the state belongs to a schedule with other settings, or is none of a schedule.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"SparsitySchedule state is {type(state).__name__}: give the dict that state_dict() returned"
            )
        mine = self.state_dict()
        missing = [name for name in mine if name not in state]
        if missing:
            raise ValueError(
                f"SparsitySchedule state has no {', '.join(missing)}: give the dict that state_dict() returned"
            )
        for name in ("target", "start", "step", "every"):
            if state[name] != mine[name]:
                raise ValueError(f"{name} is {mine[name]} here and {state[name]} in the saved schedule: use the same")
        done = to_int(state["steps_done"])
        if done is None or done < 0:
            raise ValueError(
                f"SparsitySchedule state has steps_done={state['steps_done']!r}: give an int of at least 0"
            )
        self.seek(done)

    def __copy__(self) -> SparsitySchedule:
        return copy.deepcopy(self)  # one tensor for two schedules would be moved by both

    def __repr__(self) -> str:
        return (
            f"SparsitySchedule(target={self.target}, start={self.start}, step={self.step}, every={self.every})"
            f" at step {self.steps_done}: {self.value_at(self.steps_done):.4g}"
        )


class BoundRatio:
    """A ratio inside a graph: the schedule's tensor as that graph sees it, and the range it can take."""

    def __init__(self, tensor: Tensor, lowest: float, highest: float) -> None:
        self.tensor, self.lowest, self.highest = tensor, lowest, highest

    @property
    def value(self) -> float:
        """For builders that would read the schedule's: refused, as it is."""
        _refuse_in_a_graph("value")
        return float(self.tensor)


Ratio = float | SparsitySchedule | BoundRatio


def schedules_of(builder: Any) -> tuple[SparsitySchedule, ...]:
    """The schedules that a builder reads, as far as it says so by a method ``schedules``."""
    method = getattr(builder, "schedules", None)
    return tuple(method()) if callable(method) else ()


def lowest(ratio: Ratio) -> float:
    """The lowest value that a ratio ever takes."""
    if isinstance(ratio, SparsitySchedule):
        return min(ratio.start, ratio.target)
    return ratio.lowest if isinstance(ratio, BoundRatio) else ratio


def highest(ratio: Ratio) -> float:
    """The highest value that a ratio ever takes."""
    if isinstance(ratio, SparsitySchedule):
        return max(ratio.start, ratio.target)
    return ratio.highest if isinstance(ratio, BoundRatio) else ratio


def current(ratio: Ratio) -> float | Tensor:
    """The value to compute with: a float, or the 0-d float64 tensor of a schedule."""
    return ratio if isinstance(ratio, int | float) else ratio.tensor


def rule_of(name: str, ratio: Ratio, min_tiles: int = 1) -> Rule:
    """A rule with a ratio for its number."""
    if isinstance(ratio, int | float):
        return Rule(name=name, value=float(ratio), min_tiles=min_tiles)
    return Rule(name=name, now=ratio.tensor, min_tiles=min_tiles)


def target(ratio: Ratio) -> float:
    """The value at the end of a schedule; a plain ratio itself."""
    if isinstance(ratio, SparsitySchedule):
        return ratio.target
    return float(ratio.tensor) if isinstance(ratio, BoundRatio) else ratio


def check_ratio(name: str, ratio: Ratio | None, *, zero: bool, one: bool) -> Ratio:
    """A ratio, a number as a plain float.

    Raises:
        TypeError: neither a number nor a schedule.
        ValueError: outside of [0, 1], with the ends that are allowed.
    """
    if isinstance(ratio, BoundRatio):
        return ratio
    ends = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    found = ratio if isinstance(ratio, SparsitySchedule) else to_float(ratio)
    if found is None:
        raise TypeError(f"{name} is {ratio!r}: give a number in {ends} or a SparsitySchedule")
    for value in (found.start, found.target) if isinstance(found, SparsitySchedule) else (found,):
        if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
            raise ValueError(f"{name} is {value}: give a ratio in {ends}")
    return found
