"""Wrapping a model: its self-attention over video tokens becomes sparse, compiled or not."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from flexsparse.compiler import OPTIONS, Backend
from flexsparse.forwards import STATE, WRAPPED, hidden_by, override, remove_hooks, restore
from flexsparse.gate_files import warn_of_dropped_gates
from flexsparse.gates import ADDED, Gate, add_gates, gate_names, is_flat, of_fsdp
from flexsparse.grids import FixedGrid, GridFunction, geometry_reader
from flexsparse.models import known
from flexsparse.reporting import Report
from flexsparse.rules import BuilderRules, dense_patterns
from flexsparse.wrapped import State, compile_module, compile_region, model_forward, module_forward

Model = TypeVar("Model", bound=nn.Module)
OWN_OPTIONS = (*OPTIONS, "expect")
COMPILE_OPTIONS = inspect.signature(torch.compile).parameters.keys() - {"model", "backend", "disable"}
"""Of torch.compile; wrap gives the others itself."""


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks for regional compilation: what the model declares, else members of lists of one class."""
    declared = getattr(model, "_repeated_blocks", None)
    if declared:
        # by every class that a module's is derived from: FSDP2 derives one of its own
        return [m for m in model.modules() if any(kind.__name__ in declared for kind in type(m).__mro__)]
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    blocks = [b for members in lists for b in members if len(members) > 1 and len({type(x) for x in members}) == 1]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in inner and any(True for _ in block.children())]


