"""Triton's interpreter, without what it repeats, and with a check that it leaves out.

At every call of a device function it looks through all of `triton.language` for what to replace, though the launch around the
call has replaced it. It makes a table of all types for each type that it asks for, and the shape of every value anew. For each
sum and product of whole numbers it computes, by five operations of the language, whether that overflows, and then asks nobody:
here it is asked. All that was most of the time of the templates' tests. What is computed stays the same.

Triton 3.9's makes whole numbers of a mask of scalars, and refuses them as a mask.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl
from triton.language.semantic import TritonSemantic
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


_sanitize = TritonSemantic.binary_op_sanitize_overflow_impl
_EXACT: dict[str, Callable[..., Any]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def _refuse_overflow(semantic: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
    """`binary_op_sanitize_overflow_impl`, in numpy; what is compiled has no numbers."""
    kind = lhs.type.scalar
    if not isinstance(semantic.builder, interpreter.InterpreterBuilder):
        return _sanitize(semantic, lhs, rhs, binary_op)
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACT[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    fits = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"


_make_block, _make_tensor = tl.block_type.__init__, tl.tensor.__init__
_blocks: dict[Any, dict[str, Any]] = {}
_SHAPE = "shape of its values"


def _known_block(self: Any, element_ty: Any, shape: Any) -> None:
    """Of an element and a shape there is one set of attributes."""
    place = getattr(element_ty, "address_space", None)  # what a pointer's name does not say
    key = element_ty.name, place, tuple([getattr(size, "value", size) for size in shape])
    if key not in _blocks:
        _make_block(self, element_ty, shape)
        _blocks[key] = self.__dict__
    self.__dict__ = _blocks[key]


def _tensor_of_known_type(self: Any, handle: Any, type: Any) -> None:
    """Values of a type have its shape and number of elements, made once."""
    known = type.__dict__.get(_SHAPE)
    if known is None:
        _make_tensor(self, handle, type)
        type.__dict__[_SHAPE] = self.shape, self.numel
    else:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known


def install() -> None:
    """In this process."""
    tl.block_type.__init__, tl.tensor.__init__ = _known_block, _tensor_of_known_type
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _of_bools(builder.create_masked_load, 1)
    builder.create_masked_store = _of_bools(builder.create_masked_store, 2)
    interpreter._patch_lang, interpreter._get_np_dtype = _replace_once, _known_np_dtype
