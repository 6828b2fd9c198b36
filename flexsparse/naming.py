"""Which module of a model a call in Dynamo's graph is in.

Dynamo says by which expression code reached a module (``L['module'].order[0].fn``), which need not be its name: a list beside
the model's own, a second attribute. Builders and dense layers go by names, so the expression is looked up in the model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx import Node

from flexsparse.compile_passes.rewrite_sdpa import call_name


class _Running(threading.local):
    root: Any = None


_running = _Running()


@contextmanager
def compiling(root: Any) -> Iterator[None]:
    """Meanwhile what is compiled is the forward of ``root``."""
    before, _running.root = _running.root, root
    try:
        yield
    finally:
        _running.root = before


def root() -> nn.Module | None:
    """The module whose forward is being compiled, where it is one of a wrapped model."""
    return _running.root if isinstance(_running.root, nn.Module) else None


def name_of(node: Node) -> str:
    """The name, below `root`, of the module that a call is in; ``"."`` of `root` itself; of an unknown one what can be read."""
    model, stack = root(), list(node.meta.get("nn_module_stack", {}).values())
    if model is None or not stack:
        return call_name(node)
    found = _value(str(stack[-1][0]), model)
    if found is model:
        return "."
    return next((name for name, module in model.named_modules() if module is found), call_name(node))


_START = re.compile(r"L\['(?:module|self)'\]")
_STEP = re.compile(r"""\.(\w+)|\[(?:'([^']*)'|"([^"]*)"|(-?\d+))\]""")


def _value(expression: str, model: nn.Module) -> Any:
    """What ``L['module'].order[0].fn`` or ``L['module'].blocks.0.fn`` is, ``L['module']`` being the model; None if unknown."""
    start = _START.match(expression)
    if start is None:
        return None
    at, value = start.end(), model
    while at < len(expression):
        step = _STEP.match(expression, at)
        if step is None:
            return None
        key = next(group for group in step.groups() if group is not None)
        try:
            value = _entry(value, key)
        except (LookupError, AttributeError, TypeError, ValueError):
            return None
        at = step.end()
    return value


def _entry(value: Any, key: str) -> Any:
    """A child, an attribute, or an entry of a list or dict."""
    if isinstance(value, nn.Module) and key in value._modules:
        return value._modules[key]
    if isinstance(value, Mapping):
        return value[key] if key in value else value[int(key)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[int(key)]
    return getattr(value, key)
