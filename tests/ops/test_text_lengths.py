"""`flexsparse::text_lengths`: a key mask as lengths, what is refused, and masks of all pairs that are key masks in disguise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexsparse.ops.text_lengths import HIDES, found_in, key_mask_of, mask_shape, text_lengths

FIRST, VIDEO, LAST = 3, 4, 5
S = FIRST + VIDEO + LAST


def mask_of(*lengths: tuple[int, int]) -> Tensor:
    """Bool ``[B, 1, 1, S]``."""
    rows = [[i < a or (FIRST <= i < FIRST + VIDEO) or 0 <= i - FIRST - VIDEO < b for i in range(S)] for a, b in lengths]
    return torch.tensor(rows)[:, None, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_lengths(dtype: torch.dtype) -> None:
    mask = mask_of((0, 5), (3, 0), (2, 4))
    if dtype != torch.bool:
        mask = torch.where(mask, 0.0, -10000.0).to(dtype)
    assert text_lengths(mask, FIRST, LAST).tolist() == [[0, 5], [3, 0], [2, 4]]
    lengths, reason = found_in(mask, FIRST, LAST)
    assert reason is None and lengths.tolist() == [[0, 5], [3, 0], [2, 4]]


def hole() -> Tensor:
    mask = mask_of((3, 5))
    mask[..., -2] = False
    return mask


def hole_first() -> Tensor:
    mask = mask_of((3, 5))
    mask[..., 0] = False
    return mask


def hidden_video() -> Tensor:
    mask = mask_of((3, 5))
    mask[..., FIRST + 1] = False
    return mask


def bias() -> Tensor:
    return torch.where(mask_of((3, 5)), 0.0, 0.0).index_fill(-1, torch.tensor([1]), -3.0)


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (hole(), "leaves last text tokens that are no prefix"),
        (hole_first(), "leaves first text tokens that are no prefix"),
        (hidden_video(), "hides video tokens"),
        (bias(), "adds a bias that is neither 0 nor hides a token"),
    ],
)
def test_other_masks_are_refused(mask: Tensor, what: str) -> None:
    assert found_in(mask, FIRST, LAST)[1] == f"its attention mask {what}"
    with pytest.raises(ValueError, match=rf"^the attention mask of a sparse call {what}: .*dense_layers"):
        text_lengths(mask, FIRST, LAST)
    both = torch.cat([torch.zeros_like(mask) if mask.is_floating_point() else mask_of((3, 5)), mask])
    assert found_in(both, FIRST, LAST)[1] is not None  # one sample is enough


def test_shapes() -> None:
    assert mask_shape(mask_of((1, 1)), S) is None
    for shape in ((1, 1, S, S), (1, 2, 1, S), (S, S), (1, 1, 1, S + 1)):
        assert "is no key mask" in str(mask_shape(torch.ones(shape), S))


def test_masks_of_all_pairs() -> None:
    """``rows & columns`` of one key mask is that key mask; anything else is not."""
    keys = mask_of((2, 4), (3, 1))
    pairs = keys & keys.transpose(2, 3)
    found = key_mask_of(pairs)
    assert found is not None and torch.equal(found, keys)
    one = pairs.clone()
    one[1, 0, 4, 5] = False
    causal = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
    shifted = keys & keys.roll(1, -1).transpose(2, 3)
    for other in (one, causal, shifted, pairs.float(), pairs.expand(2, 2, S, S), keys):
        assert key_mask_of(other) is None


def test_what_hides_survives_bfloat16() -> None:
    assert torch.tensor(-10000.0).bfloat16() <= HIDES


def test_opcheck() -> None:
    torch.library.opcheck(text_lengths, (mask_of((2, 4), (3, 1)), FIRST, LAST))
