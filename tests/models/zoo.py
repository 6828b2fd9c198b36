"""Video transformers of diffusers, tiny and random: how each is made and called, and which attention calls see the video."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEXT = 12
Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model.

    Attributes:
        make: class name and configuration.
        inputs: keyword arguments of a call on a token grid, for a batch.
        text: (text_first, text_last) tokens of its joint attention.
        sparse: names of the attention calls that see the video, in the order of the model's modules.
        whole: whether the model can be compiled as one graph.
        regional: whether its blocks can.
    """

    make: tuple[str, dict[str, Any]]
    inputs: Callable[[Size, int], dict[str, Any]]
    sparse: tuple[str, ...]
    text: tuple[int, int] = (0, 0)
    whole: bool = True
    regional: bool = True

    def model(self) -> nn.Module:
        """A fresh one; its parameters are random, those that start at zero too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers

            torch.manual_seed(0)
            model = getattr(diffusers, self.make[0])(**self.make[1])
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        return model.eval()


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _lengths(batch: int, tokens: int) -> Tensor:
    """A mask ``[B, L]`` in which every sample has another number of valid tokens."""
    return (torch.arange(tokens) < tokens - 3 * torch.arange(batch)[:, None]).long()


def _wan(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": _random(batch, 4, T, 2 * H, 2 * W),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": _random(batch, TEXT, 16),
    }


def _wan_ti2v(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {**_wan(grid, batch), "timestep": torch.arange(T * H * W).expand(batch, -1) % 7}


def _hunyuan(grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _random(batch, 4, *grid),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": _random(batch, TEXT, 16),
        "pooled_projections": _random(batch, 8),
        "encoder_attention_mask": _lengths(batch, TEXT),
        "guidance": torch.ones(batch),
    }


def _hunyuan15(grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _random(batch, 4, *grid),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": _random(batch, 6, 16),
        "encoder_attention_mask": _lengths(batch, 6),
        "encoder_hidden_states_2": _random(batch, 4, 8),
        "encoder_attention_mask_2": torch.ones(batch, 4).long(),
        "image_embeds": torch.zeros(batch, 3, 12),
    }


def _cogvideox(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": _random(batch, T, 4, 2 * H, 2 * W),
        "encoder_hidden_states": _random(batch, 8, 8),
        "timestep": torch.full((batch,), 5),
    }


def _ltx(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": _random(batch, T * H * W, 4),
        "encoder_hidden_states": _random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 5),
        "encoder_attention_mask": _lengths(batch, TEXT).bool(),
        "num_frames": T,
        "height": H,
        "width": W,
    }


def _mochi(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": _random(batch, 12, T, 2 * H, 2 * W),
        "encoder_hidden_states": _random(batch, 16, 16),
        "timestep": torch.full((batch,), 5),
        "encoder_attention_mask": _lengths(batch, 16).bool(),
    }


def _allegro(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": _random(batch, 4, T, 2 * H, 2 * W),
        "encoder_hidden_states": _random(batch, 1, TEXT, 16),
        "timestep": torch.full((batch,), 5),
        "encoder_attention_mask": _lengths(batch, TEXT)[:, None].float(),
    }


def _vace(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {**_wan(grid, batch), "control_hidden_states": _random(batch, 8, T, 2 * H, 2 * W)}


def _cosmos(grid: Size, batch: int) -> dict[str, Any]:
    return {**_wan(grid, batch), "timestep": torch.full((batch,), 5.0), "fps": 30}


def _ltx2(grid: Size, batch: int) -> dict[str, Any]:
    return {
        **_ltx(grid, batch),
        "audio_hidden_states": _random(batch, 10, 4),
        "audio_encoder_hidden_states": _random(batch, TEXT, 16, seed=2),
        "audio_encoder_attention_mask": _lengths(batch, TEXT).bool(),
        "audio_num_frames": 10,
    }


def _easyanimate(grid: Size, batch: int) -> dict[str, Any]:
    return {
        **_wan(grid, batch),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states_t5": _random(batch, 5, 8),
    }


def _kandinsky5(grid: Size, batch: int) -> dict[str, Any]:
    T, H, W = grid
    return {
        "hidden_states": _random(batch, T, 2 * H, 2 * W, 4),
        "encoder_hidden_states": _random(batch, TEXT, 16),
        "timestep": torch.full((batch,), 5.0),
        "pooled_projections": _random(batch, 8),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(TEXT),
    }


def _motif(grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _random(batch, 4, *grid),
        "timestep": torch.full((batch,), 5.0),
        "encoder_hidden_states": _random(batch, TEXT, 16),
        "encoder_attention_mask": _lengths(batch, TEXT),
        "image_embeds": _random(batch, 3, 12),
    }


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
LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
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
LTX2 = LTX | {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "rope_double_precision": False,
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

BLOCKS = ("blocks.0.attn1", "blocks.1.attn1")
TRANSFORMER_BLOCKS = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
ZOO: dict[str, Entry] = {
    "wan": Entry(make=("WanTransformer3DModel", WAN), inputs=_wan, sparse=BLOCKS),
    "wan-ti2v": Entry(make=("WanTransformer3DModel", WAN), inputs=_wan_ti2v, sparse=BLOCKS),
    "skyreels": Entry(make=("SkyReelsV2Transformer3DModel", WAN), inputs=_wan, sparse=BLOCKS),
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
    "cogvideox": Entry(
        make=("CogVideoXTransformer3DModel", COGVIDEOX), inputs=_cogvideox, text=(8, 0), sparse=TRANSFORMER_BLOCKS
    ),
    "ltx": Entry(make=("LTXVideoTransformer3DModel", LTX), inputs=_ltx, sparse=TRANSFORMER_BLOCKS),
    "mochi": Entry(
        make=("MochiTransformer3DModel", MOCHI),
        inputs=_mochi,
        text=(0, 16),
        sparse=TRANSFORMER_BLOCKS,
        whole=False,
        regional=False,
    ),
    "allegro": Entry(make=("AllegroTransformer3DModel", ALLEGRO), inputs=_allegro, sparse=TRANSFORMER_BLOCKS),
    "wan-vace": Entry(
        make=("WanVACETransformer3DModel", WAN | {"vace_layers": [0, 1], "vace_in_channels": 8}),
        inputs=_vace,
        sparse=(*BLOCKS, *(f"vace_{name}" for name in BLOCKS)),
    ),
    "chronoedit": Entry(make=("ChronoEditTransformer3DModel", WAN), inputs=_wan, sparse=BLOCKS),
    "cosmos": Entry(make=("CosmosTransformer3DModel", COSMOS), inputs=_cosmos, sparse=TRANSFORMER_BLOCKS),
    "ltx2": Entry(make=("LTX2VideoTransformer3DModel", LTX2), inputs=_ltx2, sparse=TRANSFORMER_BLOCKS),
    "easyanimate": Entry(
        make=("EasyAnimateTransformer3DModel", EASYANIMATE),
        inputs=_easyanimate,
        text=(TEXT + 5, 0),
        sparse=TRANSFORMER_BLOCKS,
    ),
    "kandinsky5": Entry(
        make=("Kandinsky5Transformer3DModel", KANDINSKY5),
        inputs=_kandinsky5,
        sparse=("visual_transformer_blocks.0.self_attention", "visual_transformer_blocks.1.self_attention"),
    ),
    "motif": Entry(
        make=("MotifVideoTransformer3DModel", MOTIF),
        inputs=_motif,
        text=(0, TEXT + 3),
        sparse=("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
    ),
}
