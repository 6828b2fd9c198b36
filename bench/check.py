"""The correctness gate: nothing is timed before its results agree with `backend="reference"` in float64.

Attention is compared given the selection that the builder makes, on a small problem of the same kind (all of it) and
on the measured one (query heads of the first KV head, as the oracle needs S x S float64 numbers several times over).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

import flexsparse as fs
from bench.cases import DENSE, Case
from bench.problem import RUN, Problem, make
from flexsparse.checking.tolerance import complaint, rms


@dataclass
class Verdict:
    """What a check found.

    Attributes:
        error: RMS error / RMS of the oracle, by name, on the last problem checked.
        checked_on: problems that were compared.
        reason: what is wrong, None where nothing is.
    """

    error: dict[str, float] = field(default_factory=dict)
    checked_on: list[str] = field(default_factory=list)
    reason: str | None = None


def first_heads(selection: fs.TileSelection, heads: int) -> fs.TileSelection:
    """A selection of the first query heads only."""
    queries = selection.queries
    if queries is not None:
        parts = (queries.kept[:, :heads], queries.counts, queries.source[:, :heads], queries.position[:, :heads])
        queries = fs.KeptQueries(*parts)
    bits, counts = selection.bits[:, :heads], selection.counts[:, :heads]
    return dataclasses.replace(selection, bits=bits, counts=counts, queries=queries)


def expected(
    problem: Problem, selection: fs.TileSelection, heads: int, groups: int, gradients: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results of the reference backend on the first heads, computed in ``dtype``."""
    inputs = [x[:, :n].to(dtype) for x, n in ((problem.q, heads), (problem.k, groups), (problem.v, groups))]
    q, k, v = inputs = [x.detach().requires_grad_(gradients) for x in inputs]
    out = fs.sparse_attention(q, k, v, problem.layout, first_heads(selection, heads), backend="reference")
    if not gradients:
        return {"out": out}
    grads = torch.autograd.grad(out, inputs, problem.g[:, :heads].to(dtype))
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


def affordable(length: int, heads: int) -> bool:
    """Whether the oracle's tensors, about eight of length x length float64, fit into the memory that is free."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return True
    return 8 * 8 * heads * length * length <= free


def check_attention(case: Case, impls: list[str], problem: Problem) -> dict[str, Verdict]:
    """Compare each implementation's results, as they will be timed, with the oracle's."""
    verdicts = {impl: Verdict() for impl in impls}
    share = case.H // case.G
    small = make(case, case.small_grid)
    places = [("a small problem", small, case.H, case.G), ("the first heads of the real one", problem, share, 1)]
    gradients = case.kind != "forward"
    for place, at, heads, groups in places:
        if not affordable(case.B * at.layout.seq_len, heads):
            continue
        for is_dense in (True, False):
            todo = [i for i in impls if (i == DENSE) == is_dense and verdicts[i].reason is None]
            if not todo:
                continue
            selection = at.everything if is_dense else at.selection
            oracle = expected(at, selection, heads, groups, gradients, torch.float64)
            reference = expected(at, selection, heads, groups, gradients, case.torch_dtype)
            for impl in todo:
                try:
                    actual = RUN[case.kind](impl, at)
                except Exception as error:  # one that cannot run must not stop the others
                    first = next(iter(str(error).splitlines()), "")
                    verdicts[impl].reason = f"raised {type(error).__name__}: {first}, on {place}"
                    continue
                _compare(verdicts[impl], actual, reference, oracle, place)
    return verdicts


def _compare(
    verdict: Verdict, actual: dict[str, Tensor], reference: dict[str, Tensor], oracle: dict[str, Tensor], place: str
) -> None:
    verdict.checked_on.append(place)
    for name, exact in oracle.items():
        own = actual[name][:, : exact.shape[1]]
        verdict.error[name] = rms(own.double() - exact) / rms(exact)
        found = complaint(own, reference[name], exact)
        if found and verdict.reason is None:
            verdict.reason = f"{name} {found}, on {place}"


def naive_tiles(x: Tensor, layout: fs.TileLayout) -> Tensor:
    """`to_tiles` as its definition reads: cut out one tile after the other."""
    (T, H, W), (t, h, w) = layout.grid, layout.sides
    grid = x.unflatten(-2, (T, H, W))
    out = x.new_zeros((*x.shape[:-2], layout.num_tiles, layout.slots, x.shape[-1]))
    starts = [(a, b, c) for a in range(0, T, t) for b in range(0, H, h) for c in range(0, W, w)]
    for n, (a, b, c) in enumerate(starts):
        tile = grid[..., a : a + t, b : b + h, c : c + w, :].flatten(-4, -2)
        out[..., n, : tile.shape[-2], :] = tile
    return out.flatten(-3, -2)


def check_layout(problem: Problem) -> Verdict:
    """Both directions, exactly."""
    tiles = problem.layout.to_tiles(problem.q)
    verdict = Verdict(checked_on=["the real problem"])
    if not torch.equal(tiles, naive_tiles(problem.q, problem.layout)):
        verdict.reason = "to_tiles differs from tiles cut out one by one"
    elif not torch.equal(problem.layout.to_raster(tiles), problem.q):
        verdict.reason = "to_raster does not invert to_tiles"
    verdict.error = {"out": 0.0} if verdict.reason is None else {}
    return verdict


def check_select(problem: Problem, selection: fs.TileSelection) -> Verdict:
    """VSA: as many tiles as asked for, none below the last that float64 scores keep (ties within rounding aside)."""
    layout = problem.layout
    counts = layout.tile_counts.double()[:, None]
    q, k = (naive_tiles(x.double(), layout).unflatten(2, (-1, layout.slots)).sum(3) / counts for x in _qk(problem))
    scores = q @ k.transpose(-1, -2) * problem.q.shape[-1] ** -0.5
    keep = selection.keep()
    n = problem.builder.tiles_kept(layout.num_tiles)
    verdict = Verdict(checked_on=["the real problem"])
    last = scores.topk(n, -1).values[..., -1:]
    short = (last - scores).masked_fill(~keep, 0).amax().clamp_min(0)
    verdict.error = {"scores": float(short) / rms(scores)}
    if not bool((keep.sum(-1) == n).all()):
        verdict.reason = f"rows keep {int(keep.sum(-1).min())} to {int(keep.sum(-1).max())} tiles, not {n}"
    elif not verdict.error["scores"] <= 32 * torch.finfo(torch.float32).eps:
        verdict.reason = f"a kept tile scores {verdict.error['scores']:.2e} (of the scores' RMS) too little"
    return verdict


def _qk(problem: Problem) -> tuple[Tensor, Tensor]:
    repeat = problem.q.shape[1] // problem.k.shape[1]
    return problem.q, problem.k.repeat_interleave(repeat, 1)
