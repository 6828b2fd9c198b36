"""One thing to time: what runs, what it must compute, how much work that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.suite.cases import DENSE

Results = dict[str, Tensor]


@dataclass(kw_only=True, eq=False)
class Contender:
    """An implementation of an op on the inputs of a case.

    Attributes:
        impl: as rows name it.
        op: as rows name it.
        run: what is timed; told the number of the round.
        results: computes once what `run` computes, by name; None for a part that the whole's check covers.
        expected: what `results` must be, as `gate.verdict` takes it; None likewise.
        strict: whether the rule of our own kernels holds (twice the error of a reference), or that for others.
        flops: operations of the selected tiles; None where a rate means nothing.
        density: share of pairs computed.
        part: which part of the op, None for the whole.
        tile: tile of the row, where it is not the case's.
        alone: whether nothing checks it: it is no implementation of ours or of another.
        config: what tells it from others of the same implementation.
        fields: further fields of its row.
    """

    impl: str
    op: str
    run: Callable[[int], Any]
    results: Callable[[], Results] | None = None
    expected: Callable[[], Expected] | None = None
    strict: bool = False
    flops: float | None = None
    density: float | None = None
    part: str | None = None
    tile: tuple[int, int, int] | None = None
    alone: bool = False
    config: dict[str, Any] | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique in its case."""
        config = "" if not self.config else str(sorted(self.config.items()))
        return "/".join(map(str, (self.impl, self.op, self.part or "", self.tile or "", config)))


@dataclass(kw_only=True, eq=False)
class Expected:
    """The truth about some heads.

    Attributes:
        take: from a result to the part of it that is compared.
        exact: float64, by name.
        reference: the same computed in float32 and rounded to the results' dtype, by name.
    """

    take: Callable[[Tensor], Tensor]
    exact: Results
    reference: Results


@dataclass(kw_only=True, eq=False)
class Missing:
    """An implementation that cannot run, and why."""

    impl: str
    op: str
    reason: str
    part: str | None = None
    config: dict[str, Any] | None = None


Found = Iterator["Contender | Missing"]


def after_dense(baselines: tuple[str, ...], contenders: Iterable[Any], save: Callable[[], None]) -> Iterator[Any]:
    """The contenders; ``save`` is called between the last dense baseline and the first other one, where there are both."""
    last = next((name for name in reversed(baselines) if name in DENSE), None)
    others = any(name not in DENSE for name in baselines)
    for found in contenders:
        yield found
        if others and found.impl == last:
            save()


def reason_of(error: BaseException) -> str:
    """An exception as one line with the end of its traceback."""
    trace, places = error.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]} ({' < '.join(reversed(places[-4:]))})"


def training_results(out: Tensor, leaves: tuple[Tensor, ...], names: tuple[str, ...], grad: Tensor) -> Results:
    """Output and gradients by name."""
    grads = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach(), **dict(zip(names, grads))}
