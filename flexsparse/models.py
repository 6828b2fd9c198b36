"""What must be known of a model's class to tell where its tokens lie: a table, for what cannot be read off the model.

Another model needs nothing if its input is ``hidden_states [B, C, T, H, W]`` and its attention joins video tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Part:
    """A tensor of video tokens, of which each rank of a sequence takes its part; as diffusers' `ContextParallelInput`.

    Attributes:
        split_dim: dimension of the tokens.
        expected_dims: dimensions of the tensor; one with others is left whole.
    """

    split_dim: int
    expected_dims: int


@dataclass(frozen=True)
class Whole:
    """A tensor that is put together from all ranks' parts; as diffusers' `ContextParallelOutput`.

    Attributes:
        gather_dim: dimension of the tokens.
    """

    gather_dim: int


@dataclass(frozen=True)
class Joined:
    """A tensor of video tokens and the text that joins them (a key mask): a rank takes its part of the video, and all text.

    Attributes:
        split_dim: dimension of the tokens.
        expected_dims: dimensions of the tensor; one with others is left whole.
    """

    split_dim: int
    expected_dims: int


@dataclass(frozen=True)
class Leading:
    """An int: the first so many video tokens; for a rank those of them that it holds. Not every variant of a class takes it."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Where a class's tokens lie.

    Attributes:
        axes: axes of the video input, as in einops.
        sizes: names of the arguments that are the grid, where the input is a sequence of tokens already.
        text: names of the arguments ``[B, L, ...]`` whose L tokens join the video's in attention.
        text_at: whether they come before or after the video's.
        trimmed: name of the mask ``[B, L]`` of text that a call with one sample leaves out; "" where none does.
        history: names of video latents ``[B, C, T, H, W]`` whose tokens come before the video's, and their patch sizes;
            sizes are rounded up to whole patches.
        ragged: whether a call may have less text than that (a model that runs each sample by itself, without its padding).
        gates: name patterns of the attention modules that see the video; () to recognise them by their projections.
        plan: where sequence parallelism cuts video tokens, and joins them (`distributed.ulysses`); text is never cut. {} for
            the class's own ``_cp_plan``.
        refused: why `wrap` refuses the class, and what to do, after "it"; "" for a class that it takes.
        watched_by: what else attends to the video's tokens, so that a rank's part of them is not enough; "" for nothing.
    """

    axes: str = "B C T H W"
    sizes: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    text_at: Literal["first", "last"] = "last"
    trimmed: str = ""
    history: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    ragged: bool = False
    gates: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    watched_by: str = ""


def _plan(
    first: str, tables: Mapping[str, Any], more: Mapping[str, Any] | None = None, last: str = "proj_out"
) -> Mapping[str, Any]:
    """A plan: hidden states are cut before the block ``first``, and joined after the module ``last``."""
    return MappingProxyType({**tables, first: {"hidden_states": Part(1, 3)}, last: Whole(1), **(more or {})})


def _history(whole: str, half: str, quarter: str) -> Mapping[str, tuple[int, int, int]]:
    """Patches of ``(1, 2, 2)``, of twice and of four times its sides: older frames take fewer tokens."""
    return MappingProxyType({whole: (1, 2, 2), half: (2, 4, 4), quarter: (4, 8, 8)})


TEXT = ("encoder_hidden_states",)
BLOCK = "transformer_blocks.0"
ROTARY = {"rope": {0: Part(0, 2), 1: Part(0, 2)}}
COGVIDEO_PLAN = _plan(BLOCK, {"": {"image_rotary_emb": Part(0, 2)}})
ATTN1 = ("transformer_blocks.*.attn1",)
COGVIDEO = Known(axes="B T C H W", text=TEXT, text_at="first", gates=ATTN1, plan=COGVIDEO_PLAN)
SIZES = ("num_frames", "height", "width")
COSMOS_TOKENS = {name: Part(1, 3) for name in ("extra_pos_emb", "controlnet_residual", "temb", "embedded_timestep")}
KANDINSKY_PLAN = MappingProxyType(
    {
        "visual_transformer_blocks.0": {"visual_embed": Part(1, 3)},
        "visual_transformer_blocks.*": {"rope": Part(1, 6)},
        "visual_transformer_blocks.-1": Whole(1),
    }
)
HUNYUAN_GATES = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
HUNYUAN_BLOCKS = {
    f"{blocks}.*": {"attention_mask": Joined(3, 4), "num_tokens": Leading()}
    for blocks in ("transformer_blocks", "single_transformer_blocks")
}

ALONE = "leave it unwrapped, and call flexsparse.sparse_attention in an attention processor of yours"
FLEX = f"attends to its video through FlexAttention with a mask of its own, which is not replaced: {ALONE}"

KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        "CogVideoXTransformer3DModel": COGVIDEO,
        "ConsisIDTransformer3DModel": COGVIDEO,
        "HunyuanVideoTransformer3DModel": Known(
            text=TEXT, gates=HUNYUAN_GATES, plan=_plan(BLOCK, ROTARY, HUNYUAN_BLOCKS)
        ),
        "HunyuanVideo15Transformer3DModel": Known(
            text=(*TEXT, "encoder_hidden_states_2", "image_embeds"), gates=HUNYUAN_GATES[:1], plan=_plan(BLOCK, ROTARY)
        ),
        "HunyuanVideoFramepackTransformer3DModel": Known(
            text=(*TEXT, "image_embeds"),
            trimmed="encoder_attention_mask",
            history=_history("latents_clean", "latents_history_2x", "latents_history_4x"),
            gates=HUNYUAN_GATES,
            watched_by="history",
        ),
        "HeliosTransformer3DModel": Known(
            history=_history("latents_history_short", "latents_history_mid", "latents_history_long"),
            gates=("blocks.*.attn1",),
            watched_by="history",
        ),
        "AnyFlowFARTransformer3DModel": Known(refused=FLEX),
        "AnyFlowTransformer3DModel": Known(axes="B T C H W", gates=("blocks.*.attn1",)),
        "LTXVideoTransformer3DModel": Known(sizes=SIZES, gates=ATTN1),
        "LTX2VideoTransformer3DModel": Known(sizes=SIZES, gates=ATTN1, watched_by="audio"),
        "CosmosTransformer3DModel": Known(  # joined early: the time of each token is not cut for what follows
            plan=_plan(
                BLOCK,
                {"rope": {0: Part(0, 2), 1: Part(0, 2)}},
                {"transformer_blocks.*": COSMOS_TOKENS},
                "transformer_blocks.-1",
            )
        ),
        "Cosmos3OmniTransformer": Known(
            refused="attends from its video to text that does not attend back, which is no attention of one sequence: "
            f"{ALONE} (layout= of the video, kv_layout= with text_first=)"
        ),
        "EasyAnimateTransformer3DModel": Known(
            text=(*TEXT, "encoder_hidden_states_t5"),
            text_at="first",
            gates=ATTN1,
            plan=_plan(BLOCK, {"rope_embedding": {0: Part(0, 2), 1: Part(0, 2)}}),
        ),
        "Kandinsky5Transformer3DModel": Known(
            axes="B T H W C", gates=("visual_transformer_blocks.*.self_attention",), plan=KANDINSKY_PLAN
        ),
        "Kandinsky6Transformer3DModel": Known(
            axes="B T H W C",
            gates=("visual_transformer_blocks.*.video_dec_block.self_attention",),
            watched_by="audio",
        ),
        "Kandinsky6SRTransformer3DModel": Known(refused=FLEX),
        "MiniMaxH3Transformer3DModel": Known(gates=("transformer_blocks.*.attn",), watched_by="audio"),
        "MotifVideoTransformer3DModel": Known(text=(*TEXT, "image_embeds"), gates=HUNYUAN_GATES),
        "MochiTransformer3DModel": Known(
            text=TEXT,
            ragged=True,
            gates=ATTN1,
            plan=_plan(BLOCK, {"rope": {0: Part(0, 3), 1: Part(0, 3)}}),
        ),
        "SanaVideoTransformer3DModel": Known(refused="has linear attention, which selects nothing: leave it unwrapped"),
        "WanAnimate2Transformer3DModel": Known(refused=FLEX),
        "WanVACETransformer3DModel": Known(
            plan=_plan(
                "blocks.0",
                {"rope": {0: Part(1, 4), 1: Part(1, 4)}},
                {
                    "vace_blocks.*": {"hidden_states": Part(1, 3)},
                    "vace_blocks.0": {"control_hidden_states": Part(1, 3)},
                },
            )
        ),
        "AllegroTransformer3DModel": Known(plan=_plan(BLOCK, {"": {"image_rotary_emb": (None, Part(1, 2))}})),
        "SkyReelsV2Transformer3DModel": Known(  # joined early: what follows may take a time of each token (diffusion forcing)
            plan=_plan(
                "blocks.0", {"rope": {0: Part(1, 4), 1: Part(1, 4)}}, {"blocks.*": {"temb": Part(2, 4)}}, "blocks.-1"
            )
        ),
    }
)


def known(model: nn.Module) -> Known:
    """What the table says of a model's class or of one that it derives from (FSDP derives a class of its own)."""
    for kind in type(model).__mro__:
        if kind.__name__ in KNOWN:
            return KNOWN[kind.__name__]
    return Known()
