"""What a sparse call keeps for its backward: `python -m bench.saved`. Exit code 1 where it is 5 % more than it may be.

Counted, not measured: the call runs on fake tensors of the full size, which hold shapes and no values, and autograd says
what it saves. No GPU and no memory is needed, and nothing is scaled up. The reference is padded q, k, v, o and lse; the
gate is apart.
Shape letters: B batch, H heads, S tokens, P padded tokens, D head dim.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode

import flexsparse as fs
from bench.header import header
from bench.marks import replaced
from bench.table import x_by
from flexsparse import attention
from flexsparse.attention import attend
from flexsparse.backends import triton
from flexsparse.masks import coarse
from flexsparse.ops import tile_tokens

RESULTS = Path(__file__).parent / "results" / "saved.json"
PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- bench:saved -->", "<!-- /bench:saved -->"
ALLOWED = 1.05
MIB = 2**20
MODES = ("eager", "compiled")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sparse call.

    Attributes:
        name: for the table.
        builder: a mask builder.
        gated: whether the coarse output is added under a gate.
        grid: latent grid.
        tile: sides of a tile.
        H: heads.
        D: head dim.
        dtype: of q, k, v and the gate.
    """

    name: str
    builder: Any
    gated: bool = False
    grid: tuple[int, int, int] = (20, 48, 80)
    tile: tuple[int, int, int] = (4, 4, 4)
    H: int = 40
    D: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> fs.TileLayout:
        """The layout of queries and keys."""
        return fs.TileLayout(grid=self.grid, tile=self.tile)

    @property
    def needed(self) -> int:
        """Bytes of padded q, k, v, o and float32 lse."""
        return self.H * self.layout.padded_len * (4 * self.D * self.dtype.itemsize + 4)


CASES = (
    Case(name="VSA", builder=fs.VSA(sparsity=0.9)),
    Case(name="VSA, gated", builder=fs.VSA(sparsity=0.9), gated=True),
    Case(name="BSA", builder=fs.BSA(keep_queries=0.5, kv_density=0.1)),
)


