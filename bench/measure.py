"""From a case to rows: check, then time everything that passed in one interleaved loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import check
from bench.cases import DENSE, Case, Entry
from bench.memory import peak_memory
from bench.problem import RUN, Problem, make
from bench.rows import Row, ratio, row_of
from bench.timing import interleaved
from flexsparse.masks.coarse import CoarseInputs


def measure(case: Case, threads: int, repeats: int) -> list[Row]:
    """All rows of a case, the dense one first. A row whose check failed has a reason and no measurement."""
    threads = case.threads or threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # code of one case would make the next one's sizes dynamic
    try:
        return _measure(case, threads, repeats)
    finally:
        torch.set_num_threads(before)


def _measure(case: Case, threads: int, repeats: int) -> list[Row]:
    problem = make(case, case.grid)
    op = "peak_memory" if case.kind == "memory" else f"attention_{case.kind}"
    entries = [Entry(op=op, impl=DENSE), *case.entries]
    verdicts = verdicts_of(case, entries, problem)
    dense_failed = verdicts[entries[0]].reason is not None
    rows = {}
    for entry in entries:
        verdict = verdicts[entry]
        if dense_failed and entry.impl != DENSE and verdict.reason is None:
            verdict = check.Verdict(verdict.error, verdict.checked_on, f"nothing to compare with: {DENSE} failed")
        fields: dict[str, Any] = {"error": verdict.error, "checked_on": verdict.checked_on}
        fields |= {"checked": verdict.reason is None, "reason": verdict.reason}
        rows[entry] = row_of(case, entry, threads, density_of(entry, problem), **fields)
    passed = [entry for entry in entries if rows[entry].checked]
    if dense_failed:
        return list(rows.values())
    if case.kind == "memory":
        for entry in passed:
            measure_memory(case, rows[entry], rows[entries[0]], threads)
        return list(rows.values())
    samples = interleaved({str(n): function_of(case, entry, problem) for n, entry in enumerate(passed)}, repeats)
    for own, entry in zip(samples.values(), passed):
        rows[entry].ms, rows[entry].dense_ms = own, samples["0"]
        rows[entry].ratio_to_dense = ratio(own, samples["0"])
    return list(rows.values())


def measure_memory(case: Case, row: Row, dense: Row, threads: int) -> None:
    """Peak memory of a row beside dense's, which is measured first."""
    try:
        row.mib = peak_memory(case, row.impl, threads)
    except RuntimeError as error:  # a failing process must not stop the other cases
        row.checked, row.reason = False, str(error).splitlines()[-1]
        return
    if dense.mib is None:
        row.checked, row.reason, row.mib = False, f"nothing to compare with: {DENSE} failed", None
        return
    row.dense_mib, row.ratio_to_dense = dense.mib, ratio(row.mib, dense.mib)


def verdicts_of(case: Case, entries: list[Entry], problem: Problem) -> dict[Entry, check.Verdict]:
    """The correctness gate of every row."""
    runs = [entry for entry in entries if entry.part is None]
    attention = check.check_attention(case, [entry.impl for entry in runs], problem)
    verdicts = {entry: attention[entry.impl] for entry in runs}
    for entry in entries:
        if entry.op == "layout":
            verdicts[entry] = check.check_layout(problem)
        elif entry.op == "select":
            verdicts[entry] = check.check_select(problem, function_of(case, entry, problem)())
    return verdicts


def density_of(entry: Entry, problem: Problem) -> float | None:
    """Density of a row's attention; None where a row is about none."""
    if entry.op == "layout":
        return None
    return 1.0 if entry.impl == DENSE else problem.selection.density


def function_of(case: Case, entry: Entry, problem: Problem) -> Callable[[], Any]:
    """What is timed for a row."""
    p = problem
    if entry.part is None:
        return lambda: RUN[case.kind](entry.impl, p)
    tiled = p.layout.to_tiles(p.q)
    if entry.part == "to_tiles":
        return lambda: p.layout.to_tiles(p.q)
    if entry.part == "to_raster":
        return lambda: p.layout.to_raster(tiled)
    if entry.part == "q_k_v_out":
        return lambda: (*map(p.layout.to_tiles, (p.q, p.k, p.v)), p.layout.to_raster(tiled))
    if entry.part == "select":
        return lambda: p.builder.select(p.q, p.k, p.layout)
    return plan_of(p)


def plan_of(p: Problem) -> Callable[[], Any]:
    """The choice of tiles as attention runs it, on tokens that are in tile order already."""
    tiles = [p.layout.video(p.layout.to_tiles(x)) for x in (p.q, p.k)]

    def plan() -> Any:
        with torch.no_grad():
            return p.builder.plan(CoarseInputs(*tiles, p.layout, p.layout, p.q.shape[-1] ** -0.5))[0]

    return plan
