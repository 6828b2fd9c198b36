"""What ran: so that a forward in which nothing was sparse can be told from one that ran no attention."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Ran(NamedTuple):
    """What ran: sparse calls, of graphs too; and others: modules and regions that had some before, and dense calls that are
    neither cross-attention nor dense by the builders."""

    sparse: int
    others: int


class Tally(threading.local):
    """Counts what a thread ran."""

    def __init__(self) -> None:
        self.sparse = self.others = 0

    def __reduce__(self) -> Any:
        return Tally, ()  # a copied or pickled backend counts anew

    def snapshot(self) -> Ran:
        """What was counted so far."""
        return Ran(self.sparse, self.others)

    def since(self, before: Ran) -> Ran:
        """What was counted since."""
        return Ran(self.sparse - before.sparse, self.others - before.others)

    def counting(self, compiled: Callable[..., Any], matches: int) -> Callable[..., Any]:
        """A compiled graph that adds its sparse calls whenever it runs."""

        def run(*args: Any) -> Any:
            self.sparse += matches
            return compiled(*args)

        return run
