"""The result file of a study: a header and rows, one a line; a row replaces the one that it is a newer version of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.header import header
from flexsparse.training.errors import RunError
from flexsparse.training.files import write_file

Row = dict[str, Any]
SUITE = "study"
KEYS: dict[str, tuple[str, ...]] = {
    "evaluation": ("run", "step"),
    "run": ("run",),
    "timing": ("size", "method"),
    "training_free": ("model", "method", "option", "layer", "level"),
    "training_free_loss": ("model", "method", "option"),
    "bsa_rule": ("model", "rule", "layer", "level"),
    "overlap": ("model", "method", "axis", "layer", "level"),
}
"""For each kind of row, what tells it from the others."""


def key(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return (row["kind"], *(row[name] for name in KEYS[row["kind"]]))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return value


class Results:
    """Rows on disk, written whole or not at all after each `put`.

    Args:
        path: the file; read if it exists.
        header: of a new file; of an old one, settings that shape numbers must agree.

    Raises:
        RunError: the file is no result file of a study, or was made under other conditions.
    """

    def __init__(self, path: Path, header: Row) -> None:
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.header = {"suite": SUITE, **header}
        if path.exists():
            found, rows = load(path)
            for name in ("preset", "data", "device", "gpu", "cpu", "torch", "threads", "compiled", "bf16"):
                if (found.get(name) or None) != (self.header.get(name) or None):
                    raise RunError(
                        f"--out {str(path.parent)!r} holds results with {name} {found.get(name)!r}, and now it is "
                        f"{self.header.get(name)!r}: rows of both cannot be compared; pass another --out"
                    )
            self.header = found | {"continued": self._dates(found)}
            self.rows = {key(row): row for row in rows}

    def _dates(self, found: Row) -> list[Any]:
        now = [self.header.get("date"), self.header.get("git_revision")]
        return [*found.get("continued", []), now]

    def put(self, *rows: Row) -> None:
        """Add rows, or newer versions of them, and write the file.

        Raises:
            RunError: it cannot be written; what it held before is untouched.
        """
        self.rows |= {key(row): _short(row) for row in rows}
        lines = [json.dumps(row) for row in self.rows.values()]
        text = '{"header": ' + json.dumps(self.header, indent=1) + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"
        write_file(self.path, text.encode())

    def of(self, kind: str) -> list[Row]:
        """Rows of a kind, in the order in which they were first put."""
        return [row for row in self.rows.values() if row["kind"] == kind]

    def drop(self, run: str) -> None:
        """Forget what is on file of a run that starts afresh."""
        self.rows = {name: row for name, row in self.rows.items() if row.get("run") != run}


def load(path: Path) -> tuple[Row, list[Row]]:
    """Header and rows of a file.

    Raises:
        RunError: no result file of a study.
    """
    try:
        found = json.loads(path.read_text())
        if found["header"]["suite"] != SUITE:
            raise ValueError(f"suite {found['header']['suite']!r} instead of {SUITE!r}")
        rows = found["rows"]
        for row in rows:
            key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{str(path)!r} is no result file of a study ({type(error).__name__}: {error}): move it away"
        ) from error
    return found["header"], rows


def describe(*, preset: str, data: str, device: str, threads: int, compiled: bool, **more: Any) -> Row:
    """The header of a file: machine, versions, revision, and what shapes the numbers."""
    import torch

    made = header(threads, preset=preset, data=data, device=device, compiled=compiled, **more)
    if device == "cuda":
        made["gpu"] = torch.cuda.get_device_name()
        made["cudnn"] = torch.backends.cudnn.version()
    return made
