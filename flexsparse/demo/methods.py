"""The three ways to train: dense, VSA, BSA; same class, same initial weights, other attention."""

from typing import Any

import torch
from torch import nn

import flexsparse as fs
from flexsparse.demo.model import VideoDiT
from flexsparse.demo.settings import Settings
from flexsparse.training.errors import RunError


def build_builder(method: str, settings: Settings) -> "fs.VSA | fs.BSA | None":
    """The mask builder of a method, None for dense."""
    if method == "vsa" and settings.top_k is not None:
        return fs.VSA(top_k=settings.top_k)
    if method == "vsa":
        return fs.VSA(sparsity=settings.sparsity)
    if method == "bsa":
        return fs.BSA(keep_queries=settings.keep_queries, kv_density=settings.kv_density)
    return None


def build_model(method: str, settings: Settings, *, compiled: bool) -> VideoDiT:
    """A model with the run's initial weights, on the run's device; wrapped unless the method is dense.

    Args:
        method: `dense`, `vsa` or `bsa`; VSA also gets its gates, zero at the start.
        settings: of the run.
        compiled: whether calls go through `torch.compile`.

    Raises:
        RunError: flexsparse refuses the combination of settings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = VideoDiT(dim=settings.dim, depth=settings.depth, heads=settings.heads, patch=settings.patch)
    model.to(settings.device)
    builder = build_builder(method, settings)
    if builder is None:
        if compiled:
            model.compile(dynamic=False)
        return model
    options: Any = {"dynamic": False} if compiled else {}
    try:
        fs.wrap(
            model,
            builder,
            tile=settings.tile,
            grid=settings.grid,
            gates=method == "vsa",
            compile=compiled,
            **options,
        )
    except ValueError as error:
        raise RunError(f"{method}: {error}") from error
    return model


def count_parameters(model: nn.Module) -> int:
    """Trained numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters())
