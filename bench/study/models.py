"""The model of a run: one class and one set of initial weights; only how it attends differs between methods."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import flexsparse as fs
from bench.study.factorized import CompressedKV, SpatialAttention, TemporalAttention
from bench.study.settings import Method, Size
from flexsparse.demo.model import SelfAttention, VideoDiT
from flexsparse.masks import MaskBuilder
from flexsparse.training.errors import RunError

MOVES = 10
"""About how many times an annealed ratio moves."""
KINDS: dict[str, tuple[type[SelfAttention], type[SelfAttention]]] = {
    "dense": (SelfAttention, SelfAttention),
    "sparse": (SelfAttention, SelfAttention),
    "spatial": (SpatialAttention, SpatialAttention),
    "spatial_temporal": (SpatialAttention, TemporalAttention),
    "spatial_full": (SpatialAttention, SelfAttention),
    "compressed_kv": (CompressedKV, CompressedKV),
}
"""Attention of even and of odd blocks; "sparse" is dense attention that `flexsparse.wrap` intercepts."""


def kind_of(method: Method, block: int) -> type[SelfAttention]:
    """The class of a block's attention.

    Raises:
        RunError: no such attention.
    """
    if method.attention not in KINDS:
        raise RunError(f"{method.name}: attention is {method.attention!r}: give one of {sorted(KINDS)}")
    return KINDS[method.attention][block % 2]


def make(
    size: Size, method: Method, seed: int, channels: int, compile: bool = False, schedule: MaskBuilder | None = None
) -> VideoDiT:
    """A model on the CPU with the seed's initial weights: the same for all methods, besides gates, which are zero.

    Args:
        size: of the model.
        method: how it attends.
        seed: of the weights.
        channels: of the video or the latents.
        compile: whether calls go through `torch.compile`.
        schedule: a builder in place of ``method.builder``: the annealed one of `scheduled`.

    Raises:
        RunError: settings that do not go together.
    """
    check(size, method, channels)
    with torch.random.fork_rng(devices=[]):  # gates draw numbers too, before they are set to zero
        torch.manual_seed(seed)
        model = VideoDiT(dim=size.dim, depth=size.depth, heads=size.heads, patch=size.patch, channels=channels)
        for number, block in enumerate(model.blocks):
            replace_attention(block, kind_of(method, number), size)
        if method.attention == "sparse":
            return _wrapped(model, size, method, method.builder if schedule is None else schedule, compile)
    if compile:
        model.compile(dynamic=False)
    return model


def _wrapped(model: VideoDiT, size: Size, method: Method, builder: Any, compile: bool) -> VideoDiT:
    options: dict[str, Any] = {"dynamic": False} if compile else {}
    try:
        return fs.wrap(model, builder, tile=method.tile, grid=size.grid, gates=method.gates, compile=compile, **options)
    except (ValueError, TypeError) as error:
        raise RunError(f"{size.name}/{method.name}: {error}") from error


def check(size: Size, method: Method, channels: int) -> None:
    """Refuse settings that do not go together.

    Raises:
        RunError: one sentence that names the argument, its value and the remedy.
    """
    where = f"{size.name}/{method.name}"
    kind_of(method, 0)
    if channels < 1:
        raise RunError(f"{where}: channels is {channels}: give at least 1")
    if size.dim % size.heads or size.head_dim % 2:
        raise RunError(f"{where}: dim is {size.dim} with {size.heads} heads: give a dim that 2 * heads divides")
    for name, extent in (("height", size.height), ("width", size.width)):
        if extent % size.patch or extent < size.patch:
            raise RunError(f"{where}: {name} is {extent}: give a multiple of the patch, {size.patch}")
    if (method.builder is None) == (method.attention == "sparse"):
        remedy = "give a mask builder" if method.builder is None else "leave the builder out, or give 'sparse'"
        raise RunError(f"{where}: attention is {method.attention!r} and builder {method.builder!r}: {remedy}")
    if method.attention != "sparse" and (method.gates or method.anneal):
        name = "gates" if method.gates else "anneal"
        raise RunError(
            f"{where}: {name} is {getattr(method, name)} and attention {method.attention!r}: only 'sparse' has {name}"
        )
    if method.gates and not getattr(method.builder, "has_coarse", False):
        raise RunError(
            f"{where}: gates is True, but {type(method.builder).__name__} has no coarse output: leave the gates out"
        )


def replace_attention(block: Any, kind: type[SelfAttention], size: Size) -> None:
    """Give a block another attention with the weights of the one it has."""
    if kind is SelfAttention:
        return
    state = block.attn.state_dict()
    block.attn = kind(size.dim, size.heads, size.grid)  # type: ignore[call-arg]
    block.attn.load_state_dict(state)


def scheduled(method: Method, steps: int) -> tuple[Any, list[fs.SparsitySchedule]]:
    """The builder to train with, and its schedules, each to be advanced at every step.

    The density falls from 1 in about ten equal moves, and is the method's from step ``method.anneal * steps`` on.

    Args:
        method: with ``anneal`` 0 its builder comes back as it is, with no schedules.
        steps: of the whole training.

    Raises:
        RunError: a builder that cannot be annealed, or too few steps.
    """
    if not method.anneal:
        return method.builder, []
    if not 0 < method.anneal <= 1:
        raise RunError(f"{method.name}: anneal is {method.anneal}: give a share of the steps in [0, 1]")
    whole = round(method.anneal * steps)
    if whole < 1:
        raise RunError(f"{method.name}: anneal is {method.anneal} of {steps} steps, less than one: give more of either")
    moves = _moves(whole)
    found: dict[str, fs.SparsitySchedule] = {}
    for name, start in _dense_ratios(method).items():
        target = getattr(method.builder, name)
        if target != start:
            step = abs(target - start) / moves
            found[name] = fs.SparsitySchedule(target=target, start=start, step=step, every=whole // moves)
    return dataclasses.replace(method.builder, **found), list(found.values())


def _dense_ratios(method: Method) -> dict[str, float]:
    """The ratios of a builder that say how much it keeps, and their values that keep all."""
    builder = method.builder
    if isinstance(builder, fs.VSA) and builder.sparsity is not None:
        names = {"sparsity": 0.0}
    elif isinstance(builder, fs.BSA):
        names = {"keep_queries": 1.0, "mass" if builder.threshold == "mass" else "kv_density": 1.0}
    else:
        raise RunError(
            f"{method.name}: anneal is {method.anneal}, but {builder!r} has no ratio to anneal: give VSA(sparsity=...) or "
            "BSA(keep_queries=..., kv_density=...), or anneal=0"
        )
    moving = [name for name in names if not isinstance(getattr(builder, name), int | float)]
    if moving:
        raise RunError(
            f"{method.name}: {moving[0]} is {getattr(builder, moving[0])!r} and anneal {method.anneal}: give a plain number, "
            "or anneal=0"
        )
    return names


def _moves(steps: int) -> int:
    """How many equal moves fill so many steps exactly: the divisor nearest to ten, by ratio, of at least five."""
    divisors = [n for n in range(min(5, steps), steps + 1) if steps % n == 0]
    return min(divisors, key=lambda n: max(n / MOVES, MOVES / n))


def velocity(model: nn.Module, noisy: Tensor, t: Tensor, bf16: bool) -> Tensor:
    """What the model says of noisy video: float32, computed under bfloat16 autocast where asked for."""
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=bf16):
        found: Tensor = model(noisy, t)
    return found.float()


def count_parameters(model: nn.Module) -> int:
    """Trained numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters())
