"""What a plan says of two ranks' bytes is what two processes receive in a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("diffusers")

import flexsparse as fs
from bench.plan_check import ranks
from bench.plan_check.cases import Case, model_of
from distributed.processes import Processes

SMALL = {"grid": (2, 7, 8), "training": True, "builder": fs.VSA(top_k=2)}
CASES = [
    ("ulysses", Case(gates=True, checkpointing=True, **SMALL)),
    ("fsdp", Case(gates=True, **SMALL)),
    ("ddp", Case(**SMALL)),
    pytest.param("ulysses", Case(model="hunyuanvideo", **SMALL), marks=pytest.mark.slow),
    pytest.param("fsdp", Case(**{**SMALL, "training": False}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, case", CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_planned_bytes_are_those_that_travel(two: Processes, tmp_path: Path, kind: str, case: Case) -> None:
    found = two.run(ranks.counted, kind, case)
    planned = ranks.planned_bytes(kind, case, tmp_path)
    for collective, part in ranks.COLLECTIVES[kind].items():
        if part is None:
            continue
        real = max(each.get(collective, 0) for each in found)
        passes = 2 if collective == "all_gather" and case.training else 1
        assert real == planned[part] + (_padding(case, tmp_path, passes) if kind == "fsdp" and real else 0), collective
        assert real > 0 or not case.training


def _padding(case: Case, folder: Path, passes: int) -> int:
    """Bytes that FSDP2 adds to parameters whose first size two ranks do not share evenly; of the model's own, once."""

    def odd(x: Tensor) -> int:
        return x[0].nbytes // 2 if len(x) % 2 else 0

    model = model_of(case, folder)
    blocks = [odd(x) for x in model.blocks.parameters()]
    return passes * sum(blocks) + sum(map(odd, model.parameters())) - sum(blocks)
