"""Models whose attention joins text with the video."""

from __future__ import annotations

from typing import Any

import torch

from .entry import TEXT, Entry, Size, history, history_tokens, lengths, random
from .wan_models import wan_inputs


def _hunyuan(grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, *grid),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "pooled_projections": random(batch, 8),
        "encoder_attention_mask": lengths(batch, TEXT),
        "guidance": torch.ones(batch),
    }


def _hunyuan15(grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, *grid),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": random(batch, 6, 16),
        "encoder_attention_mask": lengths(batch, 6),
        "encoder_hidden_states_2": random(batch, 4, 8),
        "encoder_attention_mask_2": torch.ones(batch, 4).long(),
        "image_embeds": torch.zeros(batch, 3, 12),
    }


def _framepack(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    names = ("latents_clean", "latents_history_2x", "latents_history_4x")
    latents, frames, own = history(names, grid, batch)
    return {
        **_hunyuan((T, 2 * H, 2 * W), batch),
        **latents,
        **frames,
        "indices_latents": own,
        "image_embeds": random(batch, 3, 12),
    }


def _cogvideox(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": random(batch, T, 4, 2 * H, 2 * W),
        "encoder_hidden_states": random(batch, 8, 8),
        "timestep": torch.full((batch,), 5),
    }


def _mochi(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": random(batch, 12, T, 2 * H, 2 * W),
        "encoder_hidden_states": random(batch, 16, 16),
        "timestep": torch.full((batch,), 5),
        "encoder_attention_mask": lengths(batch, 16).bool(),
    }


def _easyanimate(grid: Size, batch: int) -> dict[str, Any]:
    return {
        **wan_inputs(grid, batch),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states_t5": random(batch, 5, 8),
    }


def _motif(grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, *grid),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "encoder_attention_mask": lengths(batch, TEXT),
        "image_embeds": random(batch, 3, 12),
    }


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
HUNYUAN15 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "image_embed_dim": 12,
    "rope_axes_dim": (2, 2, 4),
    "target_size": 16,
    "task_type": "t2v",
}
FRAMEPACK = HUNYUAN | {
    "patch_size": 2,
    "has_image_proj": True,
    "image_proj_dim": 12,
    "has_clean_x_embedder": True,
    "num_layers": 2,  # the class names no blocks: they are known by being several
    "num_single_layers": 2,
    "num_refiner_layers": 2,
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 13,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 8,
    "use_rotary_positional_embeddings": False,
}
MOCHI = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 12,
    "out_channels": None,
    "qk_norm": "rms_norm",
    "text_embed_dim": 16,
    "time_embed_dim": 4,
    "activation_fn": "swiglu",
    "max_sequence_length": 16,
}
EASYANIMATE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "mmdit_layers": 1,  # the second block has one set of weights for video and text
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "text_embed_dim_t5": 8,
}
MOTIF = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "mlp_ratio": 2,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "image_embed_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}

TRANSFORMER_BLOCKS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")

MODELS: dict[str, Entry] = {
    "hunyuan": Entry(
        make=("HunyuanVideoTransformer3DModel", HUNYUAN),
        inputs=_hunyuan,
        text=(0, TEXT),
        sparse=("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
    ),
    "hunyuan15": Entry(
        make=("HunyuanVideo15Transformer3DModel", HUNYUAN15),
        inputs=_hunyuan15,
        text=(0, 13),
        sparse=("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
        whole=False,
    ),
    "framepack": Entry(
        make=("HunyuanVideoFramepackTransformer3DModel", FRAMEPACK),
        inputs=_framepack,
        text=(0, TEXT + 3),
        history=history_tokens,
        sparse=tuple(
            f"{blocks}.{i}.attn" for blocks in ("transformer_blocks", "single_transformer_blocks") for i in range(2)
        ),
        whole=False,
    ),
    "cogvideox": Entry(
        make=("CogVideoXTransformer3DModel", COGVIDEOX), inputs=_cogvideox, text=(8, 0), sparse=TRANSFORMER_BLOCKS
    ),
    "mochi": Entry(
        make=("MochiTransformer3DModel", MOCHI),
        inputs=_mochi,
        text=(0, 16),
        sparse=TRANSFORMER_BLOCKS,
        whole=False,
        regional=False,
    ),
    "easyanimate": Entry(
        make=("EasyAnimateTransformer3DModel", EASYANIMATE),
        inputs=_easyanimate,
        text=(TEXT + 5, 0),
        sparse=TRANSFORMER_BLOCKS,
    ),
    "motif": Entry(
        make=("MotifVideoTransformer3DModel", MOTIF),
        inputs=_motif,
        text=(0, TEXT + 3),
        sparse=("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
    ),
}
