"""Modules of kernels with a bug in them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def mutated(folder: Path, kernels: ModuleType, old: str, new: str) -> ModuleType:
    """A module of kernels with a text that occurs once replaced."""
    source = Path(str(kernels.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    name = f"mutated_{Path(str(kernels.__file__)).stem}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
