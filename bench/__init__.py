"""Benchmarks of flexsparse: cases, correctness gate, interleaved timing, tables. Run from a checkout, not installed.

They measure the installed package: a checkout that comes first on the path would hide it, and is none (`masks/` and
`compile_passes/` become its sub-packages when it is installed).
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_here = [entry for entry in sys.path if Path(entry or ".").resolve() == _ROOT]
sys.path[:] = [entry for entry in sys.path if entry not in _here] + _here
