"""Hooks that cut a model's tokens into the ranks' parts, and put them together again.

Shape letters: B batch, L tokens of one rank, S tokens of all ranks, C channels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.compile_passes import marks
from flexsparse.crossing import NO_TOKENS
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Segment, Segments, bounds, gather_tokens, own_part, parts, segments_of
from flexsparse.forwards import Hook
from flexsparse.models import Joined, Leading
from flexsparse.tables import is_compiling


class Cut:
    """Hooks that cut a sequence of tokens into the ranks' parts and put it together again.

    Only the video's tokens are cut: text is whole on every rank.

    Args:
        parallel: how they are spread.
        state: of the wrapped model; while it runs dense, nothing is cut, and every rank computes all.
        text_first: whether text comes before the video where they are joined.

    Attributes:
        tokens: video tokens of the forward that is running uncompiled; what the last cut saw.
    """

    def __init__(self, parallel: SequenceParallel, state: Any, text_first: bool) -> None:
        self.ranks, self.state, self.text_first = parallel.ulysses, state, text_first
        self.tokens = 0

    def cut(self, x: Any, entry: Any, name: str = "") -> Any:
        """This rank's tokens of a tensor, or of each of several; one with other dimensions than planned is left whole.

        Args:
            x: the tensor.
            entry: of the plan.
            name: of what it is: one of tokens says that from now on tokens are cut, a table of positions does not.
        """
        if self.state.runs_dense() or entry is None:
            return x
        if isinstance(entry, Leading):
            return x if x is None else self.leading(x)
        if isinstance(x, tuple | list):
            entries = entry if isinstance(entry, Sequence) else [entry] * len(x)
            return type(x)(self.cut(one, its, name) for one, its in zip(x, entries, strict=True))
        if not isinstance(x, Tensor) or (entry.expected_dims is not None and x.dim() != entry.expected_dims):
            return x
        if isinstance(entry, Joined):
            count = self.count()
            text = x.shape[entry.split_dim] - count
            first, last = (text, 0) if self.text_first else (0, text)
            return own_part(x, self.segments(count, first, last), self.ranks.rank, entry.split_dim)
        count, video = x.shape[entry.split_dim], self.video()
        if not is_compiling():
            self.tokens = count
        if video is not None and count != video:
            raise ValueError(
                f"the plan cuts dimension {entry.split_dim} of a tensor {tuple(x.shape)}, but the grid has {video} tokens: cut "
                "the video's tokens only; every rank holds all text"
            )
        own = own_part(x, self.segments(count), self.ranks.rank, entry.split_dim)
        return own if NO_TOKENS.search(name) else self.says(own, True)

    def says(self, x: Tensor, cut: bool) -> Tensor:
        """Notes that tokens are cut from now on, or whole again; a graph is told by what is returned."""
        if is_compiling():
            return marks.CUT(x, cut)
        redone = torch._C._current_graph_task_id() != -1  # in a backward, of a block that knows nothing of the others
        if not redone:
            self.state.interceptor.local.cut = cut
        return x

    def count(self) -> int:
        """Video tokens of the forward that runs, is redone, or is being compiled."""
        return self.state.tokens if is_compiling() else self.video() or self.tokens

    def segments(self, video: int, first: int = 0, last: int = 0) -> Segments:
        """Of a sequence of video tokens, with text before or after them."""
        return segments_of(first, Segment.of(video, self.ranks.size), last, "replicated")

    def video(self) -> int | None:
        """Video tokens of the forward that runs or is redone; None where that is not known yet, or seen by a compiler only."""
        if is_compiling():
            return None
        grid = self.state.interceptor.known_grid()
        return None if grid is None else grid[0] * grid[1] * grid[2]

    def leading(self, count: int) -> int:
        """How many of the first ``count`` video tokens this rank holds."""
        start, end = bounds(parts(self.count(), self.ranks.size), self.ranks.rank)
        return min(max(count - start, 0), end - start)

    def join(self, x: Any, entry: Any) -> Any:
        """All tokens."""
        if self.state.runs_dense() or entry is None or not isinstance(x, Tensor):
            return x
        return self.says(gather_tokens(x, self.segments(self.count()), self.ranks, entry.gather_dim), False)

    def hooks(self, module: nn.Module, name: str, entry: Any) -> tuple[list[Any], list[Any]]:
        """What a module of a plan gets: hooks of its arguments, and of what it returns. Changes nothing.

        Raises:
            ValueError: an entry that is none, or names an argument that the module's forward does not take.
        """
        if not isinstance(entry, Mapping):
            joins = list(entry) if isinstance(entry, Sequence) else [entry]
            if not joins or not all(one is None or hasattr(one, "gather_dim") for one in joins):
                raise _no_entry(name, entry)
            return [], [_Join(self, joins)]
        for one in entry.items():
            if not isinstance(one[0], str | int) or not _cuts(one[1]):
                raise _no_entry(name, dict([one]))
        inputs = {key: one for key, one in entry.items() if isinstance(key, str)}
        outputs = {key: one for key, one in entry.items() if isinstance(key, int)}
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # an instance's own may hide them
        absent = [key for key in inputs if key not in names]
        if any(not isinstance(inputs[key], Leading) for key in absent):
            raise ValueError(
                f"the plan cuts {absent[0]!r} of {type(module).__name__}, whose forward takes {names}: mend plan="
            )
        places = {names.index(key): key for key in inputs if key not in absent}
        before: list[Any] = [_CutInputs(self, inputs, places)] if inputs else []
        return before, [_CutOutputs(self, outputs, name)] if outputs else []

    def __deepcopy__(self, memo: dict[int, Any]) -> Cut:
        """A copied model's: the same ranks, the copy's state."""
        new = copy.copy(self)
        memo[id(self)] = new
        new.state = copy.deepcopy(self.state, memo)
        return new


class _CutInputs(Hook):
    """Cuts arguments of a forward: by name, and by place."""

    def __init__(self, cut: Cut, inputs: Mapping[str, Any], places: Mapping[int, str]) -> None:
        self.cut, self.inputs, self.places = cut, inputs, places

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = {name: self.one(x, name) if name in self.inputs else x for name, x in kwargs.items()}
        return tuple(self.one(x, self.places[i]) if i in self.places else x for i, x in enumerate(args)), new

    def one(self, x: Any, name: str) -> Any:
        """An argument of the plan."""
        return self.cut.cut(x, self.inputs[name], name)


class _CutOutputs(Hook):
    """Cuts some of what the forward of a module of that name returns."""

    def __init__(self, cut: Cut, outputs: Mapping[int, Any], name: str) -> None:
        self.cut, self.outputs, self.name = cut, outputs, name

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        return _each(out, lambda i, x: self.cut.cut(x, self.outputs[i], self.name) if i in self.outputs else x)


class _Join(Hook):
    """Puts what a forward returns together again."""

    def __init__(self, cut: Cut, joins: Sequence[Any]) -> None:
        self.cut, self.joins = cut, joins

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        return _each(out, lambda i, x: self.cut.join(x, self.joins[i]))


class Ends:
    """What a plan says of the model itself: within its forward, where the grid is known, which hooks would not know yet."""

    def __init__(self, before: Sequence[Any], after: Sequence[Any]) -> None:
        self.before, self.after = list(before), list(after)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """This rank's arguments."""
        for hook in self.before:
            args, kwargs = hook(module, args, kwargs)
        return args, kwargs

    def leave(self, module: nn.Module, out: Any) -> Any:
        """What the model returns."""
        for hook in self.after:
            out = hook(module, (), out)
        return out


def _each(out: Any, function: Any) -> Any:
    """What a forward returned, a tensor or several, with a function of index and value applied to each."""
    if isinstance(out, Tensor):
        return function(0, out)
    if not isinstance(out, tuple | list):
        raise TypeError(
            f"a module of the plan returned {type(out).__name__}, where a tensor, a tuple or a list was expected: name a "
            "module in plan= that returns one, such as the last linear map"
        )
    new = [function(index, x) for index, x in enumerate(out)]
    return type(out)._make(new) if hasattr(out, "_make") else type(out)(new)


def _cuts(entry: Any) -> bool:
    """Whether a plan's entry says how a tensor, or each of several, is cut."""
    if isinstance(entry, tuple | list):
        return all(map(_cuts, entry))
    return (
        entry is None or isinstance(entry, Leading) or (hasattr(entry, "split_dim") and hasattr(entry, "expected_dims"))
    )


def _no_entry(name: str, entry: Any) -> ValueError:
    return ValueError(
        f"plan= says {entry!r} of {name or 'the model'!r}: give {{argument name or output index: object with split_dim and "
        "expected_dims}, or an object with gather_dim, as diffusers' _cp_plan does"
    )
