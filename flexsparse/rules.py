"""Which mask builder an attention takes, by its name in the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flexsparse.given import to_int
from flexsparse.schedule import SparsitySchedule, schedules_of

SHELLS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""What `checkpoint_wrapper`, FSDP1 and `torch.compile` call the module inside."""


def plain_name(path: str) -> str:
    """A module's name without what torch's shells around modules add, as a state dict of theirs has it."""
    return ".".join(part for part in path.split(".") if part not in SHELLS)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is one of a module's name, or of its `plain_name`; a name as it is matches, whatever is in it."""
    return any(each == pattern or fnmatch.fnmatchcase(each, pattern) for each in {name, plain_name(name)})


def _parents(name: str) -> Iterator[str]:
    """A module's path and those of the modules that it is in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def _is_builder(value: Any) -> bool:
    return callable(getattr(value, "select", None)) and not isinstance(value, type)  # VSA, for VSA(...)


@dataclass(frozen=True)
class BuilderRules:
    """Patterns of module names and what attention under them takes; the first that matches holds.

    Attributes:
        rules: (pattern, builder), None for dense attention. A pattern matches an attention module or one that it is in.
        builders: the different builders, in order.
    """

    rules: tuple[tuple[str, Any], ...]
    builders: tuple[Any, ...]

    @staticmethod
    def of(builder: Any) -> BuilderRules:
        """From one builder for all, or a mapping of patterns to builders (None: dense).

        Raises:
            TypeError: something that is no builder.
            ValueError: a mapping without a builder.
        """
        rules = tuple(builder.items()) if isinstance(builder, Mapping) else (("*", builder),)
        for pattern, value in rules:
            if not (_is_builder(value) or (value is None and isinstance(builder, Mapping))) or not isinstance(
                pattern, str
            ):
                raise TypeError(
                    f"builder is {builder!r}: give a mask builder, such as flexsparse.VSA(sparsity=0.9), or a dict of name "
                    "patterns to builders (None for dense attention)"
                )
        if all(value is None for _, value in rules):
            raise ValueError(
                f"builder is {builder!r}: give at least one mask builder; without wrapping everything is dense"
            )
        return BuilderRules._from(rules)

    @staticmethod
    def _from(rules: Sequence[tuple[str, Any]]) -> BuilderRules:
        found: list[Any] = []
        for _, value in rules:
            if value is not None and not any(value is other for other in found):
                found.append(value)
        return BuilderRules(tuple(rules), tuple(found))

    def dense(self, patterns: Sequence[str]) -> BuilderRules:
        """These rules, with dense attention under modules that match."""
        return BuilderRules._from((*((pattern, None) for pattern in patterns), *self.rules))

    def index(self, name: str) -> int | None:
        """Which of `builders` an attention takes; None for dense attention."""
        for pattern, value in self.rules:
            if any(matches(parent, pattern) for parent in _parents(name)):
                return None if value is None else next(i for i, b in enumerate(self.builders) if b is value)
        return None

    @property
    def schedules(self) -> tuple[SparsitySchedule, ...]:
        """Every schedule that a builder reads, once."""
        found: dict[int, SparsitySchedule] = {}
        for builder in self.builders:
            for schedule in schedules_of(builder):
                found[id(schedule)] = schedule
        return tuple(found.values())

    def check_names(self, model: nn.Module) -> None:
        """Raise a `ValueError` where a pattern matches no module of the model."""
        names = [name for name, _ in model.named_modules() if name]
        for pattern, _ in self.rules:
            if pattern != "*" and not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"the pattern {pattern!r} matches no module of {type(model).__name__}: give names as in "
                    f"model.named_modules(), such as {next((n for n in names if 'attn' in n), names[:1])!r}"
                )


def dense_patterns(model: nn.Module, layers: Sequence[int | str]) -> list[str]:
    """Name patterns of layers that stay dense.

    Args:
        model: its blocks are counted through the lists of modules that it holds itself, in order; -1 is the last.
        layers: block numbers or name patterns.

    Raises:
        ValueError: no such block.
        TypeError: neither a number nor a name pattern.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        layers = [layers]
    blocks = [
        f"{name}.{index}"
        for name, module in model.named_children()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    ]
    found = []
    for layer in layers:
        if isinstance(layer, str):
            found.append(layer)
            continue
        number = to_int(layer)
        if number is None:
            raise TypeError(f"dense_layers has {layer!r}: give numbers of blocks, ints, or name patterns")
        if not -len(blocks) <= number < len(blocks):
            raise ValueError(
                f"dense_layers has {layer}, but {type(model).__name__} has {len(blocks)} blocks in lists of its own: "
                + (
                    f"give numbers from {-len(blocks)} to {len(blocks) - 1}"
                    if blocks
                    else "give name patterns of modules"
                )
            )
        found.append(blocks[number])
    return found
