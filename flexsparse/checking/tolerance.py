"""How far a result may be from a float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())


def complaint(actual: Tensor, reference: Tensor, oracle: Tensor) -> str | None:
    """Why a result is worse than it should be; None where it is not.

    Allowed is twice the error of a reference in the same precision that accumulates in float32, plus a rounding
    band, in RMS and in the maximum: a wrong block shows in one of them, whatever its size.
    """
    if actual.shape != oracle.shape or actual.dtype != reference.dtype:
        return f"is {actual.dtype} {tuple(actual.shape)}, not {reference.dtype} {tuple(oracle.shape)}"
    if not bool(actual.isfinite().all()):
        return "has values that are not finite"
    eps = torch.finfo(actual.dtype).eps
    own, allowed = (actual.double() - oracle), (reference.double() - oracle)
    bound = 2 * rms(allowed) + eps / 8 * rms(oracle)
    if not rms(own) <= bound:  # what is no number does not pass
        return f"has RMS error {rms(own):.2e}, more than {bound:.2e}"
    worst, bound = float(own.abs().max()), 2 * float(allowed.abs().max()) + eps / 2 * float(oracle.abs().max())
    return None if worst <= bound else f"has maximal error {worst:.2e}, more than {bound:.2e}"


def poison(shape: torch.Size, dtype: torch.dtype, device: torch.device, copies: int = 3) -> None:
    """Fill freed memory of a size with NaN: an allocator hands it out next, so that what is not written shows."""
    held = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(copies)]
    del held
