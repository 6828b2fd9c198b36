"""What the attention kernels are compiled for where no tensor is at hand: their shapes, and the types of their arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from flexsparse.compile_passes.templates.attention_common import Blocks, padded_dim
from flexsparse.compile_passes.templates.launch import Compilation
from flexsparse.compile_passes.templates.rows import ROW_ARRAYS

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
NUMBERS = (
    *("H", "N", "M", "U", "R", "G", "first_rows", "first_tiles", "kv_first", "capacity", "length", "count_stride"),
    *("frame_tiles", "query_tiles", "most"),
    *(f"{name}_{axis}" for name in ROW_ARRAYS for axis in "bh"),
)
"""The kernels' integers; none recompiles anything."""
_KINDS = {
    "*fp32": ("lse", "lse_log2", "delta", "estimate", "grad_lse", "coarse", "dcoarse", "workspace"),
    "*i32": ("lists", "sizes", "counts", "kv_counts", "columns", "indices", "pieces", "q_tokens", "kv_tokens"),
    "*i64": ("offsets",),
    "fp32": ("scale", "scale_log2"),
    "i32": NUMBERS,
}
ARGUMENT_TYPES = {name: kind for kind, names in _KINDS.items() for name in names}
"""Triton type of the kernels' arguments by name; all others are arrays of the inputs' type."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an attention kernel is specialised for, where it is compiled without tensors at hand.

    Attributes:
        dtype: of the inputs.
        D: head dim.
        query_rows: rows of a query tile.
        slots: slots of a KV tile.
        group: query heads of a KV head.
        heads: query heads whose rows lie side by side, as a model's linear maps leave them; 1 for a head after the other.
        full: no partial tiles, no extra tokens, no coarse output; else all of them.
        raster: what is in raster order and read by a table: ``"qkv"``, ``"kv"`` (packed queries), or nothing.
        auto: whether ``backend="auto"`` can choose it.
    """

    dtype: torch.dtype = torch.bfloat16
    D: int = 128
    query_rows: int = 64
    slots: int = 64
    group: int = 1
    heads: int = 24
    full: bool = False
    raster: str = ""
    auto: bool = True


def shapes(long_tail: bool) -> list[Shape]:
    """The shapes that the attention kernels are compiled for offline."""
    found = [
        Shape(full=True),
        Shape(),
        Shape(query_rows=128, slots=128, full=True),
        Shape(query_rows=128, slots=128),
        Shape(D=64, full=True),
        Shape(D=64, query_rows=128, slots=128),
        Shape(dtype=torch.float16),
        Shape(query_rows=32),
    ]
    if long_tail:
        rare: list[dict[str, Any]] = [
            {"query_rows": 16, "D": 64, "dtype": torch.float16},
            {"query_rows": 16},
            {"query_rows": 128},
            {"slots": 128},
            {"query_rows": 256, "slots": 256},
            {"slots": 16, "query_rows": 16},
            {"slots": 32, "query_rows": 32},
            {"heads": 1},
            {"heads": 1, "full": True},
            {"heads": 1, "query_rows": 128, "slots": 128},
            {"group": 2},
            {"group": 2, "query_rows": 128, "slots": 128},
            {"D": 32},
            {"D": 96},
            {"D": 256},
            {"D": 256, "query_rows": 128, "slots": 128},
            {"dtype": torch.float32, "D": 64},
            {"dtype": torch.float32},
        ]
        found += [Shape(auto=False, **changes) for changes in rare]
    return found


def raster_shapes(long_tail: bool) -> list[Shape]:
    """The shapes that they are compiled for where rows are found by a table."""
    found = [
        Shape(raster="qkv"),
        Shape(raster="qkv", full=True),
        Shape(raster="qkv", D=64),
        Shape(raster="qkv", query_rows=128, slots=128),
        Shape(raster="kv"),
        Shape(raster="kv", query_rows=32),
        Shape(raster="kv", D=64),
    ]
    if long_tail:
        rare: list[dict[str, Any]] = [
            {"group": 2},
            {"heads": 1},
            {"D": 96},
            {"D": 256},
            {"dtype": torch.float16, "D": 64, "query_rows": 128, "slots": 128},
            {"dtype": torch.float32},
        ]
        found += [Shape(**{"auto": False, "raster": "qkv", **changes}) for changes in rare]
    return found


@dataclass(frozen=True, kw_only=True)
class AttentionCompilation(Compilation):
    """A compilation with further launch options.

    Attributes:
        options: as Triton names them.
    """

    options: dict[str, int] = field(default_factory=dict)


def compilation(kernel: Any, shape: Shape, size: Blocks, **constants: Any) -> AttentionCompilation:
    """One attention kernel for one shape.

    Args:
        kernel: the jitted function.
        shape: what it is specialised for.
        size: its block sizes.
        constants: constants that only this kernel takes, and its absent arguments as None.
    """
    partly = not shape.full
    constants |= {"GROUP": shape.group, "D": shape.D, "BLOCK_D": padded_dim(shape.D), "EXTRA": partly}
    constants |= {"QUERY_ROWS": shape.query_rows, "SLOTS": shape.slots, "PARTIAL": partly}
    constants |= {"ROWS": size.rows, "KEYS": size.keys}
    constants |= {name: None for name, tiled in (("q_tokens", "q"), ("kv_tokens", "kv")) if tiled not in shape.raster}
    rows = [name for name in kernel.arg_names if name.endswith("_ROW")]
    constants |= dict.fromkeys(rows, shape.heads * shape.D) | {"ALIGN": math.gcd(16, shape.D)}
    array = "*" + TYPES[shape.dtype]
    signature = {n: "constexpr" if n in constants else ARGUMENT_TYPES.get(n, array) for n in kernel.arg_names}
    config = {"dtype": TYPES[shape.dtype], "D": shape.D, "query_rows": shape.query_rows, "slots": shape.slots}
    in_order = {"raster": shape.raster} if shape.raster else {}
    return AttentionCompilation(
        kernel=kernel,
        config=config | in_order | {"group": shape.group, "heads": shape.heads, "full": shape.full},
        signature=signature,
        constants={name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*")),
        num_warps=size.num_warps,
        num_stages=size.num_stages,
        options={name: value for name, value in size.meta().items() if name == "maxnreg"},
        auto=shape.auto,
    )
