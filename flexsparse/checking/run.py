"""Runs every problem on a device by every backend that can do it, and compares with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.attention import case_of, sparse_attention
from flexsparse.backends import choose, refusal
from flexsparse.checking import wrapped
from flexsparse.checking.problems import Problem, expected, gradients, on_cpu, problems
from flexsparse.checking.selections import wrong_selection
from flexsparse.checking.tolerance import complaint, poison, rms
from flexsparse.selection import TileSelection

BACKENDS = ("triton", "gather", "flex")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one check found.

    Attributes:
        problem: what was computed.
        backend: what computed the fine stage.
        dtype: of the inputs, as torch names it: ``"bfloat16"``.
        errors: RMS error over the oracle's RMS, by name: ``out``, ``dq``, ...
        wrong: what is wrong, None where nothing is.
        impossible: why the backend cannot do it, with the remedy; nothing was computed then.
        chosen: whether ``backend="auto"`` takes this backend.
    """

    problem: str
    backend: str
    dtype: str
    errors: dict[str, float] = field(default_factory=dict)
    wrong: str | None = None
    impossible: str | None = None
    chosen: bool = False

    @property
    def passed(self) -> bool:
        """Whether it was computed, and right."""
        return self.wrong is None and self.impossible is None


def check(
    device: str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    backends: Sequence[str] | None = None,
    compiled: bool = True,
    told: Callable[[Outcome], Any] = lambda outcome: None,
) -> list[Outcome]:
    """Compute small attention problems and a wrapped model's training step here, and compare them with float64.

    >>> from flexsparse.checking import check
    >>> outcomes = check("cpu", [torch.float32], ["gather"], compiled=False)
    >>> all(outcome.passed for outcome in outcomes)
    True

    Args:
        device: ``"cpu"`` or ``"cuda"`` (``"cuda:1"``); None for CUDA where there is one.
        dtypes: of bfloat16, float16 and float32; None for all, on a CPU without float16.
        backends: of ``triton``, ``gather`` and ``flex``; None for the one that ``backend="auto"`` takes, and ``gather``. The
            reference backend is what they are compared with. Where one has no backward here, outputs are compared alone.
        compiled: whether a wrapped model is compiled and checked as well.
        told: called with every outcome as it is found.

    Returns:
        An outcome for each problem, dtype and backend. An exception of a backend is an outcome.

    Raises:
        ValueError: an unknown dtype or backend, or a device that is not there.
    """
    device = usable(device)
    if dtypes is None:
        dtypes = [dtype for dtype in DTYPES if device != "cpu" or dtype != torch.float16]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes has {dtype}: give of {', '.join(map(str, DTYPES))}")
    for backend in backends or ():
        if backend not in BACKENDS:
            raise ValueError(f"backends has {backend!r}: give of {', '.join(BACKENDS)}")
    outcomes: list[Outcome] = []

    def found(outcome: Outcome) -> None:
        outcomes.append(outcome)
        told(outcome)

    for dtype in dtypes:
        for problem in problems():
            _attention(problem, dtype, device, backends, found)
        for compile in (True, False) if compiled else (False,):
            found(_model(dtype, device, compile))
    return outcomes


def usable(device: str | None) -> str:
    """The device to check.

    Raises:
        ValueError: neither a CPU nor a CUDA device that is there.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda") or not (number or "0").isdigit():
        raise ValueError(f"device is {device!r}: give 'cpu', 'cuda' or 'cuda:1'")
    if int(number or 0) >= count:
        raise ValueError(
            f"device is {device!r}, and torch finds {count} CUDA devices: give 'cpu', or see `flexsparse info`"
        )
    return device


def _attention(
    problem: Problem,
    dtype: torch.dtype,
    device: str,
    backends: Sequence[str] | None,
    found: Callable[[Outcome], None],
) -> None:
    inputs = problem.inputs(dtype, device)
    here = {name: x.cpu() for name, x in inputs.items()}
    case = case_of(inputs["q"], problem.layout, gradients=True, lse=False, compiled=False)
    chosen, _ = choose("auto", case)
    known: dict[bytes, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for backend in backends or dict.fromkeys((chosen, "gather")):
        about: dict[str, Any] = {"problem": problem.name, "backend": backend, "dtype": _name(dtype)}
        about["chosen"] = backend == chosen
        train = refusal(backend, case) is None
        impossible = refusal(backend, replace(case, gradients=train))
        if impossible is not None:
            found(Outcome(**about, impossible=impossible))
            continue
        try:
            results, selection = _compute(problem, inputs, backend, train)
        except Exception as error:  # whatever a compiler or a driver throws is what this command is for
            found(Outcome(**about, wrong=_one_line(error)))
            continue
        key = selection.bits.numpy().tobytes()
        if key not in known:  # backends share the selection, unless one of them is wrong
            exact = expected(problem, here, selection, torch.float64)
            known[key] = exact, expected(problem, here, selection, dtype)
        exact, reference = known[key]
        wrong = wrong_selection(problem, here, selection)
        wrong = None if wrong is None else f"the selection {wrong}"
        for name, x in results.items():
            said = complaint(x, reference[name], exact[name])
            wrong = wrong or (f"{name} {said}" if said else None)
        errors = {name: rms(x.double() - exact[name]) / rms(exact[name]) for name, x in results.items()}
        found(Outcome(**about, errors=errors, wrong=wrong))


def _compute(
    problem: Problem, inputs: dict[str, Tensor], backend: str, train: bool
) -> tuple[dict[str, Tensor], TileSelection]:
    leaves = {name: x.detach().requires_grad_(train and name != "g") for name, x in inputs.items()}
    for x in leaves.values():
        poison(x.shape, x.dtype, x.device)
    q, k, v = (leaves[name] for name in "qkv")
    counts = problem.tile_counts(str(q.device))
    how: dict[str, Any] = {"gate": leaves.get("gate"), "backend": backend, "tile_counts": counts}
    if not train:  # FlexAttention on a CPU, which returns no log-sum-exp for `return_aux` either
        selection = problem.builder.select(q, k, problem.layout, tile_counts=counts)
        return {"out": sparse_attention(q, k, v, problem.layout, problem.builder, **how).cpu()}, on_cpu(selection)
    out, aux = sparse_attention(q, k, v, problem.layout, problem.builder, return_aux=True, **how)
    return {name: x.cpu() for name, x in gradients(out, leaves).items()}, on_cpu(aux.selection)


def _model(dtype: torch.dtype, device: str, compile: bool) -> Outcome:
    name = f"wrapped model, {'compiled' if compile else 'uncompiled'}, training"
    try:
        errors, wrong, backend = wrapped.compare(device, dtype, compile)
    except Exception as error:
        return Outcome(problem=name, backend="auto", dtype=_name(dtype), wrong=_one_line(error), chosen=True)
    return Outcome(problem=name, backend=backend, dtype=_name(dtype), errors=errors, wrong=wrong, chosen=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
