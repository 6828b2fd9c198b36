"""Runs the Hopper kernels of dq, and of dk with dv, on a case, and compares them with float64."""

import math
from dataclasses import replace
from types import ModuleType

import torch
from tolerance import assert_as_good
from torch import Tensor

from flexsparse.compile_passes.templates import columns as columns_
from flexsparse.compile_passes.templates import hopper_backward
from flexsparse.compile_passes.templates.attention_common import Blocks, flags
from flexsparse.compile_passes.templates.backward import backward_reference
from flexsparse.compile_passes.templates.forward import forward_reference
from flexsparse.compile_passes.templates.launch import LOG2E
from flexsparse.compile_passes.templates.lists import ascending_reference, transpose_reference
from flexsparse.compile_passes.templates.rows import dense_rows
from flexsparse.compile_passes.templates.walks import Walk, add_pieces_reference

from .attention_cases import Case, Problem, build, oracle

SMALL = Case(query_rows=64, slots=64, D=64, dtype=torch.bfloat16)
NAMES = ("dq", "dk", "dv")


def saved(problem: Problem, with_lse_gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-sum-exp, and what the plain kernel `_delta` makes of it and of the output, which is rounded."""
    out, lse = forward_reference(*problem.tensors, **problem.keywords)
    estimate = (problem.grad_out.float() * out.float()).sum(-1)
    if with_lse_gradient:
        estimate -= problem.grad_lse
    return lse, torch.where(lse == -math.inf, math.inf, lse * LOG2E), estimate


def run(
    problem: Problem,
    rows: Blocks,
    columns: Blocks,
    most: int = 0,
    with_lse_gradient: bool = False,
    kernels: ModuleType = hopper_backward,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by name, and the log-sum-exp; split columns have at most so many pieces together."""
    case = problem.case
    lse, lse_log2, estimate = saved(problem, with_lse_gradient)
    given = problem.keywords
    arrays = {name: dense_rows(getattr(problem, name)) for name in ("grad_out", "q", "k", "v")}
    geometry = [given[name] for name in ("query_rows", "kv_video", "slots", "partial")]
    constants = {"GROUP": case.H // case.G, **flags(problem.q, problem.k, problem.bits, *geometry)}
    saved_ = {"lse_log2": lse_log2, "counts": problem.counts, "kv_counts": problem.kv_counts}
    saved_ |= {"delta": torch.empty_like(estimate), "estimate": estimate}
    grad_lse = problem.grad_lse if with_lse_gradient else None
    walk = Walk(rows=arrays, **saved_, grad_lse=grad_lse, constants=constants, **given)
    lists = (problem.bits, problem.counts, case.M, given["capacity"])
    dq = kernels.dq(walk, ascending_reference(*lists), rows)
    offsets, lengths, indices = transpose_reference(*lists)
    B, G, U = problem.k.shape[0], case.G, problem.kv_counts.shape[1]
    tiles = {"group": case.H // G, "U": U, "query_tiles": case.first + case.N + case.last, "N": case.N}
    work = columns_.pieces_reference(lengths, kv_first=case.kv_first, most=most, **tiles)
    dk, dv = torch.empty_like(arrays["k"]), torch.empty_like(arrays["v"])
    workspace = torch.empty(2, B, G, most, case.slots, case.D) if most else None
    kernels.dkdv(walk, offsets, lengths, indices, work, dk, dv, workspace, columns)
    if workspace is not None:
        assert bool((work[..., 3] > 1).any()), "no column was split"
        add_pieces_reference(work, workspace, dk, dv, given["scale"])
    return {"dq": dq, "dk": dk, "dv": dv}, lse


def check(
    problem: Problem,
    rows: Blocks,
    columns: Blocks,
    most: int = 0,
    with_lse_gradient: bool = False,
    kernels: ModuleType = hopper_backward,
) -> dict[str, Tensor]:
    """The gradients, which are as good as a float32 computation's."""
    found, lse = run(problem, rows, columns, most, with_lse_gradient, kernels)
    q, k, v, *rest = problem.tensors
    grad_lse = problem.grad_lse if with_lse_gradient else None
    reference = backward_reference(problem.grad_out, grad_lse, q, k, v, q, lse, *rest, **problem.keywords)
    expected = oracle(problem, with_lse_gradient).values
    for name, twin in zip(NAMES, reference):
        assert twin is not None
        assert_as_good(found[name], twin, expected[name], name)
    past = problem.k.isnan()
    assert bool((found["dk"][past] == 0).all()) and bool((found["dv"][past] == 0).all()), "dk or dv past a count"
    return found


def far_below_zero() -> Problem:
    """All logits are so low that a weight of a slot past a count, whose logit would be 0, overflows."""
    problem = build(replace(SMALL, D=128, partial=True, kv_last=1, magnitude=4.0))
    return replace(problem, q=problem.q.abs(), k=-problem.k.abs())
