"""Which configuration of each op of the fine stage is fastest: all candidates on one problem, winners for the rest of a run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.suite import data, fine
from bench.suite.cases import OURS, Case, Tile
from bench.suite.contender import Contender, Found, Missing, Results, training_results
from bench.suite.device import Device

DEFAULT = "default"
"""What ``kernels`` in a row's ``config`` says where nothing was forced though `tune` has a winner for the tiles."""
Key = tuple[str, int, int, int]
"""dtype, D, query rows, KV slots."""


@dataclass(frozen=True, kw_only=True)
class Winners:
    """The fastest choice of each op.

    Attributes:
        choices: of different ops, the forward's first.
    """

    choices: tuple[Any, ...]

    def config(self) -> dict[str, Any]:
        """For a row: the first choice's own configuration, and the others' by their op."""
        first, *others = self.choices
        return {**first.config(), **{choice.op: choice.config() for choice in others}}


def table() -> Any:
    """`flexsparse.compile_passes.templates.tuned`; None where Triton is not installed."""
    try:
        from flexsparse.compile_passes.templates import tuned
    except ImportError:
        return None
    return tuned


def key_of(case: Case, tile: Tile | None = None) -> Key:
    """What the choice depends on, besides the GPU; of another tile than the case's."""
    layout = case.layout if tile is None else case.layout_of(tile)
    kv_layout = layout if case.kv_tile is None else case.kv_layout
    packed = case.builder.packed(layout) if case.method == "bsa" else layout.slots
    return (case.dtype, case.D, packed, kv_layout.slots)


def applies(case: Case, row: dict[str, Any]) -> bool:
    """Whether the case's winner was forced for a row of ours: not for the defaults, nor on tiles that it was not tuned for."""
    if (row["config"] or {}).get("kernels") == DEFAULT:
        return False
    alike = [tile for tile in (case.tile, *case.others) if key_of(case, tile) == key_of(case)]
    return tuple(row["tile"]) in [case.layout_of(tile).sides for tile in alike]


def candidates(case: Case, device: Device) -> list[Any]:
    """The choices to try, op by op, the default first; none where there is no table."""
    tuned = table()
    if tuned is None:
        return []
    _, D, rows, slots = key_of(case)
    key = (device.arch, case.torch_dtype, D, rows, slots)
    return list(itertools.chain.from_iterable(tuned.candidates(*key, op) for op in tuned.OPS))


def defaults(choices: list[Any]) -> list[Any]:
    """The first of each op: what runs where nothing is tuned."""
    found: dict[str, Any] = {}
    for choice in choices:
        found.setdefault(choice.op, choice)
    return list(found.values())


def name_of(choice: Any) -> str:
    """What the name of its contender holds of a choice."""
    return str(sorted(choice.config().items()))


@contextlib.contextmanager
def forced(winners: Winners | None, key: Key | None = None) -> Iterator[None]:
    """Inside, the fine stage takes these choices, on the tiles of a key or on all; None changes nothing."""
    only = () if key is None else ((getattr(torch, key[0]), *key[1:]),)
    with contextlib.ExitStack() as stack:
        for choice in () if winners is None else winners.choices:
            stack.enter_context(table().using(choice, *only))
        yield


def unforced() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is forced."""
    return contextlib.nullcontext() if (tuned := table()) is None else tuned.unforced()


def by_default(found: Contender | Missing) -> Contender | Missing:
    """The same where nothing is forced."""

    def free(function: Callable[..., Any] | None) -> Any:
        def call(*args: Any) -> Any:
            with unforced():
                return function(*args)  # type: ignore[misc]

        return None if function is None else call

    config = {**(found.config or {}), "kernels": DEFAULT}
    if isinstance(found, Missing):
        return replace(found, config=config)
    return replace(found, run=free(found.run), results=free(found.results), config=config)


def under(choice: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs with a choice forced."""

    def call(*args: Any) -> Any:
        with forced(Winners(choices=(choice,))):
            return function(*args)

    return call


def contenders(case: Case, device: Device, choices: list[Any]) -> Found:
    """One for each choice, on the same problem; a choice of dq or of dkdv is timed in a whole backward."""
    problem, grad = fine.problem_of(case, device)
    tensors = [problem.q_BHPD, problem.k_BGPD, problem.v_BGPD]
    inputs = data.copies(tensors, device.l2_bytes)
    pairs, whole = fine.selected_pairs(problem.selection), float(case.B * case.H) * problem.q_BHPD.shape[2] ** 2
    attend, training = fine.ours(problem, False), fine.ours(problem, True)
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    held: list[torch.Tensor] = []

    def forward(turn: int) -> Any:
        return attend(*inputs[turn % len(inputs)])

    def backward(turn: int) -> Any:
        if not held:
            held.append(training(*leaves))
        return torch.autograd.grad(held[0], leaves, grad, retain_graph=True)

    def output() -> Results:
        return {"out": attend(*inputs[0])}

    def gradients() -> Results:
        return training_results(training(*leaves), leaves, fine.GRADIENTS, grad)

    parts = {
        "fine_forward": (forward, output, fine.expected(case, problem, None, False, (0,)), 4),
        "fine_backward": (backward, gradients, fine.expected(case, problem, grad, False, (0,)), 10),
    }
    for choice in choices:
        op = op_of(choice)
        run, results, expected, operations = parts[op]
        yield Contender(
            impl=OURS,
            op=op,
            run=under(choice, run),
            results=under(choice, results),
            expected=expected,
            strict=True,
            flops=operations * case.D * pairs,
            density=pairs / whole,
            config=choice.config(),
        )


def op_of(choice: Any) -> str:
    """What a choice is timed in, as rows name it."""
    return "fine_forward" if choice.op == "forward" else "fine_backward"


def winner(rows: list[dict[str, Any]], choices: list[Any]) -> Winners | None:
    """The fastest choice of each op that passed its check; None where none did."""
    timed = {str(row["config"]): sorted(row["ms"])[len(row["ms"]) // 2] for row in rows if row["ms"]}
    best: dict[str, Any] = {}
    for choice in choices:
        ms = timed.get(str(choice.config()))
        if ms is not None and (choice.op not in best or ms < timed[str(best[choice.op].config())]):
            best[choice.op] = choice
    return Winners(choices=tuple(best.values())) if best else None


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
