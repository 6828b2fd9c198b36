"""A tiny run of the GPU suite on the CPU: cases, baselines that are none, a device whose rounds are recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_suite
from bench.baselines.protocol import Attend, Problem, Unavailable
from bench.suite.cases import Case
from bench.suite.device import Host


def case(name: str, kind: Any, **fields: Any) -> Case:
    """A case of 256 tokens."""
    tiny: dict[str, Any] = {"grid": (4, 8, 8), "H": 2, "D": 16, "dtype": "float32", "density": 0.4, "seconds": 0.0}
    tiny["baselines"] = ("dense_cudnn", "fastvideo_tk")
    return Case(name=name, kind=kind, **{**tiny, **fields})


def dense(problem: Problem, training: bool) -> Attend:
    """Stands in for cuDNN."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=problem.scale)

    return Attend(function=attend, note="stand-in")


def missing(problem: Problem, training: bool) -> Attend:
    raise Unavailable("its package is not installed: get it somewhere")


BASELINES: dict[str, Any] = {"dense_cudnn": dense, "fastvideo_tk": missing}


class Recorder(Host):
    """A host that keeps what each round ran, by number of functions."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rounds: list[int] = []

    def round(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        self.rounds.append(len(functions))
        return super().round(functions)


def run(out: Path, *cases: Case, arguments: Sequence[str] = ("--only", "bench"), **options: Any) -> tuple[int, Any]:
    """Exit code, and the file of the stage `bench` where there is one."""
    options = {"device": Recorder(), "baselines": BASELINES, "tuned": [], **options}
    code = gpu_suite.main(["--out", str(out), *arguments], cases=list(cases), **options)
    path = out / "bench.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def of(result: Any, op: str, impl: str = "flexsparse", part: str | None = None) -> dict[str, Any]:
    """The only row of an op, implementation and part."""
    (found,) = [row for row in result["rows"] if (row["op"], row["impl"], row["part"]) == (op, impl, part)]
    return found
