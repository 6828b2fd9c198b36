"""What `bench.kernels --keep` leaves: rows by version of Triton in results/kernels.json, and the table of bench/README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from bench.header import ROOT, header
from bench.marks import replaced
from bench.offline import Row

RESULTS = ROOT / "bench" / "results" / "kernels.json"
PAGE = ROOT / "bench" / "README.md"
BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each version of Triton: how many configurations, and which spill or wait where they should not."""
    lines = ["| triton | configurations | spill | of them, most bytes | serialised wgmma |", "|---|---|---|---|---|"]
    for version in sorted({row["triton"] for row in rows}, key=Version):
        own = [row for row in rows if row["triton"] == version]
        spilled = [row for row in own if row["spill_bytes"]]
        kernels = ", ".join(f"`{name}`" for name in sorted({row["kernel"] for row in spilled}))
        cells = [version, len(own), f"{len(spilled)}: {kernels}" if spilled else "none"]
        cells += [max(row["spill_bytes"] for row in spilled) if spilled else ""]
        cells += [sum(row["serialized"] for row in own) or "none"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def keep(rows: Sequence[Row], results: Path = RESULTS, page: Path = PAGE) -> None:
    """Rows of one version of Triton take the place of those of that version, and the table is made anew.

    Args:
        rows: all that `auto` may choose, for sm_90a.
        results: a result file, which need not be there.
        page: a page with the table's two marks.
    """
    old = json.loads(results.read_text()) if results.is_file() else {"header": {"runs": {}}, "rows": []}
    version = rows[0]["triton"]
    run = header(0)
    runs = {**old["header"]["runs"], version: {name: run[name] for name in ("git_revision", "git_dirty", "date")}}
    what = {
        "compiled_for": "sm_90a",
        "gpu": None,
        "driver": None,
        "command": "python -m bench.kernels --offline --keep",
    }
    kept = [*(row for row in old["rows"] if row["triton"] != version), *rows]
    lines = ",\n".join(json.dumps(row) for row in kept)
    results.write_text(f'{{"header": {json.dumps({**what, "runs": runs}, indent=1)},\n"rows": [\n{lines}\n]}}\n')
    page.write_text(replaced(page.read_text(), table(kept), BEGIN, END))
