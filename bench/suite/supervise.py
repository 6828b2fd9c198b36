"""A process that may crash or hang, run again without what it died of. Kernels that never ran before do both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOST = 75
"""Exit code of a process whose GPU answers no more."""
POLL = 0.25
START = 120.0
"""Seconds in which a process must say its first word: importing, initialising."""
MARGIN = 20.0
"""Seconds past the end in which a step that began in time may end."""
LATE = f"it was still running {MARGIN:.0f} s after the time was over"
"""How a process ended that was slow, not wrong: what it was at is not left out the next time."""
REFUSED = 2
"""Exit code of a process that was asked for what it cannot do: it would say so again."""


@dataclass
class State:
    """What a supervisor and its process tell each other, in one file.

    Attributes:
        until: when the time is over.
        skip: what to leave out: case, contender, and how the process died of it.
        case: what runs now.
        contender: likewise.
        limit: seconds that it may take.
        since: when it began.
    """

    until: float
    skip: list[list[str]] = field(default_factory=list)
    case: str = ""
    contender: str = ""
    limit: float = START
    since: float = field(default_factory=time.time)

    def write(self, path: Path) -> None:
        """Replace the file."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(vars(self)))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> State:
        """From the file."""
        return cls(**json.loads(path.read_text()))

    @property
    def skipped(self) -> dict[tuple[str, str], str]:
        """By case and contender."""
        return {(case, contender): how for case, contender, how in self.skip}


def beats(path: Path) -> Callable[[str, str, float], None]:
    """What the supervised process calls when something begins."""
    state = State.read(path)

    def beat(case: str, contender: str, limit: float) -> None:
        state.case, state.contender, state.limit, state.since = case, contender, limit, time.time()
        state.write(path)

    return beat


def kill(process: subprocess.Popen[Any], patience: float = 20.0) -> None:
    """End a process that leads its own group, and what it started; one that a driver holds back is not waited for longer."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)


def watch(command: Sequence[str], path: Path, **options: Any) -> tuple[int, str | None]:
    """Run a process; its exit code, and how it died, None where it ended by itself."""
    process = subprocess.Popen(list(command), start_new_session=True, **options)
    try:
        while process.poll() is None:
            time.sleep(POLL)
            state = State.read(path)
            if time.time() - state.since > state.limit:
                return -1, f"it hung: nothing for {state.limit:.0f} s"
            if time.time() > state.until + MARGIN:
                return -1, LATE
    finally:
        kill(process)
    code = process.returncode
    if code == LOST:
        return code, "the GPU answered no more (an illegal access, or the like)"
    if code in (0, REFUSED):
        return code, None
    return code, f"the process died of signal {-code}" if code < 0 else f"the process ended with code {code}"


def supervise(
    command: Sequence[str],
    path: Path,
    until: float,
    restarts: int = 6,
    skip: list[list[str]] | None = None,
    **options: Any,
) -> int:
    """Run a process until it ends by itself, each time without what it died of before; its exit code.

    Args:
        command: the process.
        path: the file of the state; what is left out in the end stands there.
        until: when the time is over.
        restarts: at most.
        skip: what an earlier process died of.
        **options: of `subprocess.Popen`.
    """
    state = State(until=until, skip=skip or [])
    for _ in range(restarts + 1):
        state.write(path)
        code, died = watch(command, path, **options)
        if died is None:
            return code
        ended = State.read(path)
        print(f"{died}: {ended.case or 'before the first case'} {ended.contender}", flush=True)
        if died == LATE:
            return 0
        if not ended.case:
            return max(code, 1)
        state = State(until=until, skip=[*state.skip, [ended.case, ended.contender, died]])
        if time.time() > until:
            state.write(path)
            return 1
    print(f"given up after {restarts} restarts", flush=True)
    return 1
