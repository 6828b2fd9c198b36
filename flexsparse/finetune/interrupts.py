"""SIGINT and SIGTERM: a run finishes its step, saves, and ends."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context manager that remembers a signal; a second SIGINT ends the program at once.

    Outside of the main thread, where Python cannot listen to signals, it does nothing.

    Attributes:
        signal: number of the signal that came; None before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._came) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        print(
            "\nstopping after this step, and saving (Ctrl-C again: at once, without saving)",
            file=sys.stderr,
            flush=True,
        )
