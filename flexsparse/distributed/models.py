"""Sequence parallelism for models that are wrapped."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from flexsparse.distributed.around import Around
from flexsparse.distributed.builders import of_heads
from flexsparse.distributed.cuts import Cut, Ends
from flexsparse.distributed.heads import Heads, too_few_heads
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.masks.combine import Combination, PerHead
from flexsparse.models import known
from flexsparse.tally import Tally
from flexsparse.wrap import state_of

Model = TypeVar("Model", bound=nn.Module)
Plan = Mapping[str, Any]


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
            video's; no mesh; more ranks than heads; no plan; a plan that cuts text, or names what the model does not have.
            Nothing is changed then.
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
    theirs = mesh is None
    parallel = SequenceParallel(ulysses=_their_mesh(model) if theirs else mesh)
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if isinstance(heads, int) and heads < parallel.ulysses.size:
        raise ValueError(f"{type(model).__name__} {too_few_heads(heads, parallel.ulysses.size)}")
    rules = state.backend.rules  # for all heads
    counts = [_head_count(builder) for builder in rules.builders]

    def heads_of(name: str) -> int | None:
        index = rules.index(name)
        return None if index is None else counts[index]

    backend = _localized(state.backend, parallel)
    cut = Cut(parallel, state, known(model).text_at == "first")
    hooks = [(module, cut.hooks(module, name, entry)) for name, entry in plan.items() for module in _named(model, name)]
    if theirs:  # nothing is changed before here, where nothing is left to refuse
        _switch_off(model)
    own = [each for module, each in hooks if module is model]
    state.ends = Ends([hook for before, _ in own for hook in before], [hook for _, after in own for hook in after])
    for module, (before, after) in hooks:
        for hook in before if module is not model else ():
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for hook in after if module is not model else ():
            module.register_forward_hook(hook)
    backend.parallel = Around(parallel, heads_of)
    state.use(backend)
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


def _their_mesh(model: nn.Module) -> DeviceMesh:
    """The mesh of diffusers' context parallelism."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        raise ValueError(
            f"mesh is None, and {type(model).__name__} has no context parallelism enabled: give a DeviceMesh"
        )
    if config.ring_degree > 1:
        ranks = config.ring_degree * config.ulysses_degree
        raise ValueError(
            f"ring_degree is {config.ring_degree}, but sparse attention sees all keys at once: give "
            f"ContextParallelConfig(ulysses_degree={ranks}), or leave it out and give ulysses(model, mesh)"
        )
    return config._ulysses_mesh


def _switch_off(model: nn.Module) -> None:
    """End diffusers' context parallelism: its attention would be recomputed dense."""
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


def _head_count(builder: Any) -> int | None:
    """How many query heads a builder is for; None where it takes any number."""
    if isinstance(builder, PerHead):
        return len(builder.heads)
    parts = builder.parts if isinstance(builder, Combination) else ()
    return next((count for part in parts if (count := _head_count(part)) is not None), None)


def _localized(backend: Any, parallel: SequenceParallel) -> Any:
    """A backend of the model's own, as copies made before (an EMA) share the first; its builders are of this rank's heads."""
    size, rank = parallel.ulysses.size, parallel.ulysses.rank

    def own(builder: Any) -> Any:
        if isinstance(builder, PerHead):
            heads = len(builder.heads)
            return of_heads(builder, *Heads(heads, heads, size).query(rank), heads)
        if isinstance(builder, Combination):
            return dataclasses.replace(builder, parts=tuple(own(part) for part in builder.parts))
        return builder

    new, rules = copy.copy(backend), backend.rules
    new.calls, new.tally = copy.deepcopy(backend.calls), Tally()
    swapped = {id(builder): own(builder) for builder in rules.builders}
    pairs = tuple((pattern, swapped.get(id(builder), builder)) for pattern, builder in rules.rules)
    new.rules = dataclasses.replace(rules, rules=pairs, builders=tuple(swapped[id(b)] for b in rules.builders))
    return new


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    """Modules of a plan's name, in which ``*`` stands for every member of a list, and ``-1`` for the last one.

    Raises:
        ValueError: there is no such module.
    """
    found = [model]
    for part in filter(None, name.split(".")):
        if part == "*":
            found = [child for module in found for child in module.children()]
            continue
        children = [dict(module.named_children()) for module in found]
        found = [
            each.get(list(each)[-1] if part == "-1" and each else part)  # type: ignore[misc]
            for each in children
        ]
        if any(module is None for module in found):
            raise ValueError(
                f"plan= names {name!r}, but {type(model).__name__} has no such module ({part!r} is none of "
                f"{', '.join(children[0]) or 'its members'}): give a name of model.named_modules(), with * for every member "
                "of a list and -1 for the last one"
            )
    return found
