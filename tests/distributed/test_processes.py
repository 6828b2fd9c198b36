"""The harness itself: what a rank raises is shown, and nothing waits forever."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.processes import Processes, RankError


def _sum(x: int) -> float:
    total = torch.tensor(float(x + dist.get_rank()))
    dist.all_reduce(total)
    return float(total)


def _fails(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("this rank does not like it")
    dist.barrier()


def _dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _sleeps() -> None:
    time.sleep(60)


def test_each_rank_answers(two: Processes) -> None:
    assert two.run(_sum, 3) == [7.0, 7.0]


@pytest.mark.parametrize(
    "function, args, said",
    [(_fails, (1,), "does not like it"), pytest.param(_dies, (), "exit code 7", marks=pytest.mark.slow)],
)
def test_errors_are_shown(two: Processes, function: Any, args: tuple[int, ...], said: str) -> None:
    with pytest.raises(RankError, match=said) as error:
        two.run(function, *args)
    assert "--- rank 1" in str(error.value)
    assert two.run(_sum, 0) == [1.0, 1.0]  # started again


@pytest.mark.slow
def test_a_limit_holds(two: Processes) -> None:
    with pytest.raises(RankError, match="no answer in time"):
        two.run(_sleeps, limit=0.5)
