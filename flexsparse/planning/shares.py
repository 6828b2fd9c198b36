"""Which share of a machine's peaks is reached: measured where a result file says so, else assumed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexsparse.planning.machines import File, Machine, cpu_file, files


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a peak is reached.

    Attributes:
        value: above 0; at most 1 of a published peak.
        origin: ``assumed``, or the files that it was measured in.
    """

    value: float
    origin: str = "assumed"

    @property
    def measured(self) -> bool:
        """Whether a file says so."""
        return self.origin != "assumed"


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of each peak; round guesses, which nobody measured, where a file says nothing better.

    Attributes:
        products: matrix products outside of attention, of those in the dtype that computes.
        dense_forward: dense attention, likewise.
        dense_backward: its backward.
        fine_forward: the fine stage, likewise, padding counted as work.
        fine_backward: its backward.
        coarse: scores between tiles and the coarse output, of float32 products (on a GPU three TF32 products each).
        selection: comparisons, of float32 operations.
        elementwise: what lies between matrix products, of memory bandwidth.
        memory: of memory bandwidth.
        links: of NVLink and network.
    """

    products: Share = Share(value=0.6)
    dense_forward: Share = Share(value=0.6)
    dense_backward: Share = Share(value=0.5)
    fine_forward: Share = Share(value=0.5)
    fine_backward: Share = Share(value=0.35)
    coarse: Share = Share(value=0.3)
    selection: Share = Share(value=0.25)
    elementwise: Share = Share(value=0.8)
    memory: Share = Share(value=0.8)
    links: Share = Share(value=0.7)


NOTHING = Share(value=1.0, origin="not used")
"""Of a CPU's links: it has none."""
_GPU = {
    "products": ("ceiling", "torch", "matmul"),
    "memory": ("ceiling", "torch", "copy"),
    "elementwise": ("ceiling", "torch", "copy"),
    "dense_forward": ("fine_forward", "dense_cudnn", None),
    "dense_backward": ("fine_backward", "dense_cudnn", None),
    "fine_forward": ("fine_forward", "flexsparse", None),
    "fine_backward": ("fine_backward", "flexsparse", None),
}
"""(op, implementation, part) of the GPU suite's rows that say a share (`bench/README.md`)."""
_CPU = _GPU | {
    "elementwise": ("elementwise", "torch", "block"),
    "dense_forward": ("fine_forward", "dense_sdpa", None),
    "dense_backward": ("fine_backward", "dense_sdpa", None),
    "coarse": ("select", "flexsparse", "coarse"),
    "selection": ("select", "flexsparse", "choice"),
}
"""The same of `bench.machine`'s rows."""


def shares(machine: Machine, head_dim: int, dtype: str, results: Path | None = None) -> Shares:
    """What result files of this machine say, by the median of their rows; the rest is assumed.

    A GPU's are the suite's files, their bfloat16 rows, and of attention those of this head dim. A CPU's is one file of
    `bench.machine`, its rows of this dtype, and of attention those of the nearest head dim.

    Args:
        machine: whose files count.
        head_dim: of the model's attention.
        dtype: in which the model computes.
        results: folder of the files, or one of them; None for the checkout's folder.

    Raises:
        PlanError: a folder or file that is not there, or a file that is no result file.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    if machine.measured:
        file = cpu_file(results)
        for name, value in _of_cpu(file, machine, head_dim, dtype):
            found.setdefault(name, []).append((value, file.name))
    else:
        for file in files(results):
            if file.header.get("suite") != "gpu" or machine.label not in str(file.header.get("gpu")):
                continue
            for name, value in _of_gpu(file, machine, head_dim):
                found.setdefault(name, []).append((value, file.name))
    most = math.inf if machine.measured else 1.0
    measured = {
        name: Share(
            value=min(most, statistics.median(v for v, _ in rows)), origin=", ".join(sorted({f for _, f in rows}))
        )
        for name, rows in found.items()
    }
    return replace(Shares(links=NOTHING) if machine.measured else Shares(), **measured)


def assumed(found: Shares) -> list[str]:
    """Names of those that no file says."""
    return [field.name for field in dataclasses.fields(found) if not getattr(found, field.name).measured]


def _named(file: File, table: Mapping[str, tuple[str, str, str | None]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for row in file.rows:
        key = (row.get("op"), row.get("impl"), row.get("part"))
        if row.get("ms") and not str(row.get("case")).startswith("tune-"):
            yield from ((name, row) for name, wanted in table.items() if key == wanted)


def _of_gpu(file: File, machine: Machine, head_dim: int) -> Iterator[tuple[str, float]]:
    for name, row in _named(file, _GPU):
        if row.get("dtype") != "bfloat16":
            continue
        if name in ("memory", "elementwise"):
            yield name, _per_second(row, "bytes") / machine.hbm
        elif row.get("tflops") and (row["op"] == "ceiling" or row.get("D") == head_dim):
            yield name, row["tflops"] * 1e12 / machine.products["bfloat16"]


def _of_cpu(file: File, machine: Machine, head_dim: int, dtype: str) -> Iterator[tuple[str, float]]:
    rows = [(name, row) for name, row in _named(file, _CPU) if row.get("dtype") in (dtype, None)]
    dims = {row["D"] for _, row in rows if row.get("D")}
    nearest = min(dims, key=lambda dim: abs(math.log(dim / head_dim)), default=head_dim)
    for name, row in rows:
        if name in ("memory", "elementwise"):
            yield name, _per_second(row, "bytes") / machine.hbm
        elif name == "selection":
            yield name, _per_second(row, "flops") / machine.scalar
        elif name == "coarse":
            yield name, _per_second(row, "flops") / machine.products["float32"]
        elif row["op"] == "ceiling" or row.get("D") == nearest:
            yield name, _per_second(row, "flops") / machine.products[dtype]


def _per_second(row: Mapping[str, Any], what: str) -> float:
    found: float = row[what] / (statistics.median(row["ms"]) * 1e-3)
    return found
