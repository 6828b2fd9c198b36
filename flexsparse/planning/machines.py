"""What a machine can do: a GPU by its maker's papers, a CPU by a file in which its peaks were measured."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flexsparse.planning.counting import PlanError

RESULTS = Path(__file__).parents[2] / "bench" / "results"
"""Of a checkout; an installed package has none."""
CPU = "cpu"
MEASURE = "python -m bench.machine --out FILE"
TF32X3 = 3
"""TF32 products of one float32 product."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Peaks of one GPU, published; or of threads of one CPU, measured.

    Attributes:
        name: for people.
        label: part of the name under which a result file knows it.
        unit: ``GPU`` or ``CPU``.
        products: FLOP/s of matrix products by dtype; dense, so half of a data sheet's, which counts structured sparsity.
        scalar: FLOP/s in float32 outside of matrix products.
        hbm: bytes/s of memory.
        memory: bytes of memory.
        nvlink: bytes/s in one direction to the other GPUs of a node (half of the data sheet's, which adds both).
        network: bytes/s in one direction from one node to another, for each GPU.
        node: GPUs of a node.
        sources: of the numbers.
    """

    name: str
    label: str
    unit: str = "GPU"
    products: Mapping[str, float]
    scalar: float
    hbm: float
    memory: float
    nvlink: float
    network: float
    node: int
    sources: tuple[str, ...]

    @property
    def measured(self) -> bool:
        """Whether the peaks were measured, and are no publication's."""
        return self.unit == "CPU"


def _half_and_full(bf16: float, tf32: float) -> Mapping[str, float]:
    return MappingProxyType({"bfloat16": bf16, "float16": bf16, "float32": tf32 / TF32X3})


_NODE = "NVIDIA DGX H100/H200 system data sheets: 8 GPUs, one 400 Gb/s InfiniBand port each"
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "h100-sxm": Machine(
            name="H100 SXM",
            label="H100",
            products=_half_and_full(1979e12 / 2, 989e12 / 2),
            scalar=67e12,
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
            products=_half_and_full(1979e12 / 2, 989e12 / 2),
            scalar=67e12,
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
class File:
    """A result file.

    Attributes:
        name: relative to the folder that was searched.
        header: where it was measured.
        rows: what.
    """

    name: str
    header: Mapping[str, Any]
    rows: list[dict[str, Any]]


def check_results(results: Path) -> None:
    """Complains, before anything is counted, about what `files` will not read.

    Raises:
        PlanError: it is not there, or a file and no result file.
    """
    if os.path.isfile(results):  # as pathlib, but no for a name too long
        _read(results, results.name)
    elif not os.path.isdir(results):
        raise PlanError(f"results {str(results)!r} is no folder and no file: give the one that holds result files")


def files(results: Path | None) -> Iterator[File]:
    """The result files of a folder and its folders, or one file; None for the checkout's folder.

    A folder's other files are left out.

    Raises:
        PlanError: it is not there, or a file and no result file.
    """
    if results is not None:
        check_results(results)
    place = RESULTS if results is None else results
    if place.is_file():
        yield _read(place, place.name)
        return
    for path in sorted(place.rglob("*.json")) if place.is_dir() else ():
        with contextlib.suppress(PlanError):
            yield _read(path, path.relative_to(place).as_posix())


def _read(path: Path, name: str) -> File:
    try:
        result = json.loads(path.read_text())
        header, rows = result["header"], result["rows"]
        if not isinstance(header, dict) or not isinstance(rows, list):
            raise TypeError("header or rows of another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"results {str(path)!r} is no result file ({type(error).__name__}: {error}): give one of the GPU suite or of "
            "bench.machine, or a folder of them"
        ) from error
    return File(name=name, header=header, rows=rows)


def cpu_file(results: Path | None) -> File:
    """The file of `bench.machine`.

    Raises:
        PlanError: there is none, or more than one.
    """
    found = [file for file in files(results) if file.header.get("suite") == "machine"]
    place = RESULTS if results is None else results
    if not found:
        raise PlanError(
            f"gpu is 'cpu', but {str(place)!r} holds no measured CPU: run {MEASURE}, then give --results FILE"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise PlanError(f"gpu is 'cpu', and {str(place)!r} holds several measured CPUs: give --results one of {names}")
    return found[0]


def rates(file: File, op: str, part: str | None = None, *, per: str = "flops") -> list[float]:
    """FLOPs (or what else a row counts) a second, of each row of an op, by the median of its samples."""
    rows = (row for row in file.rows if row.get("op") == op and row.get("part") == part and row.get("ms"))
    return [row[per] / (statistics.median(row["ms"]) * 1e-3) for row in rows]


def machine_of(name: str, results: Path | None = None) -> Machine:
    """A GPU of `MACHINES`, or ``cpu``: the one that a result file was measured on.

    Raises:
        PlanError: neither; no file, or several, or one that lacks a peak.
    """
    if name in MACHINES:
        return MACHINES[name]
    if name != CPU:
        raise PlanError(f"gpu is {name!r}: give one of {', '.join((*MACHINES, CPU))}")
    file = cpu_file(results)
    products: dict[str, list[float]] = {}
    for row in file.rows:
        if (row.get("op"), row.get("part")) == ("ceiling", "matmul") and row.get("ms"):
            products.setdefault(row["dtype"], []).append(row["flops"] / (statistics.median(row["ms"]) * 1e-3))
    copies = rates(file, "ceiling", "copy", per="bytes")
    if "float32" not in products or not copies:
        raise PlanError(f"{file.name} has no rate of float32 products or of copies: measure again, {MEASURE}")
    header = file.header
    threads = int(header["threads"])
    peaks = {dtype: statistics.median(found) for dtype, found in products.items()}
    return Machine(
        name=f"{header['cpu']} ({threads} thread{'s' * (threads > 1)})",
        label=str(header["cpu"]),
        unit="CPU",
        products=MappingProxyType(peaks),
        scalar=peaks["float32"],
        hbm=statistics.median(copies),
        memory=float(header["memory_bytes"]),
        nvlink=0.0,
        network=0.0,
        node=1,
        sources=(f"measured: {file.name}, {header['date']}",),
    )
