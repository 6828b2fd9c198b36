"""How the fine stage is computed, one backend a file. Backends never import each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexsparse.backends import flex, gather, reference, triton

NAMES = ("auto", "reference", "gather", "flex", "triton")
RUN = {"reference": reference.attend, "gather": gather.attend, "flex": flex.attend, "triton": triton.attend}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a backend is asked for.

    Attributes:
        device: device type, ``"cpu"`` or ``"cuda"``.
        dtype: of q, k and v.
        gradients: whether any input needs a gradient.
        lse: whether the log-sum-exp is wanted.
        compiled: whether the call is part of a graph being compiled.
        dynamic: whether a size is symbolic.
        rows: query tokens of one tile as computed, at most (slots of the layout).
        head_dim: D.
        capability: CUDA compute capability, None elsewhere.
    """

    device: str
    dtype: torch.dtype
    gradients: bool
    lse: bool
    compiled: bool
    dynamic: bool
    rows: int
    head_dim: int
    capability: tuple[int, int] | None = None


def refusal(name: str, case: Case) -> str | None:
    """Why a backend cannot do the case, with the remedy; None where it can."""
    if name == "triton":
        return triton.refusal(case.device, case.dtype, case.head_dim, case.rows)
    if name == "flex":
        half = case.dtype in (torch.bfloat16, torch.float16)  # seen to fail; float32 was not tried
        # in a graph the templates may take its place
        lacking = _no_stock_backward(case) if half and not case.compiled else None
        return lacking or flex.refusal(case.device, case.dtype, case.gradients, case.lse, case.dynamic)
    return None


def _no_stock_backward(case: Case) -> str | None:
    """pytorch issue 176025: no block size of FlexAttention's backward fits such tiles."""
    if case.device == "cuda" and case.gradients and case.rows < 128 and case.capability == (9, 0):
        return "stock FlexAttention has no backward for tiles below 128 slots on sm90; use 'auto', 'triton' or 'gather'"
    return None


def choose(backend: str, case: Case, templates: bool = True, argument: str = "backend") -> tuple[str, str]:
    """The backend that runs a case, and why.

    Args:
        backend: ``"auto"`` or a name.
        case: what is asked for.
        templates: whether ``"auto"`` may take the Triton templates.
        argument: what the caller calls ``backend``.

    Raises:
        ValueError: no such backend, or an explicit one that cannot do the case.
    """
    if backend not in NAMES:
        raise ValueError(f"{argument} is {backend!r}: give one of {', '.join(NAMES)}")
    if backend != "auto":
        reason = refusal(backend, case)
        if reason is not None:
            raise ValueError(f"{argument} is {backend!r}, which cannot do this case: {reason}")
        return backend, "asked for"
    if case.device == "cuda" and templates and refusal("triton", case) is None:
        return "triton", "on CUDA"
    flexible = refusal("flex", case)
    if flexible is not None:
        return "gather", flexible.partition(";")[0]
    if case.device == "cpu" and not case.compiled:
        return "gather", "uncompiled on CPU"
    lacking = _no_stock_backward(case)
    if lacking is not None:
        return "gather", lacking.partition(";")[0]
    return "flex", "compiled, without gradients" if case.device == "cpu" else "on CUDA"
