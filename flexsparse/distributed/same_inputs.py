"""Whether the ranks of a sequence parallel model were given the same inputs: else attention would mix their videos.

Compared at a model's first call, where a sampler that gives each rank a sample of its own shows; later calls have no such stop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flexsparse.crossing import named
from flexsparse.distributed.tokens import Ranks, all_gather

LONGEST = 4096
"""Bytes of a description that ranks exchange."""
SUMS = 16
"""Weighted sums that stand for a tensor."""
TOLERANCE = 0.02
"""Of the sums, relative: each rank may have computed its text by itself, and rounded otherwise. Other noise: about sqrt(2)."""
ROUNDING = 1e-5
"""The same of whole numbers: that of the sums themselves, on other hardware."""


def check_same_inputs(ranks: Ranks, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare what the ranks were given, on every rank.

    Args:
        ranks: that hold one video together.
        module: the model.
        args: of its forward.
        kwargs: of its forward.

    Raises:
        ValueError: on every rank, where shapes, dtypes, values or the gradient mode differ.
    """
    tensors = dict(_tensors(named(module, args, kwargs)))
    if ranks.size == 1 or not tensors or not dist.is_initialized() or dist.get_backend() == "fake":
        return
    words = [f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in tensors.items()]
    text = ", ".join([*words, f"gradients {'on' if torch.is_grad_enabled() else 'off'}"]).encode()[:LONGEST]
    devices = [x.device for x in (*tensors.values(), *itertools.islice(module.parameters(), 1))]
    device = next((each for each in devices if each.type != "cpu"), devices[0])  # of a CPU's tensors NCCL sends none
    said = torch.zeros(LONGEST, dtype=torch.uint8)
    said[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    gathered = all_gather(said[None].to(device), ranks.group).tolist()
    lines = [bytes(line).rstrip(b"\0").decode(errors="replace") for line in gathered]
    if len(set(lines)) > 1:
        _differ("; ".join(f"rank {rank}: {line}" for rank, line in enumerate(lines)))
    sums = torch.stack([_sums(x.detach()).to(device) for x in tensors.values()])
    found = all_gather(sums[None], ranks.group).cpu()
    for index, (name, x) in enumerate(tensors.items()):
        first, tolerance = found[0, index], TOLERANCE if x.is_floating_point() or x.is_complex() else ROUNDING
        for rank in range(1, ranks.size):
            if (found[rank, index] - first).norm() > tolerance * first.norm():
                _differ(f"{name} has other values on rank {rank} than on rank 0")


def _differ(how: str) -> None:
    raise ValueError(
        f"the ranks of ulysses(model, mesh) were given different inputs: {how}. They hold one video together: give each the "
        "same latents, noise, times and text (broadcast them, or seed alike); other samples go to other groups of ranks, by a "
        "mesh of two dimensions"
    )


def _tensors(values: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors([(f"{name}[{key!r}]", each) for key, each in value.items()])
        elif isinstance(value, list | tuple):
            yield from _tensors([(f"{name}[{index}]", each) for index, each in enumerate(value)])


def _sums(x: Tensor) -> Tensor:
    """Of 16 runs of a tensor's values, each with its own weights: other values have other sums."""
    flat = torch.view_as_real(x).flatten() if x.is_complex() else x.flatten()
    flat = flat.float().nan_to_num()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % SUMS))
    runs = flat.view(SUMS, flat.numel() // SUMS)
    return (runs * (1 + torch.arange(runs.shape[1], device=x.device) * 2.4).cos()).sum(1)
