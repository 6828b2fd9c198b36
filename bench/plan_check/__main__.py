"""How far plans are off: `python -m bench.plan_check`.

Writes bench/results/machine_cpu.json and plan_cpu.json, and the tables of docs/plan.md. It measures what this CPU does
(`bench.machine`), runs small models with random weights, and puts what `flexsparse plan` says of each step beside it: time,
bytes of tensors, peak memory, bytes between two processes. One thread, whose CPU time is taken. The machine's and the models'
repeats take turns, so that a slow moment hits both; their sizes differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.header import header
from bench.plan_check import chosen, peak, ranks, tensors
from bench.plan_check.cases import Case, inputs_of, model_of, optimizer_of, step_of
from bench.plan_check.table import RESULTS, publish
from bench.timing import Samples, both_clocks
from flexsparse.planning import evaluate, measure

REPEATS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare, write; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_check", description=__doc__)
    parser.add_argument(
        "--out", type=machine.new_file, default=RESULTS, help="result file (default: bench/results/plan_cpu.json)"
    )
    parser.add_argument(
        "--machine", type=machine.new_file, help="result file of the CPU (default: machine_cpu.json beside it)"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"samples of a step (default: {REPEATS})")
    parser.add_argument("--table", action="store_true", help="write the table from the result file, run nothing")
    options = parser.parse_args(argv)
    if options.table:
        publish(json.loads(options.out.read_text()))
        return 0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    cpu = options.machine or options.out.with_name("machine_cpu.json")
    head = header(1, clock="CPU time", machine=cpu.name, repeats=options.repeats)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts(Path(folder), cpu, options.repeats):
            rows += part
            machine.write(options.out, {"header": head, "rows": rows})  # a run cut short keeps what it had
    if options.out == RESULTS:
        publish({"header": head, "rows": rows})
    return 0


def parts(folder: Path, cpu: Path, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """All rows, some at a time; writes the machine's file."""
    yield times(folder, cpu, repeats)
    for case in chosen.TENSORS:
        found = tensors.counted(case, folder)
        yield [row(case, name, "bytes", planned, [real]) for name, (planned, real) in found.items()]
    yield exchanged(folder)
    for case in chosen.PEAKS:
        memory = evaluate(settings := case.settings(folder), measure(settings)).memory
        planned = memory.activations + memory.temporaries + memory.lists
        yield [row(case, "peak over a warm process", "bytes", planned, [peak.added(case) * 2**20])]


def times(folder: Path, cpu: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows of all steps."""
    kernels = machine.problems(machine.Sizes())
    functions: dict[str, Callable[[], Any]] = {case: function for case, (function, _) in kernels.items()}
    for case in chosen.TIMED:
        model = model_of(case, folder)
        functions[case.name] = step_of(case, model, inputs_of(case, model), optimizer_of(case, model))
    samples = both_clocks(functions, repeats)
    machine.write(cpu, machine.result_of(kernels, samples, repeats=repeats))
    return [time_row(case, folder, cpu, samples[case.name]) for case in chosen.TIMED]


def row(case: Case, quantity: str, unit: str, planned: float, found: list[float], **more: Any) -> dict[str, Any]:
    """One comparison; ratio is planned over the median of what was measured."""
    median = statistics.median(found)
    ratio = round(planned / median, 4) if median else None
    return {
        "quantity": quantity,
        "unit": unit,
        **case.fields(),
        "planned": round(planned, 3),
        "measured": found,
        "ratio": ratio,
        **more,
    }


def time_row(case: Case, folder: Path, cpu: Path, samples: Samples) -> dict[str, Any]:
    """A step's time; ``parts`` are the plan's, in milliseconds."""
    settings = case.settings(folder, cpu)
    plan = evaluate(settings, measure(settings))
    times = plan.dense if case.builder is None else plan.sparse
    parts = {name: round(1e3 * value, 3) for name, value in vars(times).items() if value}
    more = {"wall_ms": samples.wall_ms, "parts": parts}
    return row(case, "step", "ms", 1e3 * times.total, samples.cpu_ms, **more)


def exchanged(folder: Path) -> list[dict[str, Any]]:
    """Bytes between two processes, of the rank that receives more."""
    found = ranks.run(list(chosen.EXCHANGED))
    rows = []
    for index, (kind, case) in enumerate(chosen.EXCHANGED):
        planned = ranks.planned_bytes(kind, case, folder)
        for collective, part in ranks.COLLECTIVES[kind].items():
            real = max(each[index].get(collective, 0) for each in found)
            if real or part:
                name = f"{kind}: {collective.replace('_', '-')}"
                rows.append(row(case, name, "bytes", planned[part] if part else 0.0, [real], ranks=ranks.RANKS))
    return rows


if __name__ == "__main__":
    sys.exit(main())
