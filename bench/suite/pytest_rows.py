"""A pytest plugin that writes what became of every test, one JSON line each, as it happens: a run cut short keeps the rest.

`python -m pytest -p bench.suite.pytest_rows --outcomes FILE ...`. The first lines name the tests that were collected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, default=None, help="write one JSON line a test here, as it finishes")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # processes of pytest-xdist send theirs to the first
        config.pluginmanager.register(Outcomes(path), "outcomes")


class Outcomes:
    """Writes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")
        self.seen: set[str] = set()

    def line(self, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(fields, default=str) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.collected(ids)

    def pytest_collection_finish(self, session: Any) -> None:
        self.collected([item.nodeid for item in session.items])

    def collected(self, ids: list[str]) -> None:
        new = [name for name in ids if name not in self.seen]
        self.seen.update(new)
        if new:
            self.line(collected=new)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.line(id=report.nodeid, outcome="failed", why=str(report.longrepr)[-600:], seconds=0.0)
        elif report.skipped:
            self.line(id=report.nodeid, outcome="skipped", why=_skip_reason(report), seconds=0.0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = None
            if report.outcome == "skipped":
                why = _skip_reason(report)
            elif report.outcome == "failed":
                why = " ".join(str(report.longrepr).split())[-600:]
            guards = dict(report.user_properties).get("guards")
            seconds = round(report.duration, 3)
            self.line(id=report.nodeid, outcome=report.outcome, why=why, seconds=seconds, guards=guards)


def _skip_reason(report: Any) -> str:
    found = report.longrepr
    return str(found[2] if isinstance(found, tuple) else found)[-300:]
