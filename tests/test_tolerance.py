"""The tolerance rule accepts what is right and rejects the bugs that popular rules miss."""

import math
from typing import Any

import oracle
import pytest
import torch
from tolerance import complaint
from torch import Tensor

from flexsparse.checking.tolerance import complaint as own_complaint

SCALES = (1.0, 4.0, 8.0, 16.0)
B, H, S, D, BLOCK = 1, 2, 512, 32, 64


def blocks(seed: int, shift: int = 0, drop: bool = False) -> Tensor:
    """A token mask of four kept blocks a row, shifted by some blocks or with one block of one head missing."""
    n = S // BLOCK
    order = torch.rand(B, H, n, n, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    keep = torch.zeros(B, H, n, n, dtype=torch.bool).scatter(-1, order[..., :4], True).roll(shift, -1)
    if drop:
        keep[0, 0, 3, order[0, 0, 3, 0]] = False
    return keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)


def run(dtype: torch.dtype, scale: float, bug: str = "") -> list[Tensor]:
    """Output, dq, dk and dv of bfloat16-valued inputs, computed in a dtype, with a bug."""
    generator = torch.Generator().manual_seed(7)
    q, k, v, g = (torch.randn(B, H, S, D, generator=generator).bfloat16() for _ in range(4))
    q, k, v = ((x * scale).to(dtype).requires_grad_() for x in (q, k, v))
    softmax_scale = D**-0.5
    mask = blocks(1, shift=int(bug == "shifted index"), drop=bug == "dropped block")
    if bug == "pre-scaled":
        out, _ = oracle.attention(q, k * softmax_scale, v, mask, 1.0)
    else:
        out, _ = oracle.attention(q, k, v, mask, softmax_scale)
    return [out, *torch.autograd.grad(out, (q, k, v), g.to(dtype))]


def rejected(scale: float, bug: str) -> bool:
    pairs = zip(run(torch.bfloat16, scale, bug), run(torch.bfloat16, scale), run(torch.float64, scale))
    return any(complaint(*triple) is not None for triple in pairs)


@pytest.mark.parametrize("scale", SCALES)
def test_the_honest_result_is_accepted_though_summed_in_another_order(scale: float) -> None:
    order = torch.arange(S - 1, -1, -1)
    generator = torch.Generator().manual_seed(7)
    q, k, v = ((torch.randn(B, H, S, D, generator=generator) * scale).bfloat16() for _ in range(3))
    mask = blocks(1)
    backwards, _ = oracle.attention(q, k[:, :, order], v[:, :, order], mask[..., order], D**-0.5)
    reference, _ = oracle.attention(q, k, v, mask, D**-0.5)
    gold, _ = oracle.attention(q.double(), k.double(), v.double(), mask, D**-0.5)
    assert complaint(backwards, reference, gold) is None


@pytest.mark.parametrize("scale", (4.0, 8.0, 16.0))
def test_keys_scaled_in_low_precision_are_rejected(scale: float) -> None:
    assert rejected(scale, "pre-scaled")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bug", ("dropped block", "shifted index"))
def test_wrong_blocks_are_rejected(scale: float, bug: str) -> None:
    assert rejected(scale, bug)


def test_what_is_not_finite_is_rejected_even_where_the_oracle_agrees() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert "not finite" in str(complaint(x, x, x.double()))


@pytest.mark.parametrize("where", ["oracle", "reference"])
@pytest.mark.parametrize("rule", [complaint, own_complaint])
def test_an_oracle_that_is_no_number_accepts_nothing(rule: Any, where: str) -> None:
    actual = torch.ones(2, 3)
    given = {"reference": actual.clone(), "oracle": actual.double()}
    assert rule(actual, **given) is None
    given[where][0, 0] = math.nan
    assert rule(actual, **given) is not None and rule(2 * actual, **given) is not None


def test_another_dtype_or_shape_is_rejected() -> None:
    x = torch.ones(4)
    assert complaint(x.bfloat16(), x, x.double()) is not None
    assert complaint(x[:2], x[:2], x.double()) is not None


def test_an_error_in_a_single_place_is_rejected_though_its_rms_is_small() -> None:
    gold = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = gold.float()
    wrong = reference.clone()
    wrong[17] += 1e-5
    assert complaint(reference, reference, gold) is None
    assert "maximal" in str(complaint(wrong, reference, gold))
