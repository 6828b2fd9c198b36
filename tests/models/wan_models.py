"""Wan and what is made like it: text comes in through cross-attention, the input is ``[B, C, T, H, W]`` or nearly so."""

from __future__ import annotations

from typing import Any

import torch

from .entry import TEXT, Entry, Size, history, history_tokens, random


def wan_inputs(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": random(batch, 4, T, 2 * H, 2 * W),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": random(batch, TEXT, 16),
    }


def _wan_ti2v(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {**wan_inputs(grid, batch), "timestep": torch.arange(T * H * W).expand(batch, -1) % 7}


def _vace(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {**wan_inputs(grid, batch), "control_hidden_states": random(batch, 8, T, 2 * H, 2 * W)}


def _wan_animate(grid: Size, batch: int) -> dict[str, Any]:
    """The first frame is the reference image, which has no pose; the face has four frames of pixels to one of the video."""
    T, H, W = grid
    return {
        **wan_inputs(grid, batch),
        "hidden_states": random(batch, 12, T, 2 * H, 2 * W),
        "encoder_hidden_states_image": random(batch, 5, 12),
        "pose_hidden_states": random(batch, 4, T - 1, 2 * H, 2 * W),
        "face_pixel_values": random(batch, 3, 4 * (T - 2) + 1, 8, 8),
    }


def _anyflow(grid: Size, batch: int) -> dict[str, Any]:
    T = grid[0]
    return {
        **wan_inputs(grid, batch),
        "hidden_states": wan_inputs(grid, batch)["hidden_states"].transpose(1, 2),
        "timestep": torch.full((batch, T), 5.0),
        "r_timestep": torch.full((batch, T), 3.0),
    }


def _helios(grid: Size, batch: int) -> dict[str, Any]:
    names = ("latents_history_short", "latents_history_mid", "latents_history_long")
    latents, frames, own = history(names, grid, batch)
    indices = {name: one.expand(batch, -1) for name, one in frames.items()}
    return {**wan_inputs(grid, batch), **latents, **indices, "indices_hidden_states": own.expand(batch, -1)}


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
WAN_ANIMATE = WAN | {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 12,
    "added_kv_proj_dim": 32,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8},
    "motion_encoder_size": 8,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
HELIOS = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"} | {
    "rope_dim": (4, 6, 6),
    "is_amplify_history": True,
}

BLOCKS = ("blocks.0.attn1", "blocks.1.attn1")

MODELS: dict[str, Entry] = {
    "wan": Entry(make=("WanTransformer3DModel", WAN), inputs=wan_inputs, sparse=BLOCKS),
    "wan-ti2v": Entry(make=("WanTransformer3DModel", WAN), inputs=_wan_ti2v, sparse=BLOCKS),
    "skyreels": Entry(make=("SkyReelsV2Transformer3DModel", WAN), inputs=wan_inputs, sparse=BLOCKS),
    "wan-vace": Entry(
        make=("WanVACETransformer3DModel", WAN | {"vace_layers": [0, 1], "vace_in_channels": 8}),
        inputs=_vace,
        sparse=(*BLOCKS, *(f"vace_{name}" for name in BLOCKS)),
    ),
    "wan-animate": Entry(
        make=("WanAnimateTransformer3DModel", WAN_ANIMATE),
        inputs=_wan_animate,
        sparse=BLOCKS,
        frozen=(
            "motion_encoder",
            "face_encoder",
        ),  # whose backward aot_eager does not run, in an unwrapped model neither
    ),
    "chronoedit": Entry(make=("ChronoEditTransformer3DModel", WAN), inputs=wan_inputs, sparse=BLOCKS),
    "anyflow": Entry(make=("AnyFlowTransformer3DModel", WAN), inputs=_anyflow, sparse=BLOCKS),
    "helios": Entry(make=("HeliosTransformer3DModel", HELIOS), inputs=_helios, history=history_tokens, sparse=BLOCKS),
}
