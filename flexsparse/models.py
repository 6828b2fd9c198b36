"""What must be known of a model's class to tell where its tokens lie: a table, for what cannot be read off the model.

Another model needs nothing if its input is ``hidden_states [B, C, T, H, W]`` and its attention joins video tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Known:
    """Where a class's tokens lie.

    Attributes:
        axes: axes of the video input, as in einops.
        sizes: names of the arguments that are the grid, where the input is a sequence of tokens already.
        text: names of the arguments ``[B, L, ...]`` whose L tokens join the video's in attention.
        text_at: whether they come before or after the video's.
        ragged: whether a call may have fewer of them (a model that runs each sample by itself, without its padding).
        gates: name patterns of the attention modules that see the video; () to recognise them by their projections.
    """

    axes: str = "B C T H W"
    sizes: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    text_at: Literal["first", "last"] = "last"
    ragged: bool = False
    gates: tuple[str, ...] = ()


TEXT = ("encoder_hidden_states",)
COGVIDEO = Known(axes="B T C H W", text=TEXT, text_at="first", gates=("transformer_blocks.*.attn1",))
HUNYUAN_GATES = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")

KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        "CogVideoXTransformer3DModel": COGVIDEO,
        "ConsisIDTransformer3DModel": COGVIDEO,
        "HunyuanVideoTransformer3DModel": Known(text=TEXT, gates=HUNYUAN_GATES),
        "HunyuanVideo15Transformer3DModel": Known(
            text=(*TEXT, "encoder_hidden_states_2", "image_embeds"), gates=HUNYUAN_GATES[:1]
        ),
        "LTXVideoTransformer3DModel": Known(
            sizes=("num_frames", "height", "width"), gates=("transformer_blocks.*.attn1",)
        ),
        "MochiTransformer3DModel": Known(text=TEXT, ragged=True, gates=("transformer_blocks.*.attn1",)),
    }
)


def known(model: nn.Module) -> Known:
    """What the table says of a model's class or of one that it derives from (FSDP derives a class of its own)."""
    for kind in type(model).__mro__:
        if kind.__name__ in KNOWN:
            return KNOWN[kind.__name__]
    return Known()
