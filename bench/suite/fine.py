"""The fine stage, forward and backward, in tile order: ours and every baseline, on the same lists.

Shape letters: B batch, H heads, N query tiles, M KV tiles, P padded tokens, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.baselines.protocol import Prepare, Problem, Unavailable
from bench.suite import data, oracle
from bench.suite.cases import DENSE, OURS, Case
from bench.suite.contender import Contender, Expected, Found, Missing, Results, reason_of, training_results
from bench.suite.device import Device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Who we are compared with.

    Attributes:
        baselines: by name.
        begin: told which is prepared next; returns why it must not be, or None.
    """

    baselines: dict[str, Prepare]
    begin: Callable[[str], str | None] = lambda name: None


def problem_of(case: Case, device: Device) -> tuple[Problem, Tensor]:
    """Inputs of a case in tile order, and the output's gradient."""
    layout = case.layout
    q, k, v, grad = data.tokens(case, device.torch)
    selection = case.builder.select(q, k, layout)
    q, k, v, grad = data.in_tiles(layout, q, k, v, grad)
    scale = case.D**-0.5
    problem = Problem(q_BHPD=q, k_BGPD=k, v_BGPD=v, layout=layout, selection=selection, scale=scale)
    return problem, grad


def ours(problem: Problem, training: bool) -> Attend:
    """Our op on the problem's lists; it makes its lists from the bitmask each time, which is part of what is timed."""
    operands = (*problem.selection.operands(), problem.scale, training)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.flexsparse.tile_attention(q, k, v, None, None, *operands)[0]

    return attend


def selected_pairs(selection: fs.TileSelection) -> float:
    """Query slots x KV slots of all selected tiles."""
    return float(selection.counts.double().sum()) * selection.query_rows * selection.kv_layout.slots


def expected(
    case: Case, problem: Problem, grad: Tensor | None, dense: bool, heads: tuple[int, ...]
) -> Callable[[], Expected]:
    """The truth about some heads of the first sample; computed when asked for, once."""
    found: list[Expected] = []

    def once() -> Expected:
        if not found:
            found.append(_expected(case, problem, grad, dense, heads))
        return found[0]

    return once


def _expected(case: Case, problem: Problem, grad: Tensor | None, dense: bool, heads: tuple[int, ...]) -> Expected:
    layout = problem.layout
    counts = layout.index(problem.q_BHPD.device)[2]
    keep = problem.selection.keep()
    if dense:
        keep = torch.ones_like(keep)
    valid = (torch.arange(layout.slots, device=counts.device) < counts[:, None]).flatten()

    def take(x: Tensor) -> Tensor:  # what padding slots hold is nobody's business
        return torch.stack([x[0, h] for h in heads])[:, valid]

    def truth(dtype: torch.dtype) -> Results:
        each = [
            oracle.fine(
                *(x[0, h] for x in (problem.q_BHPD, problem.k_BGPD, problem.v_BGPD)),
                keep[0, h],
                counts,
                problem.scale,
                None if grad is None else grad[0, h],
                dtype,
            )
            for h in heads
        ]
        return {name: torch.stack([one[name] for one in each])[:, valid] for name in each[0]}

    reference = {name: x.to(case.torch_dtype) for name, x in truth(torch.float32).items()}
    return Expected(take=take, exact=truth(torch.float64), reference=reference)


def rivals(
    case: Case, problem: Problem, peers: Peers, training: bool, device: Device
) -> Iterable[tuple[str, Attend, dict[str, Any]] | Missing]:
    """The case's baselines, prepared; or why one cannot run. What they took the GPU with is raised."""
    for name in case.baselines:
        reason = peers.begin(name)
        if reason is None and name not in peers.baselines:
            reason = "no such baseline in bench.baselines"
        if reason is None:
            try:
                attend = peers.baselines[name](problem, training)
                yield name, attend, {"note": getattr(attend, "note", None)}
                continue
            except Unavailable as error:
                reason = str(error)
            except Exception as error:  # a baseline's own code must not stop ours
                reason = reason_of(error)
            device.synchronize()
        yield Missing(impl=name, op=case.kind, reason=reason)


def forward(case: Case, device: Device, peers: Peers) -> Found:
    """Contenders of ``fine_forward``."""
    problem, _ = problem_of(case, device)
    inputs = data.copies([problem.q_BHPD, problem.k_BGPD, problem.v_BGPD], device.l2_bytes)
    pairs, whole = _pairs(problem)
    heads = tuple(sorted({0, case.H - 1}))
    truths = {dense: expected(case, problem, None, dense, heads) for dense in (False, True)}
    own: Any = (OURS, ours(problem, False), {})
    for found in itertools.chain([own], rivals(case, problem, peers, False, device)):
        if isinstance(found, Missing):
            yield found
            continue
        name, attend, fields = found
        dense = name in DENSE
        yield Contender(
            impl=name,
            op="fine_forward",
            run=lambda turn, attend=attend: attend(*inputs[turn % len(inputs)]),  # type: ignore[misc]
            results=lambda attend=attend: {"out": attend(*inputs[0])},  # type: ignore[misc]
            expected=truths[dense],
            strict=name == OURS,
            flops=4 * case.D * (whole if dense else pairs),
            density=1.0 if dense else pairs / whole,
            fields=fields,
        )


def backward(case: Case, device: Device, peers: Peers) -> Found:
    """Contenders of ``fine_backward``, and of the forward that saves what it needs, in the same loop."""
    problem, grad = problem_of(case, device)
    leaves = tuple(x.detach().requires_grad_() for x in (problem.q_BHPD, problem.k_BGPD, problem.v_BGPD))
    pairs, whole = _pairs(problem)
    truths = {dense: expected(case, problem, grad, dense, (0,)) for dense in (False, True)}
    own: Any = (OURS, ours(problem, True), {})
    for found in itertools.chain([own], rivals(case, problem, peers, True, device)):
        if isinstance(found, Missing):
            yield found
            continue
        name, attend, fields = found
        dense = name in DENSE
        work = case.D * (whole if dense else pairs)
        common: dict[str, Any] = {"impl": name, "density": 1.0 if dense else pairs / whole, "fields": fields}
        held: list[Tensor] = []

        def results(attend: Attend = attend, held: list[Tensor] = held) -> Results:
            held[:] = [attend(*leaves)]
            return training_results(attend(*leaves), leaves, GRADIENTS, grad)

        def run(turn: int, held: list[Tensor] = held) -> Any:
            return torch.autograd.grad(held[0], leaves, grad, retain_graph=True)

        yield Contender(
            op="fine_backward",
            run=run,
            results=results,
            expected=truths[dense],
            strict=name == OURS,
            flops=10 * work,
            **common,
        )
        yield Contender(
            op="fine_forward",
            run=lambda turn, attend=attend: attend(*leaves),  # type: ignore[misc]
            flops=4 * work,
            config={"training": True},
            **common,
        )


def _pairs(problem: Problem) -> tuple[float, float]:
    """Pairs of slots in selected tiles, and in all."""
    B, H, P, _ = problem.q_BHPD.shape
    return selected_pairs(problem.selection), float(B * H) * P * problem.k_BGPD.shape[2]
