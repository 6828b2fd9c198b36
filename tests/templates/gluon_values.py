"""What a simulated Gluon kernel holds in registers: values and pointers, and the functions that make them."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

TYPES = {
    gl.float32: torch.float32,
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
}


class Hazard(Exception):
    """What a GPU would do wrongly, or never."""


def demand(condition: Any, sentence: str) -> None:
    """Raise `Hazard` with the sentence unless the condition holds."""
    if not condition:
        raise Hazard(sentence)


class Value:
    """A scalar or block in registers. Division of integers rounds to zero, as on a GPU."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Value:
        return Value(self.data.to(TYPES.get(dtype, dtype)))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def __getitem__(self, key: Any) -> Value:
        return Value(self.data[key])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)


def raw(x: Any) -> Any:
    """The tensor or number that a value stands for."""
    if isinstance(x, Value):
        return x.data
    demand(isinstance(x, (bool, int, float, Tensor)), f"{type(x).__name__} in flight is used as a value")
    return x


def _operator(name: str, function: Callable[[Any, Any], Any]) -> None:
    setattr(Value, f"__{name}__", lambda self, other: Value(function(self.data, raw(other))))
    setattr(Value, f"__r{name}__", lambda self, other: Value(function(raw(other), self.data)))


def _divide(a: Any, b: Any) -> Any:
    return torch.div(torch.as_tensor(a), torch.as_tensor(b), rounding_mode="trunc")


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"):
    _operator(_name, lambda a, b, name=f"__{_name}__": getattr(torch.as_tensor(a), name)(torch.as_tensor(b)))
_operator("floordiv", _divide)
_operator("mod", lambda a, b: torch.fmod(torch.as_tensor(a), torch.as_tensor(b)))


@dataclass
class Pointer:
    """Addresses in an array, counted in elements from its first."""

    memory: Tensor
    offset: Any

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, Value(torch.as_tensor(raw(self.offset))) + other)

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.memory, Value(torch.as_tensor(raw(self.offset))) - other)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets, and which of them are meant."""
        offset = torch.as_tensor(raw(self.offset)).long()
        used = torch.as_tensor(True if mask is None else raw(mask)).expand(offset.shape)
        inside = (offset >= 0) & (offset < self.memory.numel())
        demand(bool((inside | ~used).all()), f"an address is outside of an array of {self.memory.numel()} elements")
        return offset, used


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    """``gl.load``."""
    offset, used = pointer.places(mask)
    found = torch.as_tensor(raw(other), dtype=pointer.memory.dtype).expand(offset.shape).clone()
    found[used] = pointer.memory[offset[used]]
    return Value(found)


def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
    """``gl.store``."""
    offset, used = pointer.places(mask)
    pointer.memory[offset[used]] = value.data.to(pointer.memory.dtype)[used]


def full(shape: list[int], value: Any, dtype: Any, layout: Any = None) -> Value:
    """``gl.full``."""
    return Value(torch.full(shape, float(value), dtype=TYPES[dtype]))


def where(condition: Any, a: Any, b: Any) -> Value:
    """``gl.where``."""
    return Value(torch.where(*(torch.as_tensor(raw(x)) for x in (condition, a, b))))
