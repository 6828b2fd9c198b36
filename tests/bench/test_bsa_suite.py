"""BSA in the suite for GPUs, on the CPU with stand-ins: every query tile on the same KV tiles, the pieces, the real cases."""

from pathlib import Path

import pytest
from suite_helpers import case, run

from bench.suite import bsa_parts, cases, targets


@pytest.mark.parametrize(
    ("kind", "pieces"), [("attention_forward", bsa_parts.FORWARD), ("attention_training", bsa_parts.BACKWARD)]
)
def test_other_query_tiles_keep_the_kv_tiles_and_every_piece_is_timed(
    tmp_path: Path, kind: str, pieces: tuple[str, ...]
) -> None:
    how = {"method": "bsa", "tile": (4, 8, 4), "kv_tile": (4, 4, 4), "others": ((4, 4, 8), (4, 4, 4)), "parts": True}
    code, result = run(tmp_path, case("bsa", kind, **how))  # type: ignore[arg-type]
    ours = [row for row in result["rows"] if row["impl"] == "flexsparse"]
    assert code == 0 and all(row["checked"] and row["ms"] for row in ours)
    whole = [row for row in ours if row["part"] is None]
    assert {tuple(row["tile"]) for row in whole} == {(4, 8, 4), (4, 4, 8), (4, 4, 4)}
    assert all(row["kv_tile"] == [4, 4, 4] for row in ours)
    assert tuple(row["part"] for row in ours if row["part"]) == pieces


def test_the_targets_cases_are_the_issues() -> None:
    both = {one.kind: one for one in cases.first_cases() if one.method == "bsa"}
    assert set(both) == {"attention_training", "attention_forward"}
    for one in both.values():
        assert one.S == 153_600 and one.grid == (40, 48, 80) and one.density == 0.1 and "dense_cudnn" in one.baselines
        assert one.builder.keep_queries == 0.5
        for tile in (one.tile, *one.others):
            layout = one.layout_of(tile)
            assert layout.whole and one.kv_layout.whole and one.kv_layout.sides == (4, 4, 4)
            assert one.builder.packed(layout) == layout.slots // 2
        assert (4, 4, 8) in one.others and one.layout.slots == 128
    lines = [line for line in targets.targets() if "BSA" in line.text]
    assert [(line.floor, line.aim) for line in lines] == [(10.0, 17.8), (10.0, 18.0)]
    rows = [one.row(one.kind, "flexsparse") for one in cases.all_cases()]
    for line in lines:
        assert {row["case"] for row in rows if line.wants(row)} == {"bsa-training", "bsa-forward"}
