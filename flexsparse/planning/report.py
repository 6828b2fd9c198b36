"""A plan as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexsparse.planning.plan import Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the tables show, in FLOPs, bytes and seconds."""
    found: dict[str, Any] = _plain(plan)
    found["settings"]["builder"] |= {"name": type(plan.settings.builder).__name__}
    found["flops"] |= {"sparse_total": plan.flops.sparse_total, "dense_total": plan.flops.dense_total}
    found["memory"]["total"] = plan.memory.total
    found["memory"]["fits"] = plan.memory.total <= plan.settings.machine.memory
    for name, times in (("sparse", plan.sparse), ("dense", plan.dense)):
        found[name]["total"] = times.total
    found["speedup"] = plan.speedup
    found["machine"] = _plain(plan.settings.machine)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path | torch.dtype) else value
