"""The compiled forms of a wrapped model: of the whole, or of its regions, which modules of one class share."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flexsparse.compiler import Backend
from flexsparse.grids import Geometry
from flexsparse.one_graph import OneGraph, forget
from flexsparse.traced import traced_dense, traced_model, traced_region


class Forms:
    """What a wrapped model was compiled to; torch forgets it with this.

    Args:
        backend: what compiles.
        options: of torch.compile, for the whole model.
        order: the geometries that were met, numbered from 0.
        local: of the interceptor, what holds for a thread.
    """

    def __init__(self, backend: Backend, options: dict[str, Any], order: Mapping[Geometry, int], local: Any) -> None:
        self.backend, self.options, self.order, self.local = backend, options, order, local
        self.compiled: dict[Any, OneGraph] = {}
        self.labels: dict[tuple[str, tuple[int | None, ...]], str] = {}
        self.label_of: dict[str, str] = {}
        self.codes: list[types.CodeType] = []
        # what torch keeps refers to the backend, and never to this
        weakref.finalize(self, forget, self.codes).atexit = False

    def drop(self) -> None:
        """Let torch forget all forms."""
        forget(self.codes)
        self.codes.clear()
        self.compiled.clear()

    def variant(self, geometry: Geometry, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Which compiled form serves a geometry, and how it is compiled.

        The first one has static shapes, all others share one form with dynamic shapes: two graphs for any number of
        resolutions. Left to itself, torch makes one size after the other dynamic, and may redo a checkpointed block with
        another graph than the forward's. ``tile="auto"`` depends on the numbers, so each geometry has a form of its own.
        """
        if "auto" in (self.backend.tile, self.backend.query_tile):
            return geometry, {"dynamic": False, **options}
        first = self.order.get(geometry, 1) == 0
        return first, options if first or options.get("dynamic") is not None else {**options, "dynamic": True}

    def whole(self, geometry: Geometry) -> OneGraph:
        """The compiled form of the model for a geometry."""
        key, options = self.variant(geometry, self.options)
        if key not in self.compiled:
            self._compile(key, traced_model, str(key), self.backend, options)
        return self.compiled[key]

    def region(self, module: nn.Module, geometry: Geometry, options: dict[str, Any]) -> OneGraph:
        """The compiled form of a class of modules: one for all that take the same builders, so that N blocks compile once."""
        key, options = self.variant(geometry, options)
        label, within = self.label(module), module.__dict__["_flexsparse_name"]
        if (label, key) not in self.compiled:
            backend, local = self.backend, self.local

            def compile_region(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
                return backend.compile(gm, inputs, kwargs, f"{label}::", within, local.cut)

            self._compile((label, key), traced_region, f"{label} {key}", compile_region, options)
        return self.compiled[label, key]

    def whole_dense(self) -> OneGraph:
        """The compiled form of the model as it was."""
        if "dense" not in self.compiled:
            self._compile("dense", traced_dense, "dense", self._dense_backend(), self.options)
        return self.compiled["dense"]

    def region_dense(self, module: nn.Module, options: dict[str, Any]) -> OneGraph:
        """The compiled form of a class of modules as it was."""
        kind = type(module).__name__
        if ("dense", kind) not in self.compiled:
            self._compile(("dense", kind), traced_dense, f"dense {kind}", self._dense_backend(), options)
        return self.compiled["dense", kind]

    def _dense_backend(self) -> Callable[..., Any]:
        backend = self.backend

        def compile_dense(gm: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            return backend.compile_dense(gm, inputs, kwargs)

        return compile_dense

    def _compile(
        self, key: Any, function: Any, name: str, backend: Callable[..., Any], options: dict[str, Any]
    ) -> None:
        self.compiled[key] = form = OneGraph(function, name, backend, options)
        self.codes.append(form.code)

    def label(self, module: nn.Module) -> str:
        """What the report calls a region: its class, numbered where modules of one class take different builders."""
        path = module.__dict__["_flexsparse_name"]
        if path not in self.label_of:  # looking up each of its modules' builders takes long, and every call asks
            self.label_of[path] = self._label(module, path)
        return self.label_of[path]

    def _label(self, module: nn.Module, path: str) -> str:
        kind = type(module).__name__
        rules = self.backend.rules
        names = [f"{path}.{name}" if name else path for name, _ in module.named_modules()]
        key = (kind, tuple(rules.index(name) for name in names) if len(rules.rules) > 1 else ())
        if key not in self.labels:
            others = sum(other == kind for other, _ in self.labels)
            self.labels[key] = f"{kind} ({others + 1})" if others else kind
        return self.labels[key]
