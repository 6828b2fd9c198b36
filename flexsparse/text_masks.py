"""The text that key masks leave of a call's samples, and what uncompiled calls find in masks.

Shape letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import weakref
from functools import cached_property

import torch
from torch import Tensor

from flexsparse.layout import TileLayout
from flexsparse.ops.text_lengths import found_in, key_mask_of


class TextMask:
    """The text of each sample that is attended to; what it needs is computed once, however many layers share it.

    Args:
        lengths: extra tokens that are left, int32 ``[B, 2]``: before and after the video; B may be 1, for all samples.
        layout: of the keys.
    """

    def __init__(self, lengths: Tensor, layout: TileLayout) -> None:
        self.lengths, self.layout = lengths, layout

    @classmethod
    def of(cls, mask: Tensor, layout: TileLayout) -> TextMask:
        """Of a key mask ``[B, 1, 1, S]``.

        Raises:
            ValueError: the mask hides more than the padding of text (on CUDA the device asserts).
        """
        return cls(torch.ops.flexsparse.text_lengths(mask, layout.text_first, layout.text_last), layout)

    @cached_property
    def hidden(self) -> Tensor:
        """Which tokens are text past its lengths: bool ``[B, S]``."""
        layout, lengths = self.layout, self.lengths
        position = torch.arange(layout.seq_len, device=lengths.device)
        after = position - (layout.text_first + layout.num_tokens)
        return (position < layout.text_first) & (position >= lengths[:, :1]) | (after >= lengths[:, 1:])

    @cached_property
    def keys(self) -> Tensor:
        """The key mask ``[B, 1, 1, S]``."""
        return ~self.hidden[:, None, None]

    @cached_property
    def counts(self) -> Tensor:
        """Valid tokens of every tile: int32 ``[B, tiles]``."""
        layout, lengths = self.layout, self.lengths
        counts = layout.index(lengths.device)[2].expand(lengths.shape[0], -1)

        def of_text(tiles: int, length: Tensor) -> Tensor:
            start = torch.arange(tiles, device=lengths.device) * layout.slots
            return (length - start).clamp(0, layout.slots).to(torch.int32)

        video = counts.narrow(-1, layout.tiles_first, layout.num_tiles)
        before, after = of_text(layout.tiles_first, lengths[:, :1]), of_text(layout.tiles_last, lengths[:, 1:])
        return torch.cat([before, video, after], -1)

    def hide(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v ``[B, H, S, D]`` with what is hidden zeroed: what lies there may be anything, NaN included."""
        hidden = self.hidden[:, None, :, None]
        return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)


class SeenMask:
    """The mask of an uncompiled call, looked at once: on CUDA each look waits for the device.

    Args:
        mask: any that scaled_dot_product_attention takes. One ``[B, 1, S, S]`` is held weakly: it is as large as the scores
            that sparse attention does not compute.

    Attributes:
        keys: what it says of keys ``[B, 1, 1, S]``; None where that differs from query to query.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = weakref.ref(mask)
        self._version = None if mask.is_inference() else mask._version
        self.keys = mask if mask.dim() == 4 and mask.shape[2] == 1 else key_mask_of(mask)
        self._said: dict[tuple[int, int], tuple[Tensor, str | None]] = {}
        self._texts: dict[TileLayout, TextMask] = {}

    def is_of(self, mask: Tensor) -> bool:
        """Whether it is this mask, and nobody has written to it since; tensors of inference mode do not count that."""
        return self._mask() is mask and self._version is not None and self._version == mask._version

    def stays_dense(self, layout: TileLayout) -> str | None:
        """Why a key mask needs dense attention; None where a sparse call can take it."""
        return self._say(layout)[1]

    def text(self, layout: TileLayout) -> TextMask:
        """The text that a mask leaves which a sparse call can take; of the keys' layout."""
        if layout not in self._texts:
            self._texts[layout] = TextMask(self._say(layout)[0], layout)
        return self._texts[layout]

    def _say(self, layout: TileLayout) -> tuple[Tensor, str | None]:
        extra = layout.text_first, layout.text_last
        if extra not in self._said:
            assert self.keys is not None, "there is no key mask"
            self._said[extra] = found_in(self.keys, *extra)
        return self._said[extra]


class SeenMasks:
    """The masks of one thread's forward, whose layers are given the same."""

    def __init__(self) -> None:
        self._seen: list[SeenMask] = []

    def of(self, mask: Tensor) -> SeenMask:
        """A mask that a call was given."""
        for seen in self._seen:
            if seen.is_of(mask):
                return seen
        self._seen = [SeenMask(mask), *self._seen[:3]]  # those of streams and cross-attention come in turns
        return self._seen[0]

    def forget(self) -> None:
        """At the end of a forward."""
        self._seen.clear()