def wrap(
    model: Model,
    builder: Any,
    tile: Sequence[int] | str = (4, 4, 4),
    grid: Sequence[int] | GridFunction | None = None,
    gates: bool | Sequence[str] = False,
    compile: bool | str = True,
    dense_layers: Sequence[int | str] = (),
    fine_gates: bool = False,
    **options: Any,
) -> Model:
    """Make a video transformer's self-attention sparse, in place.

    >>> # not run: downloads a model
    >>> model = fs.wrap(WanTransformer3DModel.from_pretrained(...), fs.VSA(sparsity=0.9), gates=True, fullgraph=True)
    >>> print(fs.report(model))      # after the first call

    Args:
        model: a module whose attention goes through ``scaled_dot_product_attention``.
        builder: a mask builder; or a dict of name patterns to builders, of which the first that matches an attention module
            (or a module that it is in) holds: ``{"blocks.[0-3]": fs.VSA(sparsity=0.5), "*": fs.VSA(sparsity=0.9)}``, None
            for dense attention.
        tile: tokens of one tile along (t, h, w), or ``"auto"``, which compiles once per grid.
        grid: None to read it, and the lengths of text that joins the video in attention, from the model's input at every
            call (`models.KNOWN`); a fixed (T, H, W); or ``function(module, args, kwargs)`` to (T, H, W) or
            (T, H, W, text_first, text_last).
        gates: add VSA's zero-initialised gate (`to_gate_compress`) to every self-attention that becomes sparse, or to the
            modules whose names match one of the given patterns. Create optimizers after wrapping.
        fine_gates: a gate on the fine output too (`to_gate_fine`, at first 1), wherever ``gates`` adds one.
        compile: True compiles the whole model at its first call, as one graph; ``"regional"`` its repeated blocks, once for
            all of them; False intercepts the calls of the uncompiled model.
        dense_layers: blocks that stay dense: numbers, counted through the model's lists of blocks (-1: the last), or name
            patterns.
        options: ``text_first``, ``text_last`` (text tokens in every call, in place of the input's), ``query_tile``,
            ``min_tokens``, ``attention``, ``expect`` and, where something is compiled, ``inner`` and the switches of passes: as
            for `backend`. Everything else goes to torch.compile (``dynamic``, ``mode``, ``options``), not with compile=False.

    Returns:
        The model: same class, same state dict besides the gates.

    Raises:
        ValueError: a class that is known not to become sparse; an argument that makes no sense for this model; at a call, a
            grid that the builder cannot meet.
        TypeError: no module, no builder, or an option that nobody takes.
        RewriteError: at the first call, that no attention could be made sparse, with what was seen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: give a torch.nn.Module (a pipeline's .transformer)")
    if known(model).refused:
        raise ValueError(f"{type(model).__name__} cannot be made sparse: it {known(model).refused}")
    _check_uncompiled(model)
    if any(STATE in module.__dict__ for module in model.modules()):
        raise ValueError(_wrapped_already(model))
    for whole in list(WRAPPED):
        for name, module in whole.named_modules():
            if module is model:
                raise ValueError(
                    f"model is {name} of a wrapped {type(whole).__name__}, which computes it: unwrap that first, or give "
                    'it builders by name (wrap(model, {"' + name + '*": builder, "*": builder}))'
                )
    if fine_gates and not gates:
        raise ValueError("fine_gates is True, but gates is False: give gates=True as well")
    if not isinstance(compile, bool) and compile != "regional":  # 1 == True
        raise ValueError(f"compile is {compile!r}: give True, False or 'regional'")
    own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
    unknown = sorted(options.keys() - COMPILE_OPTIONS)
    if unknown:
        raise TypeError(
            f"options has {', '.join(unknown)}: give arguments of wrap ({', '.join(OWN_OPTIONS)}, ...) or options of "
            f"torch.compile ({', '.join(sorted(COMPILE_OPTIONS))})"
        )
    if options and compile is False:
        raise TypeError(f"options {sorted(options)} go to torch.compile, but compile is False: leave them out")
    text = (own.get("text_first", 0), own.get("text_last", 0)) if {"text_first", "text_last"} & own.keys() else None
    if options.get("fullgraph") is False:
        raise ValueError(
            "fullgraph is False: after a graph break torch may run attention uncompiled, dense and unseen; leave it out, and "
            "use compile='regional' or compile=False for a model whose own code breaks the graph"
        )
    reader = geometry_reader(model, grid, text)
    blocks = repeated_blocks(model) if compile == "regional" else []
    if compile == "regional" and not blocks:
        raise ValueError(f"compile is 'regional', but {type(model).__name__} has no repeated blocks: use compile=True")
    _check_hooks(model, compile, blocks)
    backend = Backend(builder, tile=tile, grid=None, gates=bool(gates), wrapped=True, **own)
    backend.rules, backend.ragged = backend.rules.dense(dense_patterns(model, dense_layers)), reader.ragged
    backend.rules.check_names(model)
    state = State(backend, reader, compile, options)
    if isinstance(reader.grid, FixedGrid):
        backend.check((*reader.grid.grid, 0, 0))
        try:
            state.own = geometry_reader(model, None, text)
        except ValueError:
            state.own = None  # the input does not say its grid; the given one is all there is
    warn_of_dropped_gates(model)
    if gates and (is_flat(model) or any(isinstance(module, of_fsdp("FSDPModule")) for module in model.modules())):
        raise ValueError(
            "gates are on, but the model is sharded by FSDP already, which would not see them: wrap it before fully_shard (or "
            "FullyShardedDataParallel)"
        )
    if gates and any("_hf_hook" in x.__dict__ and any(p.is_meta for p in x.parameters()) for x in model.modules()):
        raise ValueError(
            "gates are on, but hooks load the model's weights layer by layer, and would not load theirs: wrap it before "
            "enable_sequential_cpu_offload"
        )
    if gates:
        add_gates(model, _gated(model, gates, backend.rules), fine_gates)
    for name, module in list(model.named_modules()):
        if module is model or isinstance(module, nn.ModuleList | nn.ModuleDict | Gate):
            continue
        builtin = type(module).__module__.startswith("torch.nn.modules") and not any(True for _ in module.children())
        if ADDED in module.__dict__ or (compile is not True and not builtin):
            override(module, state, name, module_forward)
            if compile is False:
                module.__dict__["compile"] = types.MethodType(compile_module, module)
    override(model, state, "", model_forward)
    for block in blocks:
        compile_region(block, options)
    WRAPPED.add(model)
    return model


def _check_uncompiled(model: nn.Module) -> None:
    """Refuse what torch compiles already: it would compile the wrapped forward with a backend that leaves it dense.

    Raises:
        ValueError: the model, or a module of it, went through ``torch.compile`` or ``module.compile()``.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("model was made by torch.compile: wrap the module that was given to it; wrap compiles")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or 'the model'} is compiled already, by its compile(): leave that out, wrap(..., compile=True or "
                "'regional') compiles; or wrap(..., compile=False) first"
            )


