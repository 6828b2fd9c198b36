"""The forward that each module of a wrapped model gets in place of its own, and how it is taken away again."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from flexsparse.gates import ADDED

STATE = "_flexsparse"
OWN = "_flexsparse_own"
"""Where a module keeps the forward that it was given last: hooks may have put theirs over it."""


WRAPPED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that are wrapped, deep copies from their first call on: compiled as a whole, their modules do not know it."""


class Hook:
    """A hook of ours on a module: `unwrap` removes it. An object, so that a copied model's hooks follow the copy's state."""


def override(module: nn.Module, state: Any, name: str, forward: Callable[..., Any]) -> None:
    """Give a module a forward of its own; `restore` takes it away.

    Args:
        module: the module.
        state: what the wrapped model carries (`wrapped.State`).
        name: of the module in the model.
        forward: ``function(module, args, kwargs)``.
    """
    before = module.forward
    was_instance = "forward" in module.__dict__

    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, args, kwargs)

    takes_the_arguments_of(replaced, before)
    state.modules.add(module)
    module.__dict__[STATE] = state
    module.__dict__["_flexsparse_name"] = name
    module.__dict__["_flexsparse_forward"] = before
    module.__dict__["_flexsparse_restore"] = was_instance
    module.__dict__["_replicate_for_data_parallel"] = _refuse_replicas
    module.__dict__["forward"] = module.__dict__[OWN] = types.MethodType(replaced, module)


def _refuse_replicas() -> NoReturn:
    raise RuntimeError(
        "nn.DataParallel makes shallow copies of a model, whose forward here is that of the original, with its weights: use "
        "DistributedDataParallel"
    )


def takes_the_arguments_of(function: Any, forward: Callable[..., Any]) -> None:
    """Let a function show the signature of a bound forward: tools look at it (`functools.wraps` would lose an argument)."""
    owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(forward)
    parameters = [owner.replace(kind=inspect.Parameter.POSITIONAL_ONLY), *given.parameters.values()]
    function.__signature__ = given.replace(parameters=parameters)
    function.__doc__ = forward.__doc__


def hidden_by(module: nn.Module) -> str | None:
    """What replaced a module's forward after `override` and is not taken into account by `restore`; None where nothing did."""
    forward = module.__dict__.get("forward")
    if forward == module.__dict__[OWN] or module.__dict__.get("_old_forward") == module.__dict__[OWN]:
        return None
    made = forward
    while isinstance(made, functools.partial):  # diffusers' hooks dress it as the forward below, module and name
        made = made.func
    where = getattr(getattr(made, "__func__", made), "__globals__", {}).get("__name__")
    return where or getattr(forward, "__module__", None) or type(forward).__name__


def restore(module: nn.Module) -> None:
    """Undo `override`; a hook of accelerate's that was put over it stays, over the forward that was there before."""
    before, own = module.__dict__.pop("_flexsparse_forward"), module.__dict__.pop(OWN)
    was_instance = module.__dict__.pop("_flexsparse_restore")
    if module.__dict__.get("_old_forward") == own:
        module.__dict__["_old_forward"] = before
    elif was_instance:
        module.__dict__["forward"] = before
    else:
        module.__dict__.pop("forward", None)
    for name in (STATE, "_flexsparse_name", "compile", "_replicate_for_data_parallel"):
        module.__dict__.pop(name, None)
    module._compiled_call_impl = None
    for name in module.__dict__.pop(ADDED, ()):
        module._modules.pop(name, None)


def remove_hooks(module: nn.Module) -> None:
    """Take every `Hook` off a module."""
    for hooks, others in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
            del hooks[key]
            others.pop(key, None)
