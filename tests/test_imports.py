"""What importing the package brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flexsparse import compile_passes

SCRIPT = """
import sys
import flexsparse
print(*sorted({"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "diffusers", "accelerate"} & set(sys.modules)))
"""


def test_the_compiler_comes_with_what_compiles() -> None:
    """Importing torch's compiler takes as long as torch itself: help texts and data loaders' processes need none."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_pass_is_there() -> None:
    assert all(getattr(compile_passes, name).__name__ == name for name in compile_passes.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        compile_passes.Nothing  # noqa: B018
