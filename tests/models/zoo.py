"""Video transformers of diffusers, tiny and random: how each is made and called, and which attention calls see the video."""

from __future__ import annotations

from . import cross_models, joint_models, wan_models
from .cross_models import ALLEGRO, COSMOS, KANDINSKY5, LTX, LTX2
from .entry import TEXT, Entry, Size
from .joint_models import COGVIDEOX, EASYANIMATE, HUNYUAN, HUNYUAN15, MOCHI, MOTIF
from .wan_models import WAN

__all__ = [
    "ALLEGRO",
    "COGVIDEOX",
    "COSMOS",
    "EASYANIMATE",
    "HUNYUAN",
    "HUNYUAN15",
    "KANDINSKY5",
    "LTX",
    "LTX2",
    "MOCHI",
    "MOTIF",
    "NOT_CALLED",
    "TEXT",
    "WAN",
    "ZOO",
    "Entry",
    "Size",
]

ZOO: dict[str, Entry] = {**wan_models.MODELS, **joint_models.MODELS, **cross_models.MODELS}

NOT_CALLED = {
    "anyflow": "AnyFlowTransformer3DModel needs r_timestep",
    "framepack": "HunyuanVideoFramepackTransformer3DModel needs indices_latents",
    "kandinsky6": "Kandinsky6Transformer3DModel's configuration lacks a width",
    "wan-animate": "WanAnimateTransformer3DModel needs pose_hidden_states",
}
"""Models that `flexsparse inspect` does not call, and what it says."""
