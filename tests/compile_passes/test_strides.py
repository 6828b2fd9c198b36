"""What compilers say of strides that passes have to see through."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexsparse.compile_passes.gathers import alike as lie_alike
from flexsparse.compile_passes.lower_flex import _lies_as


@pytest.mark.parametrize(("heads", "alike"), ((1, True), (2, False)))
def test_the_stride_of_a_dimension_of_one_does_not_count(heads: int, alike: bool) -> None:
    """Of one head, as a rank may have, torch says now one stride, now another: both are contiguous."""
    with FakeTensorMode():
        x = torch.empty(2, heads, 8, 4)
        turned = torch.empty(2, 8, heads, 4).transpose(1, 2)
    assert turned.stride() != x.stride()
    assert _lies_as(turned, x) == alike and lie_alike(turned, x) == alike
