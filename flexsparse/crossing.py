"""Which tokens the keys of an uncompiled attention call are of: read off what its module was given."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Lengths = tuple[int, ...]
ANY: Lengths = (-1,)
"""Of a module that says itself that it is cross-attention, and may split what it is given."""
CROSSES = "its module was given two sequences of this length (cross-attention)"
"""Why a call stays dense."""
NO_TOKENS = re.compile(
    r"rot(?!otyp)|rope|freq|(?<!com)pos(?!e(?!m))|(^|_)pe($|_)|cos(?!m)|sin(?!g)|temb|timestep|modulation|mask(?!ed)|bias"
)
"""In names of arguments that have a row for each token and are none; a pose, a prototype, something masked may be some."""


def two_sequences(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[int] | None:
    """Lengths of which a module was given two different token sequences, as cross-attention may be; None where it says nothing.

    That is where it had none, or three and no weights to project them with: queries, keys and values. Sequences come alone, in
    lists and dicts, as a video ``[B, C, T, H, W]``, or with a batch of 1 for all samples. Of a module that says itself that it
    is cross-attention, the lengths of all that it was given: it may split one.
    """
    found: dict[int, torch.Size] = {}
    for name, value in named(module, args, kwargs):
        if NO_TOKENS.search(name):
            continue
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor) and x.dim() == 5:
                found[id(x)] = torch.Size((x.shape[0], math.prod(x.shape[2:]), x.shape[1]))
            elif isinstance(x, Tensor) and x.dim() == 3:
                found[id(x)] = x.shape
    if len(found) < 2:
        return frozenset() if found else None
    first, *others = found.values()
    if getattr(module, "is_cross_attention", False) is True:
        return frozenset(shape[1] for shape in found.values())
    if len(found) > 2 and not any(parameter.dim() > 1 for parameter in module.parameters()):
        return None
    return frozenset(first[1:2]) if any(_alike(first, shape) for shape in others) else frozenset()


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a module was given, with the names of its parameters."""
    own = _parameters(type(module).forward)
    return [*((own[i] if i < len(own) else "", x) for i, x in enumerate(args)), *kwargs.items()]


@functools.lru_cache(4096)
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _alike(one: torch.Size, other: torch.Size) -> bool:
    """Whether two may be sequences ``[B, S, C]`` of which one attends to the other; a table of positions has other channels."""
    return one[1] == other[1] and (one[0] == other[0] or (1 in (one[0], other[0]) and one[2] == other[2]))


def other_sequences(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Lengths | None:
    """Lengths of the token sequences ``[B, n, C]`` that a module was given besides the first; None where it was given none."""
    if getattr(module, "is_cross_attention", False) is True:
        return ANY
    axis = 0 if getattr(module, "batch_first", True) is False else 1  # torch's own multi-head attention
    found: dict[int, int] = {}
    for name, value in named(module, args, kwargs):
        if not NO_TOKENS.search(name):
            each = value if isinstance(value, tuple | list) else (value,)
            found |= {id(x): x.shape[axis] for x in each if isinstance(x, Tensor) and x.dim() == 3}
    return tuple(found.values())[1:] if found else None
