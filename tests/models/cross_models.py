"""Models of other makes whose text comes in through cross-attention."""

from __future__ import annotations

from typing import Any

import torch

from .entry import TEXT, Entry, Size, lengths, random
from .wan_models import wan_inputs


def _ltx(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": random(batch, T * H * W, 4),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 5),
        "encoder_attention_mask": lengths(batch, TEXT).bool(),
        "num_frames": T,
        "height": H,
        "width": W,
    }


def _ltx2(grid: Size, batch: int) -> dict[str, Any]:
    return {
        **_ltx(grid, batch),
        "audio_hidden_states": random(batch, 10, 4),
        "audio_encoder_hidden_states": random(batch, TEXT, 16, seed=2),
        "audio_encoder_attention_mask": lengths(batch, TEXT).bool(),
        "audio_num_frames": 10,
    }


def _allegro(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": random(batch, 4, T, 2 * H, 2 * W),
        "encoder_hidden_states": random(batch, 1, TEXT, 16),
        "timestep": torch.full((batch,), 5),
        "encoder_attention_mask": lengths(batch, TEXT)[:, None].float(),
    }


def _cosmos(grid: Size, batch: int) -> dict[str, Any]:
    return {**wan_inputs(grid, batch), "timestep": torch.full((batch,), 5.0), "fps": 30}


def _kandinsky5(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": random(batch, T, 2 * H, 2 * W, 4),
        "encoder_hidden_states": random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 5.0),
        "pooled_projections": random(batch, 8),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky6(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": random(batch, T, 2 * H, 2 * W, 9),  # noise, condition and a mask
        "encoder_hidden_states": random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 5.0),
        "pooled_projections": random(batch, 8),
        "audio_hidden_states": random(batch, 7, 3),
    }


LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
LTX2 = LTX | {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "rope_double_precision": False,
}
ALLEGRO = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 16,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 4,
}
COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "patch_size": (1, 2, 2),
    "concat_padding_mask": False,  # True needs torchvision
    "extra_pos_embed_type": "learnable",
}
KANDINSKY5 = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 32,
    "out_visual_dim": 4,
    "patch_size": (1, 2, 2),
    "model_dim": 32,
    "ff_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}
KANDINSKY6 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 32,
    "model_dim": 32,
    "ff_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
    "in_audio_dim": 3,
    "out_audio_dim": 3,
    "ca_rope": True,
    "cross_gates": True,
    "fix_modulation": True,
}

TRANSFORMER_BLOCKS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")

MODELS: dict[str, Entry] = {
    "ltx": Entry(make=("LTXVideoTransformer3DModel", LTX), inputs=_ltx, sparse=TRANSFORMER_BLOCKS),
    "ltx2": Entry(make=("LTX2VideoTransformer3DModel", LTX2), inputs=_ltx2, sparse=TRANSFORMER_BLOCKS),
    "allegro": Entry(make=("AllegroTransformer3DModel", ALLEGRO), inputs=_allegro, sparse=TRANSFORMER_BLOCKS),
    "cosmos": Entry(make=("CosmosTransformer3DModel", COSMOS), inputs=_cosmos, sparse=TRANSFORMER_BLOCKS),
    "kandinsky5": Entry(
        make=("Kandinsky5Transformer3DModel", KANDINSKY5),
        inputs=_kandinsky5,
        sparse=("visual_transformer_blocks.0.self_attention", "visual_transformer_blocks.1.self_attention"),
    ),
    "kandinsky6": Entry(
        make=("Kandinsky6Transformer3DModel", KANDINSKY6),
        inputs=_kandinsky6,
        sparse=tuple(f"visual_transformer_blocks.{i}.video_dec_block.self_attention" for i in range(2)),
    ),
}
