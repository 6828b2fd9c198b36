"""Lets the partitions of a simulated, warp-specialised kernel take turns, in an order that a seed decides."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from .gluon_values import Hazard


class _Abandoned(BaseException):
    """Ends a partition after another one failed."""


@dataclass
class _Member:
    """One partition: what it waits for, if it does, and whether it has returned."""

    stuck: str | None = None
    done: bool = False


class Crew:
    """Partitions as threads of which one runs at a time; control changes hands at `pause` and `until` only."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.members: list[_Member] = []
        self.running = 0
        self.changed = threading.Condition()
        self.error: BaseException | None = None

    @property
    def current(self) -> int:
        """Number of the partition that runs; 0 outside of `run`."""
        return self.running

    def run(self, functions: list[Callable[[], None]]) -> None:
        """Run all to their ends.

        Raises:
            Hazard: all that have not returned wait.
        """
        self.members = [_Member() for _ in functions]
        threads = [threading.Thread(target=self._work, args=item, daemon=True) for item in enumerate(functions)]
        self.running = self.random.randrange(len(functions))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.members, self.running = [], 0
        if self.error is not None:
            raise self.error

    def _work(self, number: int, function: Callable[[], None]) -> None:
        try:
            self._await(number)
            function()
        except _Abandoned:
            return
        except BaseException as error:
            self._fail(error)
            return
        with self.changed:
            self.members[number].done = True
            try:
                self._hand_over()
            except Hazard as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def _await(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.running == number or self.error is not None)
            if self.error is not None:
                raise _Abandoned

    def _hand_over(self) -> None:
        able = [i for i, member in enumerate(self.members) if not member.done and member.stuck is None]
        if not able:
            stuck = [f"{i}: {member.stuck}" for i, member in enumerate(self.members) if not member.done]
            if stuck:
                raise Hazard("every partition waits: " + "; ".join(stuck))
            return
        self.running = self.random.choice(able)
        self.changed.notify_all()

    def pause(self) -> None:
        """Another partition may go on."""
        if self.members:
            number = self.running
            with self.changed:
                self._hand_over()
            self._await(number)

    def until(self, condition: Callable[[], bool], why: Callable[[], str]) -> None:
        """Let others go on until the condition holds.

        Raises:
            Hazard: it never will, for the reason that ``why`` tells.
        """
        self.pause()
        while not condition():
            if not self.members:
                raise Hazard(why())
            number = self.running
            with self.changed:
                self.members[number].stuck = why()
                self._hand_over()
            self._await(number)

    def wake(self) -> None:
        """Something happened: whoever waits looks again."""
        for member in self.members:
            member.stuck = None
