"""`flexsparse::text_lengths`: how many extra tokens of each sample a key mask leaves, checked.

A sparse call takes a mask that hides the padding of text: it leaves all video tokens, and a prefix of the extra tokens on
each side.
What it hides are data, so a compiled graph finds out at run time: on CPU an error is raised, on CUDA the device asserts.
Shape letters: B batch, S tokens, N video tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDES = -9000.0
"""A float mask hides at or below this: -10000 rounds to -9984 in bfloat16."""


def mask_shape(mask: Tensor, tokens: int) -> str | None:
    """Why a mask of this shape is no key mask ``[B, 1, 1, S]``; None where it is one. Sizes may be symbolic."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] != tokens:
        return f"its attention mask {tuple(str(size) for size in mask.shape)} is no key mask [B, 1, 1, {tokens}]"
    return None


def _checks(mask: Tensor, first: int, last: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Lengths int32 ``[B, 2]``, and for each thing that must not be whether it is (bool, 0-d)."""
    kept = mask[:, 0, 0]
    wrong = {}
    if kept.dtype != torch.bool:
        wrong["adds a bias that is neither 0 nor hides a token"] = ~((kept == 0) | (kept <= HIDES)).all()
        kept = kept == 0
    S = kept.shape[-1]
    before, video, after = kept[:, :first], kept[:, first : S - last], kept[:, S - last :]
    wrong["hides video tokens"] = ~video.all()
    lengths = []
    for name, part in (("first", before), ("last", after)):
        length = part.sum(-1, dtype=torch.int32)
        prefix = part == (torch.arange(part.shape[-1], device=part.device) < length[:, None])
        wrong[f"leaves {name} text tokens that are no prefix"] = ~prefix.all()
        lengths.append(length)
    return torch.stack(lengths, -1), wrong


def found_in(mask: Tensor, first: int, last: int) -> tuple[Tensor, str | None]:
    """A key mask, looked at: lengths as `text_lengths` has them, and why it needs dense attention.

    None where a sparse call can take it. The device is waited for once.
    """
    lengths, wrong = _checks(mask, first, last)
    found = torch.stack(list(wrong.values())).tolist()
    return lengths, next((f"its attention mask {what}" for what, is_so in zip(wrong, found) if is_so), None)


def key_mask_of(mask: Tensor) -> Tensor | None:
    """The key mask ``[B, 1, 1, S]`` of a mask ``[B, 1, S, S]`` that hides the same keys from every query that may see any.

    Queries that see nothing are those of hidden tokens, whose output nobody reads. None where it is another mask.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    own = mask.diagonal(dim1=-2, dim2=-1)  # whoever may see any key may see its own
    same = [
        (rows == (sees[..., None] & own[..., None, :])).all()
        for rows, sees in zip(mask.split(1024, dim=-2), own.split(1024, dim=-1))  # no second mask of that size
    ]
    return own[..., None, :].contiguous() if bool(torch.stack(same).all()) else None


@torch.library.custom_op("flexsparse::text_lengths", mutates_args=())
def text_lengths(mask: Tensor, first: int, last: int) -> Tensor:
    """Extra tokens that a key mask leaves of each sample, int32 ``[B, 2]``: before and after the video.

    Args:
        mask: ``[B, 1, 1, S]``, bool (True: attended to) or float (0: attended to, at most `HIDES`: not).
        first: extra tokens before the video's.
        last: extra tokens after them.

    Raises:
        ValueError: the mask hides video tokens, leaves no prefix of the text, or adds a bias (on CUDA the device asserts).
    """
    lengths, wrong = _checks(mask, first, last)
    for what, is_so in wrong.items():
        message = (
            f"the attention mask of a sparse call {what}: sparse calls take masks that hide the padding after the text only; "
            "name the layer in wrap(..., dense_layers=[...])"
        )
        if mask.is_cuda:
            torch._assert_async(~is_so, message)
        elif bool(is_so):
            raise ValueError(message)
    return lengths


@text_lengths.register_fake
def _(mask: Tensor, first: int, last: int) -> Tensor:
    return mask.new_empty((mask.shape[0], 2), dtype=torch.int32)