def storages(call: Callable[[], Any]) -> dict[int, Tensor]:
    """What autograd saves while ``call`` runs: of each storage one tensor, by the storage's identity."""
    found: dict[int, Tensor] = {}
    held: list[Tensor] = []  # so that no storage is freed and its identity given out again

    def pack(x: Tensor) -> Tensor:
        held.append(x)
        found.setdefault(identity(x), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held.append(call())
    return found


def identity(x: Tensor) -> int:
    """The same number for tensors of one storage, fake ones included."""
    return int(x.untyped_storage()._cdata)


def eager(case: Case, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """`fs.sparse_attention` by the templates, as on CUDA."""
    heads = None if gate is None else gate.unflatten(-1, (case.H, case.D)).transpose(1, 2)
    return attend(q, k, v, case.layout, case.builder, gate=heads, scale=case.D**-0.5, backend="triton")[0]


def compiled(case: Case, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """A dense call under a gate's mark, compiled by `fs.backend` as a wrapped model is."""

    def dense(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            torch.ops.flexsparse.mark_gate(gate)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    torch._dynamo.reset()
    backend = fs.backend(case.builder, tile=case.tile, grid=case.grid, expect=1)
    out: Tensor = torch.compile(dense, backend=backend, fullgraph=True, dynamic=False)(q, k, v, gate)
    (call,) = backend.report().calls
    if not (call.sparse and call.lowered):
        raise RuntimeError(f"{case.name}: the compiled call is not lowered: {call.reason}")
    return out


@contextmanager
def without_values() -> Iterator[FakeTensorMode]:
    """Calls on fake CPU tensors do what real ones do on CUDA, and compiled graphs run without generated code."""

    def op(q: Tensor, k: Tensor, v: Tensor, *operands: Any) -> Any:
        return torch.ops.flexsparse.tile_attention(q, k, v, *operands)

    def uncompiled(gm: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        return make_boxed_func(gm.forward)

    with ExitStack() as stack:
        for owner, name, new in (
            (triton._Interpreted, "apply", op),  # off CUDA the templates run in an interpreter
            (coarse, "is_tracing", lambda: False),  # fake tensors look like a compiler at work
            (attention, "is_tracing", lambda: False),
            (tile_tokens, "in_one_kernel", lambda device, dtype: True),  # as on CUDA: graphs then need no tiles
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(mock.patch("torch._inductor.compile_fx.compile_fx_inner", uncompiled))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def count(case: Case, mode: str) -> Row:
    """The row of a case, ``eager`` or ``compiled``."""
    with without_values():
        if mode == "compiled":
            traced = (mock.patch.object(module, "is_tracing", lambda: True) for module in (coarse, attention))
            with next(traced), next(traced):  # what is compiled is traced
                tensors, gate = saved_tensors(case, compiled)
        else:
            tensors, gate = saved_tensors(case, eager)
    total = sum(x.untyped_storage().nbytes() for x in tensors)
    largest = sorted(tensors, key=lambda x: -x.untyped_storage().nbytes())
    return {
        "op": "saved",
        "impl": "flexsparse",
        "case": case.name,
        "mode": mode,
        "B": 1,
        "H": case.H,
        "G": case.H,
        "S": case.layout.seq_len,
        "D": case.D,
        "grid": case.grid,
        "tile": case.tile,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": total,
        "gate_bytes": sum(x.untyped_storage().nbytes() for x in gate),
        "needed_bytes": case.needed,
        "tensors": [
            {
                "shape": list(x.shape),
                "dtype": str(x.dtype).removeprefix("torch."),
                "bytes": x.untyped_storage().nbytes(),
            }
            for x in largest
        ],
        "checked": total <= ALLOWED * case.needed,
    }


def saved_tensors(case: Case, run: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What is saved, a tensor of each storage, without the gate; and the gate, where it is saved."""
    H, S, D = case.H, case.layout.seq_len, case.D
    q, k, v = (torch.randn(1, H, S, D, dtype=case.dtype, requires_grad=True) for _ in range(3))
    gate = torch.randn(1, S, H * D, dtype=case.dtype, requires_grad=True) if case.gated else None
    found = storages(lambda: run(case, q, k, v, gate))
    apart = [] if gate is None else [found.pop(identity(gate))] if identity(gate) in found else []
    return list(found.values()), apart


def table(result: dict[str, Any]) -> str:
    """The Markdown between the marks of `bench/README.md`."""
    head, first = result["header"], result["rows"][0]
    lines = [
        f"{x_by(first['grid'])} = {first['S']:,} tokens, {first['H']} heads of {first['D']}, tiles of {x_by(first['tile'])}, "
        f"{first['dtype']}, torch {head['torch']}, {head['date'][:10]}; counted on fake tensors, not measured on a GPU.",
        "",
        "| saved for backward | MiB | / padded q, k, v, o, lse | besides, the gate | the five largest, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        largest = ", ".join(f"{x['bytes'] / MIB:,.0f}" for x in row["tensors"][:5])
        gate = f"{row['gate_bytes'] / MIB:,.0f}" if row["gate_bytes"] else ""
        ratio = f"{row['bytes'] / row['needed_bytes']:.3f}"
        lines.append(f"| {row['case']}, {row['mode']} | {row['bytes'] / MIB:,.0f} | {ratio} | {gate} | {largest} |")
    return "\n".join(lines)


def publish(result: dict[str, Any]) -> None:
    """Put the table between the marks of `bench/README.md`."""
    PAGE.write_text(replaced(PAGE.read_text(), table(result), BEGIN, END))


def over(rows: Iterable[Row]) -> list[str]:
    """A line for each row that saves too much."""
    return [
        f"{row['case']}, {row['mode']}: {row['bytes'] / row['needed_bytes']:.3f} of padded q, k, v, o, lse, allowed {ALLOWED}"
        for row in rows
        if not row["checked"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Count, write the file and the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.saved", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: bench/results/saved.json)")
    parser.add_argument("--table", action="store_true", help="write the table from the result file, count nothing")
    options = parser.parse_args(argv)
    if options.table:
        publish(json.loads(options.out.read_text()))
        return 0
    rows = [count(case, mode) for case in CASES for mode in MODES]
    for line in over(rows):
        print(line, file=sys.stderr)
    result = {"header": header(torch.get_num_threads()), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result).replace(', {"op"', ',\n{"op"') + "\n")
    if options.out == RESULTS:
        publish(result)
    return 0 if all(row["checked"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
