"""A pytest plugin that writes what became of every test, one JSON line each, as it happens: a run cut short keeps the rest.

`python -m pytest -p bench.suite.pytest_rows --outcomes FILE ...`. The first lines name the tests that were
collected, and a line says when one starts.
FILE.guards says what each test guards: of one that takes its process with it, nobody else can tell.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, default=None, help="write one JSON line a test here, as it finishes")
    parser.addoption("--first", action="store_true", help="of tests/gpu only what guards what is measured first")
    parser.addoption("--done", type=Path, default=None, help="a JSON list of tests that are not run again")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    path = config.getoption("--done")
    if path is not None:
        done = set(json.loads(path.read_text()))
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_configure(config: Any) -> None:
    path = config.getoption("--outcomes")
    if path is None:
        return
    worker = getattr(config, "workerinput", None)
    if worker is None:  # processes of pytest-xdist send their outcomes to the first
        config.pluginmanager.register(Outcomes(path), "outcomes")
    if worker is None or worker["workerid"] == "gw0":  # all of them collect the same tests, and the first collects none
        config.pluginmanager.register(Guards(guards_path(Path(path))), "guards")


def guards_path(outcomes: Path) -> Path:
    """Where `Guards` writes."""
    return outcomes.with_name(outcomes.name + ".guards")


class Guards:
    """Writes what each test guards, by its id, before any runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collection_finish(self, session: Any) -> None:
        self.path.write_text(json.dumps({item.nodeid: guards_of(item.user_properties) for item in session.items}))


def guards_of(properties: Any) -> Any:
    """What a test's properties say that it guards; None where they say nothing."""
    return dict(properties).get("guards")


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

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.line(started=nodeid, at=time.time())

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
            guards, seconds = guards_of(report.user_properties), round(report.duration, 3)
            self.line(id=report.nodeid, outcome=report.outcome, why=why, seconds=seconds, guards=guards)


def _skip_reason(report: Any) -> str:
    found = report.longrepr
    return str(found[2] if isinstance(found, tuple) else found)[-300:]
