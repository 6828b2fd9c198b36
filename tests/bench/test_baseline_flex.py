"""FlexAttention as a baseline: which option is taken."""

from typing import Any

import pytest
import torch
from baseline_problem import PARTIAL, WHOLE, assert_same, problem, uneven
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench.baselines import (
    Problem,
    Unavailable,
    attention_gym,
    flex,
)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [WHOLE, PARTIAL])
def test_flex_and_attention_gym_compiled_for_the_cpu(
    fakes: None, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int, int]
) -> None:
    p = problem(grid=grid, B=1, dtype=torch.float32, scale=0.3)
    for prepare in (flex.flex_64, attention_gym.prepare):
        with pytest.raises(Unavailable, match="no option that works here"):
            prepare(p, True)  # there is no backward for the CPU
        monkeypatch.setattr(flex, "options", lambda slots, training: [flex.Option(name="plain")])
        attend = prepare(p, False)
        assert attend.note.startswith("plain; tried: plain ")
        assert_same(p, attend, False)


def test_attention_gym_refuses_rows_of_different_lengths(fakes: None) -> None:
    with pytest.raises(Unavailable, match="as many tiles for every row"):
        attention_gym.prepare(problem(keep=uneven(problem().layout)), False)


def test_the_fastest_option_that_works_is_taken_and_kept(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    took = {"first": None, "second": 0.02, "third": 0.001}
    clock = [0.0]  # of the test: what the machine does meanwhile takes no time on it
    monkeypatch.setattr(flex.time, "perf_counter", lambda: clock[0])

    def compiled(p: Problem, mask: BlockMask, option: flex.Option) -> Any:
        tried.append(option.name)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seconds = took[option.name]
            if seconds is None:
                raise RuntimeError("no kernel")
            clock[0] += seconds
            return q + k + v

        return attend

    monkeypatch.setattr(flex, "compiled", compiled)
    monkeypatch.setattr(flex, "options", lambda slots, training: [flex.Option(name=name) for name in took])
    note = flex.flex_64(problem(), True).note
    assert note.startswith("third; tried: second 20.000 ms, third 1.000 ms") and "RuntimeError: no kernel" in note
    took["second"] = 0.0001
    assert flex.flex_64(problem(B=1), True).note.startswith("third; the fastest on the first")
    assert tried == ["first", "second", "third", "third"]
    assert flex.flex_64(problem(D=32), True).note.startswith("second; tried")
    with pytest.raises(Unavailable, match="flex_128 takes slots 128"):
        flex.flex_128(problem(), False)


def test_options_divide_their_tiles() -> None:
    for slots in (64, 128):
        for training in (False, True):
            names: set[str] = set()
            for option in flex.options(slots, training):
                assert option.name not in names
                names.add(option.name)
                blocks = [size for key, size in option.kernel.items() if "BLOCK" in key]
                assert all(slots % size == 0 for size in blocks)
                # on Hopper stock refuses the backward's default of 128 keys before it looks at kernel options
                assert option.max_autotune or slots == 128 or not training
                assert slots == 128 or len(blocks) >= 2
