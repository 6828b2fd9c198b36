"""Which kernel and which blocks each op of the fine stage takes: a table of what was measured, and a default.

Shape letters: D head dim.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexsparse.compile_passes.templates.attention_common import Blocks, unaccelerated_blocks
from flexsparse.compile_passes.templates.attention_shapes import TYPES

TABLE = Path(__file__).with_suffix(".json")
"""A JSON list of rows: the fields of `Choice`, the op first, and of `KEY`."""
KEY = ("arch", "dtype", "D", "query_rows", "slots")
"""What a choice is for, besides its op."""
OPS = ("forward", "dq", "dkdv")
"""The ops that choose: output and log-sum-exp; gradient of the queries; gradients of keys and values."""
KERNELS = ("triton", "hopper", "hopper_pairs", "hopper_specialized")

Tiles = tuple[torch.dtype, int, int, int]
"""dtype, D, query rows and KV slots of a tile: what a forced choice may be confined to."""

_forced: list[tuple[Choice, Tiles | None]] = []


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kernel of one op of the fine stage with its blocks.

    Attributes:
        op: one of `OPS`.
        kernel: ``"triton"`` (`forward`, `backward`), ``"hopper"`` (`hopper_forward`, `hopper_backward`), of the forward
            ``"hopper_pairs"``, or of the others ``"hopper_specialized"``.
        rows: query rows of a block; like the next three 0 for a plain kernel of dq or dkdv, which finds its own blocks.
        keys: KV slots of a block.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline; for the others the buffers of what a program walks along.
        source: name of the file in bench/results that it comes from; None where nothing was measured.

    Raises:
        ValueError: an unknown op or kernel, or blocks for a kernel that takes none.
    """

    op: str = "forward"
    kernel: str
    rows: int = 0
    keys: int = 0
    num_warps: int = 0
    num_stages: int = 0
    source: str | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op is {self.op!r}: give one of {', '.join(OPS)}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {self.kernel!r}: give one of {', '.join(KERNELS)}")
        if self.op != "forward" and self.kernel == "hopper_pairs":
            raise ValueError(f"kernel 'hopper_pairs' computes forward, not {self.op}: give 'hopper' or 'triton'")
        if self.op == "forward" and self.kernel == "hopper_specialized":
            raise ValueError("kernel 'hopper_specialized' computes dq or dkdv, not forward: give 'hopper' or 'triton'")
        given = (self.rows, self.keys, self.num_warps, self.num_stages)
        if self.op != "forward" and self.kernel == "triton":
            if any(given):
                raise ValueError(f"the plain kernel of {self.op} finds its own blocks: leave out {given}")
        elif not all(given):
            raise ValueError(f"rows, keys, num_warps and num_stages are {given}: give positive numbers")

    @property
    def blocks(self) -> Blocks:
        """The block sizes as the kernels take them."""
        return Blocks(rows=self.rows, keys=self.keys, num_warps=self.num_warps, num_stages=self.num_stages)

    def config(self) -> dict[str, Any]:
        """What is chosen, without where it comes from: ``Choice(**choice.config())`` is the choice again."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


def default_blocks(dtype: torch.dtype, D: int, query_rows: int, slots: int) -> Blocks:
    """Plain Triton's: one warpgroup per 64 rows. Three stages fetch a tile's index one step before its keys and values."""
    if dtype == torch.float32:
        return unaccelerated_blocks(D, query_rows, slots)
    if D > 128:
        return Blocks(rows=min(query_rows, 64), keys=min(slots, 32), num_warps=4, num_stages=3)
    rows = min(query_rows, 128)
    keys = min(slots, 128 if rows == 128 and D > 64 else 64)
    return Blocks(rows=rows, keys=keys, num_warps=8 if rows == 128 else 4, num_stages=3 if rows > 16 else 2)


def _choice(kernel: str, size: Blocks, op: str = "forward") -> Choice:
    return Choice(op=op, kernel=kernel, **asdict(size))


def _default(dtype: torch.dtype, D: int, query_rows: int, slots: int, op: str) -> Choice:
    if op != "forward":
        return Choice(op=op, kernel="triton")
    return _choice("triton", default_blocks(dtype, D, query_rows, slots))


def arch_of(x: Tensor) -> str | None:
    """``"sm_90a"`` and the like for a tensor on a CUDA device; None elsewhere, where kernels run in the interpreter."""
    if not x.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def candidates(
    arch: str | None, dtype: torch.dtype, D: int, query_rows: int, slots: int, op: str = "forward"
) -> list[Choice]:
    """All that may be tried for an op and a shape, the default first; a candidate may still need more than a GPU has."""
    default = _default(dtype, D, query_rows, slots, op)
    found = [default]
    if dtype == torch.float32 or D > 128:
        return found
    if op != "forward":
        return found + _hopper_backward(arch, D, query_rows, slots, op)
    # 64 rows have a warpgroup of 4 warps, 128 rows two; more slots a step take more registers, more stages more memory
    for rows, keys, num_warps, num_stages in (
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 32, 4, 4),
        (64, 128, 4, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
    ):
        size = Blocks(rows=rows, keys=keys, num_warps=num_warps, num_stages=num_stages)
        if query_rows % rows == 0 and slots % keys == 0 and size != default.blocks:
            found.append(_choice("triton", size))
    if arch == "sm_90a":
        from flexsparse.compile_passes.templates import hopper_forward, hopper_pairs

        found += [_choice("hopper", size) for size in hopper_forward.sizes(D, query_rows, slots)]
        found += [_choice("hopper_pairs", size) for size in hopper_pairs.sizes(D, query_rows, slots)]
    return found


def _hopper_backward(arch: str | None, D: int, query_rows: int, slots: int, op: str) -> list[Choice]:
    if arch != "sm_90a":
        return []
    from flexsparse.compile_passes.templates import hopper_backward, hopper_specialized

    found: list[Choice] = []
    for kernel, module in (("hopper", hopper_backward), ("hopper_specialized", hopper_specialized)):
        sizes = module.dq_sizes if op == "dq" else module.dkdv_sizes
        found += [_choice(kernel, size, op) for size in sizes(D, query_rows, slots)]
    return found


def chosen(
    arch: str | None,
    dtype: torch.dtype,
    D: int,
    query_rows: int,
    slots: int,
    op: str = "forward",
    by_table: bool = False,
) -> Choice:
    """What `using` forces, else what was measured to be fastest, else plain Triton with default blocks.

    ``by_table``: rows are found by a table, which of all kernels only plain Triton's can (`finds_rows`).

    Raises:
        ValueError: another is forced there.
    """
    wanted = _forced_on(op, (dtype, D, query_rows, slots))
    if wanted:
        if by_table and wanted[-1].kernel != "triton":
            raise ValueError(
                f"kernel {wanted[-1].kernel!r} is forced on {op}, and takes no tokens in raster order: give tile order"
            )
        return wanted[-1]
    measured = None if arch is None else _table(TABLE).get((op, arch, TYPES[dtype], D, query_rows, slots))
    if measured is None or (by_table and measured.kernel != "triton"):
        return _default(dtype, D, query_rows, slots, op)
    return measured


def finds_rows(q: Tensor, query_rows: int, slots: int, gradients: bool = True) -> bool:
    """Whether all kernels that are chosen for queries can find rows by a table, so that nobody need bring them to tile order.

    The one place that decides it: before tokens are left in raster order, and not where kernels run. Without ``gradients`` the
    call has no backward, whose kernels are not asked.
    """
    ops = OPS if gradients else OPS[:1]
    case = (q.shape[3], query_rows, slots)
    if any(choice.kernel != "triton" for op in ops for choice in _forced_on(op, (q.dtype, *case))):
        return False
    if not any(key[2:] == (TYPES[q.dtype], *case) for key in _table(TABLE)):  # whatever the GPU is
        return True
    arch = arch_of(q)
    return all(chosen(arch, q.dtype, *case, op).kernel == "triton" for op in ops)


def hopper_choice(op: str, q: Tensor, query_rows: int, slots: int, by_table: bool = False) -> Choice | None:
    """The Hopper kernel of dq or dkdv where one is chosen for queries ``[B, H, R, D]``; None for plain Triton.

    Raises:
        ValueError: it is forced where it does not run.
    """
    arch = arch_of(q)
    choice = chosen(arch, q.dtype, q.shape[3], query_rows, slots, op, by_table)
    if choice.kernel == "triton":
        return None
    if arch != "sm_90a":
        raise ValueError(f"the Hopper kernel of {op} is forced on {arch or 'a CPU tensor'}: it needs a GPU of sm_90a")
    return choice


@contextlib.contextmanager
def using(choice: Choice, only: Tiles | None = None) -> Iterator[None]:
    """Force a choice on every call of its op inside, in all threads; a case that its kernel refuses raises.

    ``only``: on calls with these tiles; others choose as if nothing were forced.
    """
    _forced.append((choice, only))
    try:
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def unforced() -> Iterator[None]:
    """Inside, nothing is forced that is forced around it."""
    before, _forced[:] = _forced[:], []
    try:
        yield
    finally:
        _forced[:] = before


def forced(op: str = "forward", tiles: Tiles | None = None) -> bool:
    """Whether a choice is forced for an op, on these tiles or on any."""
    return bool(_forced_on(op, tiles))


def _forced_on(op: str, tiles: Tiles | None) -> list[Choice]:
    """What is forced, the innermost last."""
    return [choice for choice, only in _forced if choice.op == op and (None in (only, tiles) or only == tiles)]


@functools.cache
def _table(path: Path) -> dict[tuple[Any, ...], Choice]:
    """The rows of a table by op and `KEY`.

    Raises:
        ValueError: a row that names no source: what was never measured is not chosen.
    """
    found: dict[tuple[Any, ...], Choice] = {}
    for row in json.loads(path.read_text()):
        choice = Choice(**{name: value for name, value in row.items() if name not in KEY})
        if not choice.source:
            raise ValueError(f"{path.name} has a row without a source: {row}; write it with `python -m bench.tune`")
        key = (choice.op, *(row[name] for name in KEY))
        found[key] = choice
    return found


def write_table(rows: Iterable[Mapping[str, Any]], source: str, path: Path | None = None) -> None:
    """Put measured winners into the table, in the place of older ones for the same ops and shapes.

    Args:
        rows: each with the fields of `KEY` (dtype as ``"bf16"``) and of ``Choice.config()``; others are passed over.
        source: name of the file in bench/results that they come from.
        path: the table; the installed one by default.

    Raises:
        ValueError: no source, or a row that lacks a field.
    """
    path = path or TABLE
    if not source:
        raise ValueError("source is empty: give the name of the file in bench/results that the rows come from")
    table = dict(_table(path))
    names = [name for name in Choice.__dataclass_fields__ if name != "source"]
    for row in rows:
        missing = [name for name in (*KEY, *names) if name not in row]
        if missing:
            raise ValueError(f"a row lacks {', '.join(missing)}: {dict(row)}")
        choice = Choice(**{name: row[name] for name in names}, source=source)
        key = (choice.op, *(row[name] for name in KEY))
        table[key] = choice
    ordered = sorted(table.items(), key=lambda item: item[0])
    written = [dict(zip(("op", *KEY), key)) | asdict(choice) for key, choice in ordered]
    path.write_text(json.dumps(written, indent=1) + "\n")
    _table.cache_clear()
