"""The numerical rule of every comparison against a float64 oracle.

A result passes where its error is at most twice that of a reference in the same precision that accumulates in
float32, plus a rounding band, in both of two norms: RMS relative to the oracle's RMS, which sees an error that is
everywhere and small, and maximum, which sees one that is in one place. Either alone misses known bugs
(`test_tolerance` keeps them).
"""

import math

import torch
from torch import Tensor


def rms(x: Tensor) -> float:
    """Root mean square, float64; 0 for an empty tensor."""
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def complaint(actual: Tensor, reference: Tensor, oracle: Tensor, noise: float = 0.0) -> str | None:
    """Why ``actual`` is not as good as it should be; None where it is.

    Args:
        actual: what is tested.
        reference: the same in the same dtype, from an implementation that accumulates in float32.
        oracle: float64.
        noise: absolute RMS error that rounding in the accumulation makes where the result cancels to nothing.
    """
    if actual.shape != oracle.shape or actual.dtype != reference.dtype:
        return f"is {actual.dtype} {tuple(actual.shape)}, not {reference.dtype} {tuple(oracle.shape)}"
    if not bool(actual.isfinite().all()):
        return f"has {int((~actual.isfinite()).sum())} values that are not finite"
    eps = torch.finfo(actual.dtype).eps
    error, allowed = rms(actual.double() - oracle), rms(reference.double() - oracle)
    bound = 2 * allowed + eps / 8 * rms(oracle) + noise
    if not error <= bound:  # what is no number does not pass: an oracle of NaN would let everything through
        return f"has RMS error {error:.3e}, more than {bound:.3e} (reference {allowed:.3e}, RMS {rms(oracle):.3e})"
    if not actual.numel():
        return None
    worst = float((actual.detach().double() - oracle).abs().max())
    allowed = float((reference.detach().double() - oracle).abs().max())
    bound = 2 * allowed + eps / 2 * float(oracle.abs().max()) + 8 * noise
    if not worst <= bound:
        return f"has maximal error {worst:.3e}, more than {bound:.3e} (reference {allowed:.3e})"
    return None


def assert_as_good(actual: Tensor, reference: Tensor, oracle: Tensor, what: str, noise: float = 0.0) -> None:
    """Fail where `complaint` has one."""
    found = complaint(actual, reference, oracle, noise)
    assert found is None, f"{what} {found}"


def assert_lse(actual: Tensor, oracle: Tensor, magnitude: float) -> None:
    """Log-sum-exps: -inf in the same places, elsewhere within a few roundings of the largest logit.

    Args:
        actual: float32 or more.
        oracle: float64.
        magnitude: the largest absolute logit.
    """
    oracle = oracle.detach()
    empty = oracle == -math.inf
    assert torch.equal(actual == -math.inf, empty), "lse is -inf in other places than the oracle's"
    error = (actual.detach().double() - oracle)[~empty].abs()
    assert bool(error.isfinite().all()), "lse is not finite where tokens are seen"
    bound = 16 * torch.finfo(actual.dtype).eps * (1 + magnitude)
    assert not len(error) or float(error.max()) <= bound, f"lse is off by {float(error.max()):.3e}, over {bound:.3e}"
