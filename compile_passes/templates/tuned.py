"""Which kernel and which blocks the fine stage's forward takes: a table of what was measured, and a default.

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

from flexsparse.compile_passes.templates.attention_common import TYPES, Blocks, unaccelerated_blocks

TABLE = Path(__file__).with_suffix(".json")
"""A JSON list of rows: `KEY`, the fields of `Choice`."""
KEY = ("arch", "dtype", "D", "query_rows", "slots")
KERNELS = ("triton", "hopper")

_forced: list[Choice] = []


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kernel of the fine stage's forward with its blocks.

    Attributes:
        kernel: ``"triton"`` (`forward`) or ``"hopper"`` (`hopper_forward`).
        rows: query rows of a block.
        keys: KV slots of a block.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline; for ``"hopper"`` the buffers of keys.
        source: name of the file in bench/results that it comes from; None where nothing was measured.

    Raises:
        ValueError: an unknown kernel.
    """

    kernel: str
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    source: str | None = None

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {self.kernel!r}: give one of {', '.join(KERNELS)}")

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


def _choice(kernel: str, size: Blocks) -> Choice:
    return Choice(kernel=kernel, **asdict(size))


def arch_of(x: Tensor) -> str | None:
    """``"sm_90a"`` and the like for a tensor on a CUDA device; None elsewhere, where kernels run in the interpreter."""
    if not x.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def candidates(arch: str | None, dtype: torch.dtype, D: int, query_rows: int, slots: int) -> list[Choice]:
    """All that may be tried for a shape, the default first; a candidate may still need more than a GPU has."""
    default = default_blocks(dtype, D, query_rows, slots)
    found = [_choice("triton", default)]
    if dtype == torch.float32 or D > 128:
        return found
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
        if query_rows % rows == 0 and slots % keys == 0 and size != default:
            found.append(_choice("triton", size))
    if arch == "sm_90a":
        from flexsparse.compile_passes.templates import hopper_forward

        found += [_choice("hopper", size) for size in hopper_forward.sizes(D, query_rows, slots)]
    return found


def chosen(arch: str | None, dtype: torch.dtype, D: int, query_rows: int, slots: int) -> Choice:
    """What `using` forces, else what was measured to be fastest, else plain Triton with default blocks."""
    if _forced:
        return _forced[-1]
    measured = None if arch is None else _table(TABLE).get((arch, TYPES[dtype], D, query_rows, slots))
    return measured or _choice("triton", default_blocks(dtype, D, query_rows, slots))


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Force a choice on every call inside, in all threads; a case that its kernel refuses raises."""
    _forced.append(choice)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> bool:
    """Whether a choice is forced."""
    return bool(_forced)


@functools.cache
def _table(path: Path) -> dict[tuple[Any, ...], Choice]:
    """The rows of a table by `KEY`.

    Raises:
        ValueError: a row that names no source: what was never measured is not chosen.
    """
    found: dict[tuple[Any, ...], Choice] = {}
    for row in json.loads(path.read_text()):
        choice = Choice(**{name: value for name, value in row.items() if name not in KEY})
        if not choice.source:
            raise ValueError(f"{path.name} has a row without a source: {row}; write it with `python -m bench.tune`")
        found[tuple(row[name] for name in KEY)] = choice
    return found


def write_table(rows: Iterable[Mapping[str, Any]], source: str, path: Path | None = None) -> None:
    """Put measured winners into the table, in the place of older ones for the same shapes.

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
        table[tuple(row[name] for name in KEY)] = Choice(**{name: row[name] for name in names}, source=source)
    written = [dict(zip(KEY, key)) | asdict(choice) for key, choice in sorted(table.items(), key=lambda item: item[0])]
    path.write_text(json.dumps(written, indent=1) + "\n")
    _table.cache_clear()
