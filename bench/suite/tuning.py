"""Which configuration of the fine forward is fastest: every candidate on one problem, the winner for the rest of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.suite import data, fine
from bench.suite.cases import OURS, Case
from bench.suite.contender import Contender, Found
from bench.suite.device import Device

Key = tuple[str, int, int, int]
"""dtype, D, query rows, KV slots."""


def table() -> Any:
    """`flexsparse.compile_passes.templates.tuned`; None where Triton is not installed."""
    try:
        from flexsparse.compile_passes.templates import tuned
    except ImportError:
        return None
    return tuned


def key_of(case: Case) -> Key:
    """What the choice depends on, besides the GPU."""
    packed = case.builder.packed(case.layout) if case.method == "bsa" else case.layout.slots
    return (case.dtype, case.D, packed, case.kv_layout.slots)


def candidates(case: Case, device: Device) -> list[Any]:
    """The choices to try, the default first; none where there is no table."""
    tuned = table()
    if tuned is None:
        return []
    _, D, rows, slots = key_of(case)
    return list(tuned.candidates(device.arch, case.torch_dtype, D, rows, slots))


@contextlib.contextmanager
def forced(choice: Any) -> Iterator[None]:
    """Inside, the fine forward takes this choice; None changes nothing."""
    if choice is None:
        yield
        return
    with table().using(choice):
        yield


def under(choice: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs with a choice forced."""

    def call(*args: Any) -> Any:
        with forced(choice):
            return function(*args)

    return call


def contenders(case: Case, device: Device, choices: list[Any]) -> Found:
    """One for each choice, on the same problem."""
    problem, _ = fine.problem_of(case, device)
    inputs = data.copies([problem.q_BHPD, problem.k_BGPD, problem.v_BGPD], device.l2_bytes)
    truth = fine.expected(case, problem, None, False, (0,))
    pairs, whole = fine.selected_pairs(problem.selection), float(case.B * case.H) * problem.q_BHPD.shape[2] ** 2
    attend = fine.ours(problem, False)
    for choice in choices:
        yield Contender(
            impl=OURS,
            op="fine_forward",
            run=under(choice, lambda turn: attend(*inputs[turn % len(inputs)])),
            results=under(choice, lambda: {"out": attend(*inputs[0])}),
            expected=truth,
            strict=True,
            flops=4 * case.D * pairs,
            density=pairs / whole,
            config=choice.config(),
        )


def winner(rows: list[dict[str, Any]], choices: list[Any]) -> Any:
    """The fastest choice that passed its check; None where none did."""
    timed = {str(row["config"]): sorted(row["ms"])[len(row["ms"]) // 2] for row in rows if row["ms"]}
    passed = [choice for choice in choices if str(choice.config()) in timed]
    return min(passed, key=lambda choice: timed[str(choice.config())], default=None)


def restored(rows: list[dict[str, Any]], cases: list[Case], device: Device) -> dict[Key, Any]:
    """Winners of an earlier run's rows, where their configurations are still candidates."""
    found: dict[Key, Any] = {}
    for case in cases:
        own = [row for row in rows if row["case"] == case.name]
        if own and (best := winner(own, candidates(case, device))) is not None:
            found[key_of(case)] = best
    return found


def exact_matmuls() -> None:
    """Oracles in float32 mean it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
