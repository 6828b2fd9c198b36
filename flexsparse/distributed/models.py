"""Sequence parallelism for models that are wrapped, or built of `flexsparse.nn.VideoSelfAttention`.

Shape letters: B batch, L tokens of one rank, S tokens of all ranks, C channels.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flexsparse.distributed.around import Around
from flexsparse.distributed.builders import of_heads
from flexsparse.distributed.heads import Heads
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Segment, Segments, bounds, gather_tokens, own_part, parts, segments_of
from flexsparse.masks.combine import Combination, PerHead
from flexsparse.models import Joined, Leading, known
from flexsparse.wrap import state_of
from flexsparse.wrapped import Hook

Model = TypeVar("Model", bound=nn.Module)
Plan = Mapping[str, Any]


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

    def cut(self, x: Any, entry: Any) -> Any:
        """This rank's tokens of a tensor, or of each of several; one with other dimensions than planned is left whole."""
        if self.state.runs_dense() or entry is None:
            return x
        if isinstance(entry, Leading):
            return x if x is None else self.leading(x)
        if isinstance(x, tuple | list):
            entries = entry if isinstance(entry, Sequence) else [entry] * len(x)
            return type(x)(self.cut(one, its) for one, its in zip(x, entries, strict=True))
        if not isinstance(x, Tensor) or (entry.expected_dims is not None and x.dim() != entry.expected_dims):
            return x
        if isinstance(entry, Joined):
            count = self.count()
            text = x.shape[entry.split_dim] - count
            first, last = (text, 0) if self.text_first else (0, text)
            return own_part(x, self.segments(count, first, last), self.ranks.rank, entry.split_dim)
        count, video = x.shape[entry.split_dim], self.video()
        if not torch.compiler.is_compiling():
            self.tokens = count
        if video is not None and count != video:
            raise ValueError(
                f"the plan cuts dimension {entry.split_dim} of a tensor {tuple(x.shape)}, but the grid has {video} tokens: cut "
                "the video's tokens only; every rank holds all text"
            )
        return own_part(x, self.segments(count), self.ranks.rank, entry.split_dim)

    def count(self) -> int:
        """Video tokens of the forward that runs, is redone, or is being compiled."""
        return self.state.tokens if torch.compiler.is_compiling() else self.video() or self.tokens

    def segments(self, video: int, first: int = 0, last: int = 0) -> Segments:
        """Of a sequence of video tokens, with text before or after them."""
        return segments_of(first, Segment.of(video, self.ranks.size), last, "replicated")

    def video(self) -> int | None:
        """Video tokens of the forward that runs or is redone; None where that is not known yet, or seen by a compiler only."""
        if torch.compiler.is_compiling():
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
        return gather_tokens(x, self.segments(self.count()), self.ranks, entry.gather_dim)

    def register(self, module: nn.Module, entry: Any) -> None:
        """Hook one module of a plan."""
        if isinstance(entry, Mapping):
            inputs = {name: one for name, one in entry.items() if isinstance(name, str)}
            outputs = {index: one for index, one in entry.items() if isinstance(index, int)}
            names = list(inspect.signature(type(module).forward).parameters)[1:]  # an instance's own may hide them
            absent = [name for name, one in inputs.items() if name not in names]
            if any(not isinstance(inputs[name], Leading) for name in absent):
                raise ValueError(
                    f"the plan cuts {absent[0]!r} of {type(module).__name__}, whose forward takes {names}: mend plan="
                )
            places = {names.index(name): one for name, one in inputs.items() if name not in absent}
            if inputs:
                module.register_forward_pre_hook(_CutInputs(self, inputs, places), with_kwargs=True)
            if outputs:
                module.register_forward_hook(_CutOutputs(self, outputs))
            return
        module.register_forward_hook(_Join(self, list(entry) if isinstance(entry, Sequence) else [entry]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Cut:
        """A copied model's: the same ranks, the copy's state."""
        new = copy.copy(self)
        memo[id(self)] = new
        new.state = copy.deepcopy(self.state, memo)
        return new


class _CutInputs(Hook):
    """Cuts arguments of a forward: by name, and by place."""

    def __init__(self, cut: Cut, inputs: Mapping[str, Any], places: Mapping[int, Any]) -> None:
        self.cut, self.inputs, self.places = cut, inputs, places

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = {name: self.cut.cut(x, self.inputs[name]) if name in self.inputs else x for name, x in kwargs.items()}
        return tuple(self.cut.cut(x, self.places[i]) if i in self.places else x for i, x in enumerate(args)), new


class _CutOutputs(Hook):
    """Cuts some of what a forward returns."""

    def __init__(self, cut: Cut, outputs: Mapping[int, Any]) -> None:
        self.cut, self.outputs = cut, outputs

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        return _each(out, lambda i, x: self.cut.cut(x, self.outputs[i]) if i in self.outputs else x)


class _Join(Hook):
    """Puts what a forward returns together again."""

    def __init__(self, cut: Cut, joins: Sequence[Any]) -> None:
        self.cut, self.joins = cut, joins

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        return _each(out, lambda i, x: self.cut.join(x, self.joins[i]))


def _each(out: Any, function: Any) -> Any:
    if isinstance(out, Tensor):
        return function(0, out)
    return type(out)(function(index, x) for index, x in enumerate(out))


def ulysses(model: Model, mesh: DeviceMesh | None = None, plan: Plan | None = None) -> Model:
    """Run a wrapped model sequence parallel, in place: its tokens are spread over the ranks, its attention exchanges heads.

    `flexsparse.unwrap` ends it too (diffusers' own parallelism, where it was taken over, stays off).

    >>> # not run: needs 8 GPUs
    >>> model = fs.wrap(WanTransformer3DModel.from_pretrained(...), fs.VSA(sparsity=0.9), compile="regional")
    >>> fs.distributed.ulysses(model, init_device_mesh("cuda", (8,)))

    Every rank calls the model with the whole video and gets the whole output. Average the gradients over the ranks, as DDP
    and FSDP do.

    Args:
        model: a wrapped model.
        mesh: the ranks, a mesh of one dimension; None for that of diffusers' ``model.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=...))``, which this takes over.
        plan: where video tokens are cut and joined, as diffusers' ``_cp_plan``: module names to ``{argument name or output
            index: object with split_dim and expected_dims}``, or to an object with ``gather_dim``. By default what
            `models.KNOWN` says of the class, else its ``_cp_plan`` without what that says of text. Text stays whole.

    Returns:
        The model.

    Raises:
        ValueError: a model that is not wrapped, is sequence parallel already, or has other tokens that attend to the
            video's; no mesh; no plan; a plan that cuts text.
    """
    state = state_of(model)
    if state.backend.parallel is not None:
        raise ValueError(f"{type(model).__name__} is sequence parallel already: unwrap and wrap it first")
    watched_by = known(model).watched_by
    if plan is None and watched_by:
        raise ValueError(
            f"{type(model).__name__} cannot be cut by tokens: its {watched_by} attends to the video's, of which a rank would "
            "see its part alone; spread samples instead (DDP, FSDP), or give a plan= that sees to it"
        )
    plan = _plan_of(model) if plan is None else plan
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no _cp_plan that says where its tokens are cut and joined: give plan=, or call "
            "SequenceParallel.shard, attention and unshard in the model's own code"
        )
    text = sorted({name for entry in plan.values() if isinstance(entry, Mapping) for name in entry if _is_text(name)})
    if text:
        raise ValueError(f"the plan cuts {text[0]}, which is text: every rank holds all of it; leave it out of plan=")
    if mesh is None:
        mesh = _take_over(model)
    parallel = SequenceParallel(ulysses=mesh)
    _localize(state.backend, parallel)
    cut = Cut(parallel, state, known(model).text_at == "first")
    for name, entry in plan.items():
        for module in _named(model, name):
            cut.register(module, entry)
    state.backend.parallel = Around(parallel)
    return model


def _is_text(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("encoder_")  # as diffusers calls it


def _plan_of(model: nn.Module) -> Plan:
    """What the table says of a model's class, or the class itself: the latter's text stays whole here."""

    def without_text(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        return {name: one for name, one in entry.items() if not _is_text(name)}

    theirs = getattr(model, "_cp_plan", None) or {}
    return known(model).plan or {module: without_text(entry) for module, entry in theirs.items()}


def _take_over(model: nn.Module) -> DeviceMesh:
    """The mesh of diffusers' context parallelism, which is switched off: its attention would be recomputed dense."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        raise ValueError(
            f"mesh is None, and {type(model).__name__} has no context parallelism enabled: give a DeviceMesh"
        )
    if config.ring_degree > 1:
        raise ValueError(f"ring_degree is {config.ring_degree}: sparse attention takes ulysses_degree only")
    from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook

    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if isinstance(
                hook, ContextParallelSplitHook
            ):  # removing one would remove what was put over it: wrap's forward
                hook.metadata = {}
            elif isinstance(hook, ContextParallelGatherHook):
                hook.metadata = [None] * len(hook.metadata)  # type: ignore[assignment]
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = None  # type: ignore[union-attr]
    model._parallel_config = None  # type: ignore[assignment]
    return config._ulysses_mesh


def _localize(backend: Any, parallel: SequenceParallel) -> None:
    """Builders that say something of each head, for this rank's heads."""
    size, rank = parallel.ulysses.size, parallel.ulysses.rank

    def own(builder: Any) -> Any:
        if isinstance(builder, PerHead):
            heads = len(builder.heads)
            return of_heads(builder, *Heads(heads, heads, size).query(rank), heads)
        if isinstance(builder, Combination):
            return dataclasses.replace(builder, parts=tuple(own(part) for part in builder.parts))
        return builder

    rules = backend.rules
    swapped = {id(builder): own(builder) for builder in rules.builders}
    pairs = tuple((pattern, swapped.get(id(builder), builder)) for pattern, builder in rules.rules)
    backend.rules = dataclasses.replace(rules, rules=pairs, builders=tuple(swapped[id(b)] for b in rules.builders))


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    """Modules of a plan's name, in which ``*`` stands for every member of a list, and ``-1`` for the last one."""
    found = [model]
    for part in filter(None, name.split(".")):
        if part in ("*", "-1"):
            found = [child for module in found for child in list(module.children())[-1 if part == "-1" else 0 :]]
        else:
            found = [getattr(module, part) for module in found]
    return found
