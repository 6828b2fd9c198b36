"""Video transformers of diffusers, tiny and random: how each is made and called, and which attention calls see the video."""

from __future__ import annotations

from . import cross_models, joint_models, wan_models
from .cross_models import ALLEGRO, LTX
from .entry import TEXT, Entry, Size
from .joint_models import COGVIDEOX, HUNYUAN, HUNYUAN15, MOCHI
from .wan_models import WAN

__all__ = ["ALLEGRO", "COGVIDEOX", "HUNYUAN", "HUNYUAN15", "LTX", "MOCHI", "TEXT", "WAN", "ZOO", "Entry", "Size"]

ZOO: dict[str, Entry] = {**wan_models.MODELS, **joint_models.MODELS, **cross_models.MODELS}
