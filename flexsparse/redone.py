"""Of which forward a block is that backward runs again, as activation checkpointing does.

A checkpoint keeps what its block was given, and gives it to the block again. So what modules are given during a forward says
of which forward they are: the tensor's storage is alive for as long as it can be asked about, and no other tensor has it.
Where a checkpoint gives other tensors, as it moved them to the CPU in between, or as a function computes them that is no
module, the backward itself tells: the gradient of what a module returned comes right before what it computed is redone.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from flexsparse.grids import Geometry
from flexsparse.tables import is_compiling

Key = tuple[StorageWeakRef, int | torch.SymInt, torch.Size]
FEW, MOST = 256, 16384
"""Of what was given: more are looked through less often, and the oldest dropped. Slices of a tensor that stays never go."""


@dataclasses.dataclass(frozen=True)
class Forward:
    """A forward.

    Attributes:
        grid: its geometry.
        values: of the schedules that hold for it.
    """

    grid: Geometry
    values: tuple[float, ...]


class Redone:
    """The forwards that backward may redo parts of."""

    def __init__(self) -> None:
        self.given: dict[Key, Forward | None] = {}
        """What modules were given, to the forward it was given in; None where that were several."""
        self.models: dict[Key, Forward] = {}
        """What the model was called with last, to that forward."""
        self.tasks: dict[int, Forward] = {}
        """A backward that runs, to the forward that it redoes now."""
        self.room = 0

    def note(self, ran: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module was given this during a forward."""
        for key in _keys(args, kwargs):
            before = self.given.setdefault(key, ran)
            if before is not ran and before != ran:
                self.given[key] = None  # a table of positions, or one video on two grids

    def note_whole(self, ran: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model was called with this; what it gets in a backward is what it got in the forward that is redone."""
        self.models |= dict.fromkeys(_keys(args, kwargs), ran)

    def find_whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Forward | None:
        """The forward that a call of the model repeats, where backward redoes the whole of it; None where that is not known."""
        found = {ran for key in _keys(args, kwargs) if (ran := self.models.get(key)) is not None}
        return found.pop() if len(found) == 1 else None

    def forget(self) -> None:
        """Drop what is there no more."""
        if len(self.given) + len(self.models) < self.room:
            return
        for given in (self.given, self.models):
            for key in list(given):
                if key[0].expired():
                    given.pop(key, None)
            for key in list(given)[: max(0, len(given) - MOST)]:
                given.pop(key, None)
        left = len(self.given) + len(self.models)
        self.room = 2 * left if left > FEW else 0

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module is called outside of every forward: if backward redoes it, from now on its forward is the current one."""
        if torch._C._current_graph_task_id() == -1:
            return
        found = {ran for key in _keys(args, kwargs) if (ran := self.given.get(key)) is not None}
        if len(found) == 1:
            self.begin(found.pop())

    def begin(self, ran: Forward, _: Any = None) -> None:
        """Backward is about to redo parts of a forward. Also the hook of a tensor, whose gradient is of no interest."""
        if is_compiling() or (task := torch._C._current_graph_task_id()) == -1:  # compiled autograd, which says nothing
            return
        if task not in self.tasks:
            end = _End(self.tasks, task)
            # a backward that fails is never called back
            weakref.finalize(end, end.tasks.pop, task, None).atexit = False
            torch.autograd.Variable._execution_engine.queue_callback(end)
        self.tasks[task] = ran

    def tell(self, out: Any, ran: Forward) -> None:
        """A module, or the model, returned this in a forward: where its gradient comes, parts of that forward may be redone.

        By hooks, and not by a node of a class of its own: what such a node returns may not be written in place.
        """
        for x in torch.utils._pytree.tree_leaves(out):
            if dataclasses.is_dataclass(x) and not isinstance(x, type):  # one that torch does not know
                for entry in dataclasses.fields(x):
                    self.tell(getattr(x, entry.name), ran)
            elif isinstance(x, Tensor) and x.grad_fn is not None and torch.is_grad_enabled():
                x.register_hook(functools.partial(self.begin, ran))

    def current(self) -> Forward | None:
        """The forward that backward redoes; None outside of backward, and where it is not known."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        if task in self.tasks:
            return self.tasks[task]
        # a reentrant checkpoint inside of another one is a backward within a backward
        above = set(self.tasks.copy().values())
        return above.pop() if len(above) == 1 else None


@dataclasses.dataclass(eq=False)
class _End:
    """What a backward calls at its end, and lets go of, however it ends."""

    tasks: dict[int, Forward]
    task: int

    def __call__(self) -> None:
        self.tasks.pop(self.task, None)


def _keys(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Key]:
    for value in (*args, *kwargs.values()):
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor) and torch._C._has_storage(x):
                yield StorageWeakRef(x.untyped_storage()), x.storage_offset(), x.shape
