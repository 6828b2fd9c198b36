"""Progress of the trainings: bars with an ETA on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainingProgress:
    """A context manager that shows how far each method's training is.

    Args:
        console: where to show it; a console that is no terminal gets one plain line every `lines_every`
        steps. methods: names, one bar each.
        steps: steps of each training.
        done: steps done before, by a run that is resumed.
        lines_every: steps between plain lines.
    """

    def __init__(self, console: Console, methods: tuple[str, ...], *, steps: int, done: int, lines_every: int) -> None:
        self._console, self._steps, self._first, self._lines_every = console, steps, done, lines_every
        self._started: float | None = None
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._losses: dict[str, str] = dict.fromkeys(methods, "")
        if console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:>6}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            for method in methods:
                self._tasks[method] = self._bars.add_task(method, total=steps, completed=done, note="compiling")

    def __enter__(self) -> "TrainingProgress":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def compiling(self, method: str) -> None:
        """Says that a method's first step, which compiles, begins."""
        if self._bars:
            self._bars.update(self._tasks[method], note="compiling")
        else:
            self._console.print(f"{method}: compiling, first step ...", highlight=False)

    def stepped(self, method: str, loss: float) -> None:
        """Records one finished step of one method."""
        self._losses[method] = f"{method} {loss:.4f}"
        if self._bars:
            self._bars.update(self._tasks[method], advance=1, note=f"loss {loss:.4f}")

    def step_done(self, step: int) -> None:
        """Records that all methods finished step number `step` (counted from 1)."""
        now = time.monotonic()
        if self._started is None:
            self._started, self._first = now, step  # the first step compiles, it says nothing about the rest
        if self._bars or (step % self._lines_every and step != self._steps):
            return
        done = step - self._first
        eta = f"ETA {_clock((now - self._started) / done * (self._steps - step))}" if done else ""
        self._console.print(
            f"step {step}/{self._steps}  loss: {', '.join(self._losses.values())}  {eta}".rstrip(),
            highlight=False,
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def make_console(file: TextIO | None = None) -> Console:
    """A console for terminal or pipe; a pipe gets wide lines, so that none is broken."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=200)
