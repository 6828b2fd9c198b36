"""Ops by which a wrapped model tells its graph the grid, the gates, and where its tokens are cut.

Grid and gates are said by ops without a result. One that stood in for an argument would not be that argument: what a block
writes into its dict would be lost, and ``x is y``, a tensor's strides and attributes would be others.

`RewriteSDPA` removes them (the last kind: `distributed.around`). One that is executed shows that the model was compiled by
a backend that knows nothing of flexsparse and would run dense: it raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _not_rewritten() -> RuntimeError:
    return RuntimeError(
        "this model is wrapped by flexsparse, but was compiled by another backend, which would leave its attention dense: "
        "let wrap(model, ..., compile=True) or compile='regional' compile it, or unwrap it and pass torch.compile(..., "
        "backend=flexsparse.backend(...)). After too many recompilations torch also runs uncompiled: see "
        "torch._dynamo.config.recompile_limit"
    )


@torch.library.custom_op("flexsparse::mark_grid", mutates_args=())
def mark_grid(T: int, H: int, W: int, first: int, last: int) -> None:
    """Says that the graph's video tokens form the grid (T, H, W), with so many text tokens before and after."""
    raise _not_rewritten()


@mark_grid.register_fake
def _(T: int, H: int, W: int, first: int, last: int) -> None:
    return None


@torch.library.custom_op("flexsparse::mark_gate", mutates_args=())
def mark_gate(gate: Tensor, fine_gate: Tensor | None = None) -> None:
    """Says that the next sparse attention call takes ``gate`` and ``fine_gate``, ``[B, S, H * D]``."""
    raise _not_rewritten()


@mark_gate.register_fake
def _(gate: Tensor, fine_gate: Tensor | None = None) -> None:
    return None


@torch.library.custom_op("flexsparse::mark_cut", mutates_args=())
def mark_cut(x: Tensor, cut: bool) -> Tensor:
    """Return ``x``; says that from here on a sequence parallel model's tokens are cut, or that they are whole again."""
    raise _not_rewritten()


@mark_cut.register_fake
def _(x: Tensor, cut: bool) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)  # a part of a tensor is not dense


def _setup_cut(ctx: Any, inputs: Any, output: Any) -> None:
    return None


mark_cut.register_autograd(lambda ctx, grad: (grad, None), setup_context=_setup_cut)

GRID = torch.ops.flexsparse.mark_grid
GATE = torch.ops.flexsparse.mark_gate
CUT = torch.ops.flexsparse.mark_cut
for _mark in (GRID, GATE):  # another backend's graph would drop them as unused, and run
    torch.fx.node.has_side_effect(_mark)
    torch.fx.node.has_side_effect(_mark.default)


def is_mark(target: Any, mark: Any) -> bool:
    """Whether a node's target is a mark; Dynamo's graphs hold the packet, later ones the overload."""
    return target is mark or target is mark.default


def gates_of(node: Any) -> tuple[Any, Any]:
    """The gates that a gate mark names: of the coarse and of the fine output, the latter perhaps None."""
    return node.args[0], node.args[1] if len(node.args) > 1 else None
