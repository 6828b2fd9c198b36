"""What a GPU can do by its maker's papers, and which share of it is reached: measured where a file says so, else assumed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flexsparse.planning.counting import PlanError

RESULTS = Path(__file__).parents[2] / "bench" / "results"
"""Of a checkout; an installed package has none."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Published peaks of one GPU.

    Attributes:
        name: for people.
        label: part of the name under which a result file knows it.
        bf16: dense bfloat16 FLOP/s (half of the data sheet's, which counts structured sparsity).
        tf32: dense TF32 FLOP/s, likewise.
        fp32: FLOP/s outside of tensor cores.
        hbm: bytes/s of memory.
        memory: bytes of memory.
        nvlink: bytes/s in one direction to the other GPUs of a node (half of the data sheet's, which adds both).
        network: bytes/s in one direction from one node to another, for each GPU.
        node: GPUs of a node.
        sources: of the numbers.
    """

    name: str
    label: str
    bf16: float
    tf32: float
    fp32: float
    hbm: float
    memory: float
    nvlink: float
    network: float
    node: int
    sources: tuple[str, ...]


_NODE = "NVIDIA DGX H100/H200 system data sheets: 8 GPUs, one 400 Gb/s InfiniBand port each"
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "h100-sxm": Machine(
            name="H100 SXM",
            label="H100",
            bf16=1979e12 / 2,
            tf32=989e12 / 2,
            fp32=67e12,
            hbm=3.35e12,
            memory=80e9,
            nvlink=900e9 / 2,
            network=400e9 / 8,
            node=8,
            sources=("NVIDIA H100 Tensor Core GPU data sheet, SXM column", _NODE),
        ),
        "h200": Machine(
            name="H200 SXM",
            label="H200",
            bf16=1979e12 / 2,
            tf32=989e12 / 2,
            fp32=67e12,
            hbm=4.8e12,
            memory=141e9,
            nvlink=900e9 / 2,
            network=400e9 / 8,
            node=8,
            sources=("NVIDIA H200 Tensor Core GPU data sheet, SXM column", _NODE),
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a peak is reached.

    Attributes:
        value: in (0, 1].
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
        products: matrix products outside of attention, of bf16.
        dense_forward: dense attention, of bf16.
        dense_backward: its backward.
        fine_forward: the fine stage, of bf16, padding counted as work.
        fine_backward: its backward.
        coarse: scores between tiles and the coarse output, of TF32, each product as three (tf32x3).
        selection: comparisons, of fp32 operations.
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
    memory: Share = Share(value=0.8)
    links: Share = Share(value=0.7)


MEASURED = {
    "products": ("ceiling", "torch", "matmul"),
    "memory": ("ceiling", "torch", "copy"),
    "dense_forward": ("fine_forward", "dense_cudnn", None),
    "dense_backward": ("fine_backward", "dense_cudnn", None),
    "fine_forward": ("fine_forward", "flexsparse", None),
    "fine_backward": ("fine_backward", "flexsparse", None),
}
"""(op, implementation, part) of the GPU suite's rows that say a share (`bench/README.md`)."""


def shares(machine: Machine, head_dim: int, results: Path | None = None) -> Shares:
    """What the GPU suite's result files of this GPU say, by the median of their bfloat16 rows; the rest is assumed.

    Args:
        machine: whose files count.
        head_dim: attention's rows count where they have it.
        results: folder of the files; None for the checkout's.

    Raises:
        PlanError: a folder that is not there.
    """
    if results is not None and not results.is_dir():
        raise PlanError(f"results {str(results)!r} is no folder: give the one that holds the GPU suite's result files")
    folder = RESULTS if results is None else results
    found: dict[str, list[tuple[float, str]]] = {}
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else []:
        for name, value in _read(path, machine, head_dim):
            found.setdefault(name, []).append((value, path.relative_to(folder).as_posix()))
    measured = {
        name: Share(
            value=min(1.0, statistics.median(v for v, _ in rows)), origin=", ".join(sorted({f for _, f in rows}))
        )
        for name, rows in found.items()
    }
    return replace(Shares(), **measured)


def _read(path: Path, machine: Machine, head_dim: int) -> list[tuple[str, float]]:
    try:
        result = json.loads(path.read_text())
        header, rows = result["header"], result["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not isinstance(header, dict) or header.get("suite") != "gpu" or machine.label not in str(header.get("gpu")):
        return []
    return [item for row in rows for item in _shares_of(row, machine, head_dim)]


def _shares_of(row: Mapping[str, Any], machine: Machine, head_dim: int) -> list[tuple[str, float]]:
    if not row.get("ms") or row.get("dtype") != "bfloat16" or str(row.get("case")).startswith("tune-"):
        return []
    found = []
    for name, key in MEASURED.items():
        if (row.get("op"), row.get("impl"), row.get("part")) != key:
            continue
        if name == "memory":
            found.append((name, row["bytes"] / (statistics.median(row["ms"]) * 1e-3) / machine.hbm))
        elif row.get("tflops") and (row["op"] == "ceiling" or row.get("D") == head_dim):
            found.append((name, row["tflops"] * 1e12 / machine.bf16))
    return found
