"""Sequence parallelism for models that are wrapped, or built of `flexsparse.nn.VideoSelfAttention`.

Shape letters: B batch, L tokens of one rank, S tokens of all ranks, C channels.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flexsparse.distributed.around import Around
from flexsparse.distributed.builders import of_heads
from flexsparse.distributed.heads import Heads
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import gather_tokens, own_part, parts, segments_of
from flexsparse.masks.combine import Combination, PerHead
from flexsparse.wrap import state_of

Model = TypeVar("Model", bound=nn.Module)
Plan = Mapping[str, Any]


class Cut:
    """Hooks that cut a sequence of tokens into the ranks' parts and put it together again.

    Args:
        parallel: how they are spread.
        state: of the wrapped model; while it runs dense, nothing is cut, and every rank computes all.

    Attributes:
        tokens: S of the forward that is running; what the last cut saw.
    """

    def __init__(self, parallel: SequenceParallel, state: Any) -> None:
        self.ranks, self.state = parallel.ulysses, state
        self.tokens = 0

    def cut(self, x: Any, entry: Any) -> Any:
        """This rank's tokens of a tensor; as it is where it has other dimensions than the plan expects."""
        if (
            self.state.dense
            or not isinstance(x, Tensor)
            or (entry.expected_dims is not None and x.dim() != entry.expected_dims)
        ):
            return x
        self.tokens = x.shape[entry.split_dim]
        segments = segments_of(0, parts(self.tokens, self.ranks.size), 0, "replicated")
        return own_part(x, segments, self.ranks.rank, entry.split_dim)

    def join(self, x: Any, entry: Any) -> Any:
        """All tokens."""
        if self.state.dense or entry is None or not isinstance(x, Tensor):
            return x
        segments = segments_of(0, parts(self.tokens, self.ranks.size), 0, "replicated")
        return gather_tokens(x, segments, self.ranks, entry.gather_dim)

    def register(self, module: nn.Module, entry: Any) -> None:
        """Hook one module of a plan."""
        if isinstance(entry, Mapping):
            inputs = {name: one for name, one in entry.items() if isinstance(name, str)}
            outputs = {index: one for index, one in entry.items() if isinstance(index, int)}
            names = list(inspect.signature(type(module).forward).parameters)[1:]  # an instance's own may hide them
            places = {names.index(name): one for name, one in inputs.items()}

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                new = {name: self.cut(x, inputs[name]) if name in inputs else x for name, x in kwargs.items()}
                return tuple(self.cut(x, places[i]) if i in places else x for i, x in enumerate(args)), new

            if inputs:
                module.register_forward_pre_hook(before, with_kwargs=True)
            if outputs:
                module.register_forward_hook(
                    lambda module, args, out: _each(out, lambda i, x: self.cut(x, outputs[i]) if i in outputs else x)
                )
            return
        joins = list(entry) if isinstance(entry, Sequence) else [entry]
        module.register_forward_hook(lambda module, args, out: _each(out, lambda i, x: self.join(x, joins[i])))


def _each(out: Any, function: Any) -> Any:
    if isinstance(out, Tensor):
        return function(0, out)
    return type(out)(function(index, x) for index, x in enumerate(out))


def ulysses(model: Model, mesh: DeviceMesh | None = None, plan: Plan | None = None) -> Model:
    """Run a wrapped model sequence parallel, in place: its tokens are spread over the ranks, its attention exchanges heads.

    >>> # not run: needs 8 GPUs
    >>> model = fs.wrap(WanTransformer3DModel.from_pretrained(...), fs.VSA(sparsity=0.9), compile="regional")
    >>> fs.distributed.ulysses(model, init_device_mesh("cuda", (8,)))

    Every rank calls the model with the whole video and gets the whole output. Average the gradients over the ranks, as DDP
    and FSDP do.

    Args:
        model: a wrapped model.
        mesh: the ranks, a mesh of one dimension; None for that of diffusers' ``model.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=...))``, which this takes over.
        plan: where tokens are cut and joined, as diffusers' ``_cp_plan``, which is the default: module names to ``{argument
            name or output index: object with split_dim and expected_dims}``, or to an object with ``gather_dim``.

    Returns:
        The model.

    Raises:
        ValueError: a model that is not wrapped, or is sequence parallel already; no mesh; no plan; a plan for text tokens that
            join the video in attention.
    """
    state = state_of(model)
    if state.backend.parallel is not None:
        raise ValueError(f"{type(model).__name__} is sequence parallel already: unwrap and wrap it first")
    plan = getattr(model, "_cp_plan", None) if plan is None else plan
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no _cp_plan that says where its tokens are cut and joined: give plan=, or call "
            "SequenceParallel.shard, attention and unshard in the model's own code"
        )
    if state.reader.text.arguments:
        raise ValueError(
            f"{type(model).__name__} joins text with the video in attention, which ulysses(model) does not cut: call "
            "SequenceParallel.attention in the model's own code"
        )
    if mesh is None:
        mesh = _take_over(model)
    parallel = SequenceParallel(ulysses=mesh)
    _localize(state.backend, parallel)
    cut = Cut(parallel, state)
    for name, entry in plan.items():
        for module in _named(model, name):
            cut.register(module, entry)
    state.options["dynamic"] = False  # the ranks' parts are numbers of the graph
    state.backend.parallel = Around(parallel)
    return model


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
    """Modules of a plan's name, in which ``*`` stands for every member of a list."""
    found = [model]
    for part in filter(None, name.split(".")):
        found = [child for module in found for child in (module.children() if part == "*" else [getattr(module, part)])]
    return found
