"""Bytes that a plan says against those of real tensors; the page holds the committed comparison."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import flexsparse as fs
from bench import machine
from bench.plan_check import __main__ as plan_check
from bench.plan_check import chosen, table, tensors
from bench.plan_check.cases import Case

SMALL = {"grid": (4, 8, 8), "training": True}
CASES = {
    "plain": Case(builder=fs.VSA(top_k=2), **SMALL),
    "partial tiles": Case(builder=fs.VSA(sparsity=0.6), **{**SMALL, "grid": (3, 7, 9)}),
    "gates, partial tiles": Case(builder=fs.VSA(sparsity=0.6), gates=True, **{**SMALL, "grid": (5, 6, 7)}),
    "checkpointing": Case(builder=fs.VSA(top_k=2), checkpointing=True, **SMALL),
    "joint text": Case(model="hunyuanvideo", builder=fs.VSA(top_k=2), **SMALL),
    "BSA": Case(builder=fs.BSA(keep_queries=0.5, kv_density=0.5), **SMALL),
}


SLOW = ("plain", "partial tiles")  # of which others have all but the sizes


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_planned_bytes_are_those_of_real_tensors(name: str, tmp_path: Path) -> None:
    """Saved tensors but for small constants of the model and layout; what is alive, but for the coarse stage's own tensors."""
    found = tensors.counted(CASES[name], tmp_path)
    for quantity in ("weights", "gradients", "AdamW's averages", "bitmasks"):
        planned, real = found[quantity]
        assert planned == real > 0, quantity
    planned, real = found["lists of one call"]
    if name != "BSA":  # whose rows keep as many tiles as the data ask for
        assert planned == real > 0
    for quantity, off in {"saved for backward": 0.005, "alive at once": 0.03}.items():
        planned, real = found[quantity]
        assert planned == pytest.approx(real, rel=off), quantity


def test_the_page_holds_the_committed_table() -> None:
    result = json.loads(table.RESULTS.read_text())
    between = table.PAGE.read_text().split(table.BEGIN)[1].split(table.END)[0]
    assert between.strip() == table.table(result), "run python -m bench.plan_check --table"


def test_the_committed_rows_are_of_all_cases() -> None:
    result = json.loads(table.RESULTS.read_text())
    rows = result["rows"]
    for row in rows:
        middle = statistics.median(row["measured"])
        assert row["ratio"] is None or row["ratio"] == pytest.approx(row["planned"] / middle, abs=1e-4)
    assert [row["case"] for row in rows if row["unit"] == "ms"] == [case.name for case in chosen.TIMED]
    assert all(len(row["measured"]) == len(row["wall_ms"]) == result["header"]["repeats"] for row in rows[:1])
    for cases, word in ((chosen.TENSORS, "weights"), (chosen.PEAKS, "peak over a warm process")):
        assert [row["case"] for row in rows if row["quantity"] == word] == [case.name for case in cases]
    machine = json.loads((table.RESULTS.parent / result["header"]["machine"]).read_text())
    assert machine["header"]["cpu"] == result["header"]["cpu"] and machine["header"]["threads"] == 1
    sizes = {tuple(row.get("grid") or ()) for row in machine["rows"]}
    assert not sizes & {case.grid for case in chosen.TIMED}, "plans are not fitted to what they are compared with"


def test_a_table_says_what_was_off() -> None:
    common = {"case": "a step", "quantity": "step", "unit": "ms"}
    rows = [
        {**common, "planned": 50.0, "measured": [90.0, 100.0, 400.0], "ratio": 0.5},
        {**common, "unit": "bytes", "quantity": "ends", "planned": 0.0, "measured": [2**20], "ratio": 0.0},
        {**common, "unit": "bytes", "quantity": "lists", "planned": 2**20, "measured": [2**20], "ratio": 1.0},
        {**common, "unit": "bytes", "quantity": "lists", "planned": 2**20, "measured": [2**20], "ratio": 1.0},
        {**common, "unit": "bytes", "quantity": "lists", "planned": 2**19, "measured": [2**20], "ratio": 0.5},
        {**common, "unit": "bytes", "quantity": "nothing", "planned": 0.0, "measured": [0], "ratio": None},
    ]
    head = {"cpu": "A", "cpu_capability": "B", "torch": "2", "date": "2026-01-01T0", "clock": "CPU time", "repeats": 3}
    text = table.table({"header": head, "rows": rows})
    assert "| a step | 50 | 100 | 0.50 |" in text and 'furthest off is "a step"' in text
    assert "2 agree to the byte: lists (2 of 3)" in text
    assert (
        "| ends: a step | 0.000 | 1.000 | not planned |" in text and "| lists: a step | 0.500 | 1.000 | 0.500 |" in text
    )
    assert text.count("lists: a step") == 2, "in the sentence and in the table, and only where it differs"


@pytest.mark.parametrize("main", [machine.main, plan_check.main], ids=["machine", "plan_check"])
def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(
    main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "none" / "x.json")])
    assert ended.value.code == 2 and "is in a folder that is not there: make it first" in capsys.readouterr().err
