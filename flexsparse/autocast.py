"""Autocast and attention: the dtype it asks for, and regions without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype to which autocast would cast attention's inputs; None where it is off. ``device`` is a device type."""
    if device == "meta":
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_off(device: str) -> AbstractContextManager[object]:
    """A region without autocast. Meta tensors, of which only shapes are known, have none, and torch refuses the name."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
