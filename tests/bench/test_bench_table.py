"""Tables of a tiny result file made by hand: the page of all, and the README between its marks."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import table

GOLDEN = """\
A CPU (AVX9), torch 9.9, Python 3.11.0, flexsparse 0.1.0 at 0123456789ab with local changes, 2030-01-02. Not run on \
a GPU. Medians of 3 interleaved runs; selection, tiling and untiling included; error: RMS error / RMS of the float64 \
oracle given the same selection, the largest of out and gradients.

|  | grid | tile | D | dtype | density | threads | implementation | ms | speed-up | target | error |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| forward | 8x8x8 |  | 64 | float32 | 1.000 | 1 | dense SDPA | 100.0 |  |  | 4.0e-07 |
| forward, VSA | 8x8x8 | 4x4x4 | 64 | float32 | 0.125 | 1 | `gather` | 25.0 | 4.00x | at least 5x: **not met** | 5.0e-07 |
| forward, VSA | 8x8x8 | 4x4x4 | 64 | float32 | 0.125 | 1 | `flex` | check failed |  | at least 5x: not measured | 9.0e-01 |

| share of the dense forward | D | ms | share | target |
| --- | --- | --- | --- | --- |
| layout: `to_tiles`, one tensor | 64 | 1.00 | 1.00% | under 3%: met |

| peak memory of forward + backward | D | MiB | over dense | target |
| --- | --- | --- | --- | --- |
| dense SDPA | 64 | 30 |  |  |
| `gather` | 64 | 90 | +60 MiB | at most 1024 MiB: met |

- Target not met: f, `gather`: 4.00x, at least 5x wanted.
- Check failed, so not measured: f, `flex`: out is wrong."""

BRIEF = """\
A CPU, one thread, torch 9.9, 2030-01-02: of each case the fastest backend. All backends, memory, selection's share, and \
where the time goes: [`bench/CPU.md`](bench/CPU.md). Of 4 targets 2 are met.

| attention | grid | tile | D | dtype | tiles kept | fastest | ms | dense ms | speed-up | target |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| forward, VSA | 8x8x8 | 4x4x4 | 64 | float32 | 12.5% | `gather` | 25 | 100 | 4.00x | at least 5x: **not met** |"""


def row(op: str, impl: str, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"case": "f", "op": op, "impl": impl, "part": None, "D": 64, "dtype": "float32"}
    base |= {"grid": [8, 8, 8], "tile": [4, 4, 4], "threads": 1, "checked": True, "reason": None, "target": None}
    base |= {"method": None if impl == "dense_sdpa" else "vsa", "density": 1.0 if impl == "dense_sdpa" else 0.125}
    return base | {"ms": None, "dense_ms": None, "mib": None, "dense_mib": None, "error": {}} | fields


HEADER = {"cpu": "A CPU", "cpu_capability": "AVX9", "torch": "9.9", "triton": None, "python": "3.11.0", "repeats": 3}
HEADER |= {"flexsparse": "0.1.0", "git_revision": "0123456789abcdef", "git_dirty": True, "date": "2030-01-02T03:04:05"}
DENSE = [90.0, 100.0, 110.0]
RESULT: dict[str, Any] = {
    "header": HEADER,
    "rows": [
        row("attention_forward", "dense_sdpa", ms=DENSE, dense_ms=DENSE, error={"out": 4e-7}),
        row(
            "attention_forward",
            "flexsparse_gather",
            ms=[22.5, 25.0, 30.0],
            dense_ms=DENSE,
            error={"out": 5e-7},
            target=5.0,
        ),
        row(
            "attention_forward", "flexsparse_flex", checked=False, reason="out is wrong", error={"out": 0.9}, target=5.0
        ),
        row(
            "layout",
            "flexsparse_gather",
            part="to_tiles",
            ms=[0.9, 1, 1.1],
            dense_ms=DENSE,
            ratio_to_dense=0.01,
            target=0.03,
        ),
        row("peak_memory", "dense_sdpa", mib=[30.0], dense_mib=[30.0]),
        row("peak_memory", "flexsparse_gather", mib=[90.0], dense_mib=[30.0], target=1024.0),
    ],
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A result file, a README with marks; the arguments that name them."""
    (tmp_path / "cpu.json").write_text(json.dumps(RESULT))
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    named = {"results": "cpu.json", "readme": "README.md", "page": "CPU.md"}
    return [word for option, name in named.items() for word in (f"--{option}", str(tmp_path / name))]


def test_the_tables_are_these() -> None:
    assert table.markdown(RESULT) == GOLDEN
    assert table.brief(RESULT) == BRIEF


def test_of_a_case_that_is_wrong_nothing_is_said_but_that() -> None:
    result = copy.deepcopy(RESULT)
    result["rows"][1]["checked"] = False
    assert table.brief_lines(result["rows"])[1][6:] == ["check failed", "", "", "", "at least 5x: not measured"]


def test_the_profile_is_a_table_with_a_column_for_each_case() -> None:
    part = {"D": 64, "pieces_ms": {"qk_matmul": 3.0}, "other_ms": 1.0, "forward_ms": 4.0}
    part |= {"matmul_gflops": 130.0, "dense_gflops": 140.0}
    lines = table.markdown({**RESULT, "profile": [part, {**part, "D": 128}]}).splitlines()
    assert "| pieces of the `gather` forward, ms | D=64 | D=128 |" in lines
    assert "| qk matmul | 3.0 | 3.0 |" in lines


def test_the_readme_changes_between_its_marks_only(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(files) == 0
    assert Path(files[3]).read_text() == f"before\n{table.BEGIN}\n{BRIEF}\n{table.END}\nafter\n"
    assert Path(files[5]).read_text().endswith(f"\n\n{GOLDEN}\n")
    assert capsys.readouterr().out == GOLDEN + "\n"
    assert table.main(files) == 0
    assert Path(files[3]).read_text().count(table.BEGIN) == 1


def test_check_compares_and_writes_nothing(files: list[str]) -> None:
    readme = Path(files[3])
    old = readme.read_text()
    assert table.main([*files, "--check"]) == 1
    assert readme.read_text() == old
    assert not Path(files[5]).exists()
    table.main(files)
    assert table.main([*files, "--check"]) == 0
    Path(files[5]).write_text("old")
    assert table.main([*files, "--check"]) == 1
    changed = copy.deepcopy(RESULT)
    changed["rows"][1]["ms"] = [1.0, 1.0, 1.0]
    Path(files[1]).write_text(json.dumps(changed))
    assert table.main([*files, "--check"]) == 1


@pytest.mark.parametrize("text", ("no marks", table.BEGIN, f"{table.END} {table.BEGIN}", table.BEGIN * 2 + table.END))
def test_a_readme_without_its_two_marks_is_refused(files: list[str], text: str) -> None:
    Path(files[3]).write_text(text)
    assert table.main(files) == 1
    assert Path(files[3]).read_text() == text


def test_tables_print_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    table.show(RESULT)
    assert capsys.readouterr().out == GOLDEN + "\n"
