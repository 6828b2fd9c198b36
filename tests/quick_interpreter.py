"""Triton's interpreter, without what it repeats.

At every call of a device function it looks through all of `triton.language` for what to replace, though the launch around the
call has replaced it, which was much of the time of the templates' tests. And it makes a table of all types for each type that
it asks for. What is computed stays the same. Triton 3.9's makes whole numbers of a mask of scalars, and refuses them as a mask.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from triton import language as tl
from triton.runtime import interpreter


def _first_builtin(owner: Any) -> str:
    return next(name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member))


_OWNERS = {
    owner: _first_builtin(owner) for owner in (tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base)
}
_replace, _np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
_np_dtypes: dict[str, Any] = {}


@functools.cache
def _to_replace(function: Any) -> list[Any]:
    """What of the language a launch replaces for a function."""
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    extra = [tl.math] if tl in seen else []
    return [*seen, *extra, tl.core.tensor, tl.core.tensor_descriptor_base]


def _replace_once(function: Any) -> Any:
    """`_patch_lang`, unless all of it is in place."""
    missing = any(tl.core.is_builtin(getattr(owner, _OWNERS[owner])) for owner in _to_replace(function))
    return _replace(function) if missing else interpreter._LangPatchScope()


def _known_np_dtype(dtype: Any) -> Any:
    """`_get_np_dtype`, which asks for the elements of a block."""
    element = dtype.scalar
    if element.name not in _np_dtypes:
        _np_dtypes[element.name] = _np_dtype(element)
    return _np_dtypes[element.name]


def _of_bools(method: Callable[..., Any], place: int) -> Callable[..., Any]:
    """A load or store whose mask, its argument at a place, is one of bools."""

    @functools.wraps(method)
    def run(builder: Any, *args: Any) -> Any:
        mask = args[place]
        if mask.data.dtype == bool:
            return method(builder, *args)
        mask = interpreter.TensorHandle(mask.data.astype(bool), tl.int1)
        return method(builder, *args[:place], mask, *args[place + 1 :])

    return run


def install() -> None:
    """In this process."""
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _of_bools(builder.create_masked_load, 1)
    builder.create_masked_store = _of_bools(builder.create_masked_store, 2)
    interpreter._patch_lang, interpreter._get_np_dtype = _replace_once, _known_np_dtype
