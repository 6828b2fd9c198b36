"""What is kept of kernels that were compiled: rows by version of Triton, and the table that says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import kernel_results, kernels


def row(version: str, kernel: str = "_dq", spilled: int = 0, serialized: bool = False) -> dict[str, Any]:
    return {"kernel": kernel, "triton": version, "spill_bytes": spilled, "serialized": serialized}


def test_the_page_holds_the_table_of_the_file() -> None:
    rows = json.loads(kernel_results.RESULTS.read_text())["rows"]
    block = f"{kernel_results.BEGIN}\n{kernel_results.table(rows)}\n{kernel_results.END}"
    assert block in kernel_results.PAGE.read_text()
    assert len({row["triton"] for row in rows}) >= 2


def test_a_line_for_each_version_in_their_order() -> None:
    rows = [row("3.10.0", spilled=8), row("3.10.0", "_forward", 16), row("3.10.0", serialized=True), row("3.9.1")]
    assert kernel_results.table(rows).splitlines()[2:] == [
        "| 3.9.1 | 1 | none |  | none |",
        "| 3.10.0 | 3 | 2: `_dq`, `_forward` | 16 | 1 |",
    ]


def test_rows_of_other_versions_stay(tmp_path: Path) -> None:
    results, page = tmp_path / "kernels.json", tmp_path / "page.md"
    page.write_text(f"before\n{kernel_results.BEGIN}\nold\n{kernel_results.END}\nafter\n")
    for rows in ([row("3.6.0", spilled=8)], [row("3.7.1")], [row("3.6.0"), row("3.6.0", "_forward")]):
        kernel_results.keep(rows, results, page)
    file = json.loads(results.read_text())
    assert file["rows"] == [row("3.7.1"), row("3.6.0"), row("3.6.0", "_forward")]
    assert set(file["header"]["runs"]) == {"3.6.0", "3.7.1"}
    assert set(file["header"]["runs"]["3.6.0"]) == {"git_revision", "git_dirty", "date"}
    text = page.read_text()
    assert "old" not in text and kernel_results.table(file["rows"]) in text
    assert text.startswith("before\n") and text.endswith("after\n")


@pytest.mark.parametrize("more", [["--only", "_dq"], ["--long-tail"], ["--arch", "sm_80"]])
def test_a_part_is_not_kept(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(["--offline", "--keep", *more])
    assert "leave out --only, --long-tail and --arch" in capsys.readouterr().err


def test_nothing_is_kept_where_some_do_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version would have looked the better for it."""
    kept: list[Any] = []
    monkeypatch.setattr(kernels, "table", str)
    monkeypatch.setattr(kernel_results, "keep", kept.append)
    for findings, times in ([], 1), (["_dq: spills 8 bytes"], 2), (["_dq: does not compile: why"], 2):
        monkeypatch.setattr(kernels.offline, "report", lambda *_, found=findings: ([row("3.9.0")], found))
        assert kernels.main(["--offline", "--keep"]) == bool(findings)
        assert len(kept) == times
    assert "nothing is kept" in capsys.readouterr().err