def _wrapped_already(model: nn.Module) -> str:
    """What to do where the model, or a module of it, is part of a wrapped model."""
    name, module = next((name, module) for name, module in model.named_modules() if STATE in module.__dict__)
    what = f"{name} ({type(module).__name__})" if name else type(module).__name__
    elsewhere = module.__dict__["_flexsparse_name"]
    if name and elsewhere:
        return (
            f"{what} is {elsewhere} of a wrapped model, too: use compile=True for both, which leaves what they share alone, or "
            "give one of them a copy of it (copy.deepcopy before wrap)"
        )
    return f"{what} is wrapped already: call flexsparse.unwrap(model) first"


def _check_hooks(model: nn.Module, compile: bool | str, blocks: Sequence[nn.Module]) -> None:
    """Refuse to compile what has offloading hooks of accelerate or diffusers: they replace forwards, and break graphs.

    A hook of the whole model, where only its blocks are compiled, is outside of all graphs.

    Raises:
        ValueError: there is one inside of what is compiled.
    """
    inside = [model] if compile is True else blocks
    compiled = {id(module) for root in inside for module in root.modules()}
    for name, module in model.named_modules():
        if id(module) in compiled and _moves_weights(module):
            raise ValueError(
                f"{name or 'the model'} has a hook that moves weights, which torch does not compile: call wrap before "
                "enable_model_cpu_offload, or use compile=False (compile='regional' is enough if only the whole model has one)"
            )


def _moves_weights(module: nn.Module) -> bool:
    others = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})  # by name: caches and context parallelism too
    return "_hf_hook" in module.__dict__ or any("offload" in name for name in others)


def _gated(model: nn.Module, gates: bool | Sequence[str], rules: BuilderRules) -> bool | Sequence[str]:
    """Which modules get a gate: those asked for, or those of a known model; less the ones that stay dense."""
    wanted: bool | Sequence[str] = (known(model).gates or True) if gates is True else gates
    dense = [pattern for pattern, builder in rules.rules if builder is None]
    if not dense:
        return wanted
    chosen = [name for name in gate_names(model, wanted) if rules.index(name) is not None]
    if not chosen:
        raise ValueError(
            "gates are on, but every attention that could have one is dense: see dense_layers and the builder's rules"
        )
    return chosen


def state_of(model: nn.Module) -> State:
    """What a wrapped model carries.

    Raises:
        ValueError: the model is not wrapped.
    """
    state = model.__dict__.get(STATE) if isinstance(model, nn.Module) else None
    if state is None and isinstance(model, nn.Module):
        state = getattr(model, "_orig_mod", model).__dict__.get(STATE)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not wrapped: call flexsparse.wrap(model, builder) first")
    return state


def report(model: nn.Module) -> Report:
    """Every attention call of a wrapped model: sparse or dense, why, shapes, density, backend; prints as a table.

    Raises:
        ValueError: the model is not wrapped.
    """
    state = state_of(model)
    state.backend.calls.dense_now = state.dense
    return state.backend.calls


def unwrap(model: Model) -> Model:
    """Restore a wrapped model, in place; its gates (see `save_gates`) and the hooks of `distributed.ulysses` are removed.

    Offloading hooks of accelerate's that were added after wrapping stay. What was taken out of the model since is restored too.

    Raises:
        ValueError: the model is not wrapped, or is part of one that is; other hooks replaced a forward after wrapping.
    """
    state = state_of(model)
    if model.__dict__.get("_flexsparse_name"):
        raise ValueError(
            f"{type(model).__name__} is {model.__dict__['_flexsparse_name']} of a wrapped model: unwrap the model itself"
        )
    modules = list(model.named_modules())
    inside = {id(module) for _, module in modules}
    taken_out = [x for x in state.modules if id(x) not in inside and x.__dict__.get(STATE) is state]
    modules += [(x.__dict__["_flexsparse_name"], x) for x in taken_out]
    for name, module in modules:
        by = hidden_by(module) if STATE in module.__dict__ else None
        if by is not None:
            raise ValueError(
                f"{name or 'the model'} got another forward after it was wrapped, by {by}: take that away first (disable the "
                "cache, remove the hook, accelerator.unwrap_model(model, keep_fp32_wrapper=False)), then unwrap"
            )
    for _, module in modules:
        remove_hooks(module)
        if STATE in module.__dict__:
            restore(module)
    state.forms.drop()
    WRAPPED.discard(model)
    return model
