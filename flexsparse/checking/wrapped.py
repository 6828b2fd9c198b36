"""A wrapped model, compiled: our compiler passes and what torch's compiler makes of them, with gradients.

Shape letters: B batch, S tokens in raster order, C channels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexsparse.checking.tolerance import rms
from flexsparse.masks import VSA
from flexsparse.wrap import report, wrap

GRID = (5, 9, 10)
TILES = 18
"""Of 4 x 4 x 4 tokens, partial at all three ends."""
DIM, HEADS, BLOCKS = 128, 2, 2


class Block(nn.Module):
    """Self-attention as models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, C]`` to the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Some blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, C]`` to the same."""
        for block in self.blocks:
            x = block(x)
        return x


def wrapped(model: nn.Module, builder: Any, device: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A wrapped copy of a model, its gates far from zero."""
    copied = wrap(copy.deepcopy(model).to(device, dtype), builder, grid=GRID, gates=True, **options)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "gate" in name:
                make = torch.Generator().manual_seed(parameter.numel())
                parameter.copy_(
                    (torch.randn(parameter.shape, generator=make) / DIM**0.5).bfloat16()
                )  # exact in all dtypes
    return copied


def step(model: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the input, and those of all parameters as one vector."""
    parameter = next(model.parameters())
    x = x.to(parameter.device, parameter.dtype).requires_grad_()
    out = model(x)
    grads = torch.autograd.grad(out, [x, *model.parameters()], g.to(out.device, out.dtype))
    return {"out": out.detach(), "dx": grads[0], "dparameters": torch.cat([grad.flatten() for grad in grads[1:]])}


def compare(device: str, dtype: torch.dtype, compile: bool | str) -> tuple[dict[str, float], str | None, str]:
    """A training step against the same in float64, uncompiled, attention by its definition.

    In float32 each row keeps some tiles; in less, where rounding moves scores past each other, all.

    Returns:
        Relative errors by name, what is wrong (None where nothing is), and the backend that ran.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model()
        x, g = torch.randn(2, 2, 450, DIM).bfloat16().float()  # exact in all dtypes: only what is computed is rounded
    model = model.to(dtype)
    builder = VSA(top_k=5 if dtype == torch.float32 else TILES)
    definition: dict[str, Any] = {"compile": False, "attention": "reference"}
    oracle = step(wrapped(model, builder, "cpu", torch.float64, **definition), x, g)
    reference = step(wrapped(model, builder, "cpu", dtype, **definition), x, g)
    own = wrapped(model, builder, device, dtype, compile=compile)
    found, again = step(own, x, g), step(own, x, g)
    calls = report(own).calls
    backend = "+".join(sorted({call.backend for call in calls}))
    dense = [f"{call.name}: {call.reason}" for call in calls if not call.sparse]
    if dense or len(calls) != BLOCKS:
        return {}, f"{len(calls) - len(dense)} of {BLOCKS} attentions became sparse ({'; '.join(dense)})", backend
    errors, wrong = {}, None
    for name, exact in oracle.items():
        error, allowed = rms(found[name].cpu().double() - exact), rms(reference[name].double() - exact)
        errors[name] = error / rms(exact)
        # other roundings lie around the attention here: no bound for single values, and a wider one for all
        bound = 4 * allowed + torch.finfo(dtype).eps / 2 * rms(exact)
        if not error <= bound:
            wrong = wrong or f"{name} has RMS error {error:.2e}, more than {bound:.2e}"
        if not torch.equal(found[name], again[name]):
            wrong = wrong or f"{name} differs from one run to the next"
    return errors, wrong, backend
