"""A kernel that Triton compiles anew for ones and multiples of 16."""

import triton


@triton.jit
def add_number(x, n):
    """Nothing."""
