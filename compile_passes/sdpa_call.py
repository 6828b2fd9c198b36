"""One scaled_dot_product_attention call: its arguments by name, and why it has to stay dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from flexsparse.ops.text_lengths import mask_shape

SDPA = torch._C._nn.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class SDPACall:
    """Arguments of a call, tensors or graph nodes alike."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SDPACall:
        """From positional and keyword arguments."""
        return cls(**dict(zip(_NAMES, args)), **kwargs)

    def stays_dense(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tokens: int,
        least: int,
        mask: torch.Tensor | None = None,
        extra: int = 0,
    ) -> str | None:
        """Why the call is left alone; None where it is attention of the video's tokens among themselves.

        Args:
            q: the query, or a fake of it.
            k: the key.
            v: the value.
            tokens: tokens of the layout, extra ones included; may be symbolic.
            least: fewest tokens worth it.
            mask: the key mask that stands for the call's mask, or a fake of it.
            extra: extra tokens among them: a mask may hide those.
        """
        if q.dim() != 4:
            return f"q has {q.dim()} dimensions, not [B, H, S, D]"
        if free_unbacked_symbols(q.shape[2]) or free_unbacked_symbols(k.shape[2]):
            return (
                "how many tokens it has depends on data (each sample by itself, without its padding): use compile=False"
            )
        if q.shape[2] != tokens or k.shape[2] != tokens:
            return (
                f"{_size(q.shape[2])} queries and {_size(k.shape[2])} keys are not the layout's {_size(tokens)} tokens"
            )
        if self.attn_mask is not None and mask is None:
            shape = f" {tuple(map(_size, self.attn_mask.shape))}" if isinstance(self.attn_mask, torch.Tensor) else ""
            return f"it has an attention mask{shape}, maybe not the same for every query: give one [B, 1, 1, {_size(tokens)}]"
        if mask is not None:
            if not extra:
                return "it has an attention mask, and no text tokens that it could hide"
            reason = mask_shape(mask, tokens)
            if reason is not None:
                return reason
        if self.is_causal:
            return "it is causal"
        if self.dropout_p:
            return f"it has dropout {self.dropout_p}"
        if q.shape[0] != k.shape[0] or k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
            return f"shapes {tuple(map(_size, q.shape))}, {tuple(map(_size, k.shape))}, {tuple(map(_size, v.shape))} differ"
        if tokens < least:
            return f"{_size(tokens)} tokens are below min_tokens={least}"
        return None


def _size(size: Any) -> str:
    """A size as text; of a symbolic one what it was when the graph was traced."""
    return str(size.node.hint if isinstance(size, torch.SymInt) else size)
