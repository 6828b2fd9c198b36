"""How often Triton compiles: launches looked at with their own arguments, on a GPU that is not there."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import launched
import pytest
import torch

import flexsparse as fs

GRIDS = [(4, 16, 16), (5, 16, 16), (4, 12, 12), (5, 18, 22), (8, 16, 32), (3, 30, 52), (7, 9, 11), (1, 16, 16)]
CASES: dict[str, dict[str, Any]] = {
    "VSA": {"builder": fs.VSA(top_k=2), "gated": True},
    "VSA, text, grouped heads": {"builder": fs.VSA(sparsity=0.7), "text": (5, 70), "G": 3, "gated": True},
    "VSA, a head, within": {"builder": fs.VSA(top_k=1, within=fs.SlidingTile(window=(3, 3, 3))), "H": 1},
    "VSA, tiles of 128": {"builder": fs.VSA(top_k=1), "tile": (4, 4, 8), "gated": True, "dtype": torch.float16},
    "VSA, float32": {"builder": fs.VSA(top_k=2), "gated": True, "dtype": torch.float32},
    "BSA": {"builder": fs.BSA()},
    "BSA, text, tiles of 128 and 64": {"builder": fs.BSA(), "tile": (4, 4, 8), "kv_tile": (4, 4, 4), "text": (0, 40)},
    "TopP": {"builder": fs.TopP(mass=0.5)},
    "static": {"builder": fs.SlidingTile(window=(1, 3, 3))},
}


def by_case() -> dict[str, dict[str, list[str]]]:
    """Of each case over all grids, versions by what its source declares; what Triton found in addition."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, case in CASES.items():
        versions: dict[str, list[str]] = defaultdict(list)
        with launched.recording() as seen:
            for grid in GRIDS:
                launched.attention(grid, **case)
        for one in seen:
            versions[f"{one.kernel} {one.declared}"].append(one.found)
        found[name] = versions
    return found


def of_a_kernel_that_looks_at_numbers() -> int:
    """Versions of a kernel that is launched with 16, 17 and 1."""
    from flexsparse.compile_passes.templates.launch import launch
    from templates import number_kernel

    with launched.recording() as seen:
        for n in (16, 17, 1, 16):
            launch(number_kernel.add_number, (1,), torch.empty(16), n)
    return len(seen)


def test_no_size_of_a_grid_compiles_a_kernel_again() -> None:
    """Sizes, counts and strides of tables follow the grid: one that Triton looks at costs seconds at some resolution."""
    for name, versions in launched.ask(by_case).items():
        assert len(versions) > 5
        for declared, found in versions.items():
            assert len(found) == 1, f"{name}: {declared.split()[0]} is compiled {len(found)} times: {found}"


def test_what_triton_looks_at_is_seen() -> None:
    assert launched.ask(of_a_kernel_that_looks_at_numbers) == 3


def as_compiled() -> list[dict[str, Any]]:
    """Every version of training in half precision, by default and with each of the kernels for Hopper, through ptxas."""
    from flexsparse.compile_passes.templates import tuned

    def step(choice: tuned.Choice | None, grid: tuple[int, int, int], **shape: Any) -> None:
        if choice is None:
            launched.attention(grid, fs.VSA(top_k=2), gated=True, **shape)
            launched.attention(grid, fs.BSA(), **shape)
        else:
            with tuned.using(choice):
                launched.attention(grid, fs.BSA(keep_queries=1.0), G=4, **shape)

    rows = []
    with pytest.MonkeyPatch.context() as patch:
        for D, tile in ((128, (4, 4, 4)), (64, (4, 4, 4)), (128, (4, 4, 8))):
            slots = tile[0] * tile[1] * tile[2]
            of_hopper = [
                choice
                for op in tuned.OPS
                for choice in tuned.candidates("sm_90a", torch.bfloat16, D, slots, slots, op)
                if choice.kernel != "triton"
            ]
            for choice in (None, *of_hopper):
                with launched.recording() as seen:
                    patch.setattr(tuned, "arch_of", lambda x: "sm_90a")
                    step(choice, (8, 16, 16), D=D, tile=tile)
                    step(choice, (5, 18, 22), D=D, tile=tile, text=(5, 70))
                for one in seen:
                    if choice is None or one.kernel.startswith("hopper"):
                        about = {"kernel": one.kernel, "declared": one.declared, "default": choice is None}
                        rows.append(about | launched.compiled(one))
    return rows


@pytest.mark.slow
def test_what_is_launched_compiles_for_hopper() -> None:
    rows = launched.ask(as_compiled)
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "_forward",
        "_delta",
        "_dq",
        "_dkdv",
        "pool_kernel",
        "select_kernel",
        "prune_kernel",
        "take_kernel",
    }
    assert kernels >= {"hopper_forward", "hopper_pair_forward", "hopper_dq", "hopper_dkdv", "hopper_specialized_dkdv"}
    for row in rows:
        assert not row["serialized"] and row["shared_bytes"] <= 232448, row
        # Triton 3.6 leaves two registers in memory for 32 packed rows of D=64, beside the loop
        assert row["spill_bytes"] <= 8 or not row["default"], row
