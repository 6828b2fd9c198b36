"""torch's own multi-head attention: one function in a graph, with a scaled_dot_product_attention call inside of it.

Shape letters: L tokens, B batch, H heads, E channels.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

MULTI_HEAD = F.multi_head_attention_forward
FAST = (torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)
"""What torch's modules call in evaluation, without gradients: one op, in which no attention call is seen."""
_SIGNATURE = inspect.signature(MULTI_HEAD)


def multi_head_with(sdpa: Callable[..., Any]) -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` that calls ``sdpa``: it finds the function by a global name.

    It must not hand itself to a torch function mode (tracing has one), which would run torch's own, dense.
    """
    names = {**vars(F), "scaled_dot_product_attention": sdpa, "has_torch_function": lambda _: False}
    return types.FunctionType(MULTI_HEAD.__code__, names, argdefs=MULTI_HEAD.__defaults__)


def arguments_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, defaults included."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def stays_dense(call: Mapping[str, Any]) -> str | None:
    """Why a call reaches no scaled_dot_product_attention that could become sparse; None where it does."""
    if call["query"] is not call["key"] or call["key"] is not call["value"]:
        return "queries and keys come from different tensors (cross-attention)"
    if call["need_weights"]:
        return "it returns attention weights (need_weights=True), which takes dense attention"
    if call["attn_mask"] is not None or call["key_padding_mask"] is not None:
        return "it has an attention mask"
    if call["is_causal"]:
        return "it is causal"
    if call["bias_k"] is not None or call["add_zero_attn"]:
        return "it adds tokens of its own (bias_k, add_zero_attn)"
    if call["training"] and call["dropout_p"]:
        return f"it has dropout {call['dropout_p']}"
    return None


def heads_of(query: torch.Tensor, heads: int) -> torch.Tensor:
    """A tensor of the shape in which the call's SDPA sees a query ``[L, B, E]``: ``[B, H, L, E / H]``."""
    return query.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
