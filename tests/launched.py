"""What calls launch on a GPU that is not there, as Triton would compile it.

Nothing runs: kernels write nothing, so that results are garbage. For a process without TRITON_INTERPRET, whose value Triton
reads as it decorates a kernel; `ask` starts one and reads what it prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Version:
    """A kernel as Triton compiles it for one launch.

    Attributes:
        kernel: its name.
        declared: what the source says it is compiled for: values of constexpr arguments, and which arguments are None.
        found: what Triton adds by looking at values: types, multiples of 16, ones.
        task: what is compiled, and with which options.
    """

    kernel: str
    declared: str
    found: str
    task: tuple[Any, ...]


@contextlib.contextmanager
def recording() -> Iterator[list[Version]]:
    """Every launch inside, each version once; CPU tensors are taken as a GPU's."""
    import triton
    from as_on_gpu import run_templates
    from for_cuda import Driver
    from triton.runtime import driver, jit

    from flexsparse.compile_passes.templates import launch

    versions: list[Version] = []

    def keep(
        self: Any, key: str, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, *_: Any, **__: Any
    ) -> None:
        names = self.arg_names
        values = {names[path[0]]: repr(value) for path, value in constants.items()}
        own = {p.name for p in self.params if p.is_constexpr}
        declared = {name: value for name, value in values.items() if name in own or value == "None"}
        found = {
            "types": signature,
            "constants": values,
            "attrs": {names[path[0]]: str(x) for path, x in attrs.items()},
        }
        texts = [json.dumps(x, sort_keys=True, default=str) for x in (declared | {"options": str(options)}, found)]
        one = Version(self.__name__, texts[0], texts[1], (self, signature, constants, attrs, options))
        if all((one.kernel, one.declared, one.found) != (x.kernel, x.declared, x.found) for x in versions):
            versions.append(one)

    def at(self: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=True, **kwargs)

    assert not triton.knobs.runtime.interpret, "start the process without TRITON_INTERPRET"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver())
        patch.setattr(jit.KernelInterface, "__getitem__", at)
        patch.setattr(jit.JITFunction, "_do_compile", keep)
        patch.setattr(launch, "interpreting", lambda: True)
        run_templates(patch)
        yield versions


def compiled(version: Version, capability: int = 90) -> dict[str, Any]:
    """What ptxas says of a version: ``registers``, ``spill_bytes``, ``serialized``; and its ``shared_bytes``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from bench.offline import ptxas_facts

    kernel, signature, constants, attrs, options = version.task
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attrs)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)
    return ptxas_facts(log.getvalue()) | {"shared_bytes": done.metadata.shared}


def attention(
    grid: tuple[int, int, int],
    builder: Any,
    *,
    tile: tuple[int, int, int] = (4, 4, 4),
    kv_tile: tuple[int, int, int] | None = None,
    text: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.bfloat16,
    H: int = 12,
    G: int | None = None,
    D: int = 64,
    gated: bool = False,
) -> None:
    """One training step of an attention whose heads lie inside of tokens."""
    import flexsparse as fs

    layout, keys = (
        fs.TileLayout(grid=grid, tile=x or tile, text_first=text[0], text_last=text[1]) for x in (tile, kv_tile)
    )
    q, k, v, gate = (
        torch.empty(1, layout.seq_len, heads, D, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (H, G or H, G or H, H)
    )
    kv_layout = keys if kv_tile else None
    given = {"gate": gate} if gated else {}
    out = fs.sparse_attention(q, k, v, layout, builder, kv_layout=kv_layout, backend="triton", **given)
    out.backward(torch.empty_like(out))  # heads inside of tokens, as a linear map gives it


def ask(function: Callable[[], Any]) -> Any:
    """What a test's function returns in a process that does not interpret; by JSON."""
    code = (
        f"import json, sys; sys.path.append({str(ROOT)!r}); "  # last: the library is the installed one, or a mutation of it
        f"import {function.__module__} as its; print(json.dumps(its.{function.__name__}()))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
