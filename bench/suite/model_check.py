"""What the timed block stack must give: an uncompiled twin's output and gradients, at the timed size.

The twin has the same weights; its self-attention is plain dense attention, or sparse by another backend than the timed one.
It runs in float32 (the truth) and in the case's dtype, whose error says what rounding does to so many layers: near ties choose
other tiles too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.suite.contender import Expected, Results

OTHER = {"triton": "gather", "gather": "reference"}
"""By the backend that is timed, the one that checks it."""
OF_A_BLOCK = (
    *(f"attn1.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out", "to_gate_compress")),
    "ffn.0.weight",
)
"""Gradients that are compared, of the first and of the last block. That of ``patch_in`` has passed through all of them."""


def open_gates(model: nn.Module) -> None:
    """Random gates, the same every time: at zero, as they begin, nobody sees the coarse output."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_gate_compress" in name:
                width = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16() / width**0.5)


def loss_of(out: Tensor) -> Tensor:
    """What a training step descends; half precision is summed in float32."""
    return (out.float() if out.dtype.itemsize == 2 else out).square().mean()


def sampled(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are compared."""
    last = len(model.blocks) - 1  # type: ignore[arg-type]
    names = ["patch_in.weight", *(f"blocks.{n}.{name}" for n in sorted({0, last}) for name in OF_A_BLOCK)]
    own = dict(model.named_parameters())
    return [name for name in names if name in own]


def output(model: nn.Module, given: tuple[Tensor, ...]) -> Results:
    """Of a forward, as it is timed."""
    with torch.no_grad():
        return {"out": model(*given)}


def step(model: nn.Module, given: tuple[Tensor, ...]) -> Results:
    """Of a training step, as it is timed: the output and the `sampled` gradients.

    Raises:
        RuntimeError: a parameter has no gradient, or one that is not finite.
    """
    model.zero_grad(set_to_none=True)
    out = model(*given)
    loss_of(out).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    wrong = [name for name, grad in grads.items() if grad is None or not bool(grad.isfinite().all())]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(grads)} gradients are missing or not finite: {', '.join(wrong[:4])}")
    return {"out": out.detach(), **{f"d {name}": grads[name] for name in sampled(model)}}


def expected(
    twin: Callable[[torch.dtype], nn.Module], given: tuple[Tensor, ...], dtype: torch.dtype
) -> dict[str, Callable[[], Expected]]:
    """By part, what the model must give; both parts share one training step in each precision, made when asked for.

    Args:
        twin: the uncompiled model in a dtype, its weights rounded to the case's.
        given: its inputs.
        dtype: the case's.
    """
    found: list[tuple[Results, Results]] = []

    def of(dtype: torch.dtype) -> Results:
        return step(twin(dtype), tuple(x.to(dtype) for x in given))

    def both() -> tuple[Results, Results]:
        if not found:
            wide = torch.float32 if dtype.itemsize == 2 else torch.float64
            exact = {name: x.double() for name, x in of(wide).items()}
            found.append((exact, of(dtype)))
        return found[0]

    def part(names: Callable[[Results], list[str]]) -> Expected:
        exact, reference = both()
        some: list[dict[str, Any]] = [{name: x[name] for name in names(exact)} for x in (exact, reference)]
        return Expected(take=lambda x: x, exact=some[0], reference=some[1])

    return {"forward": lambda: part(lambda x: ["out"]), "training": lambda: part(list)}
