"""Mask builders, one a file: each maps (q, k, layout) to a `TileSelection`."""

from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.bsa import BSA
from flexsparse.masks.coarse import CoarseInputs, keep_top
from flexsparse.masks.combine import Intersection, PerHead, Union
from flexsparse.masks.dense import Dense
from flexsparse.masks.frame_causal import FrameCausal
from flexsparse.masks.radial import Radial
from flexsparse.masks.sliding_tile import SlidingTile
from flexsparse.masks.static import StaticBuilder
from flexsparse.masks.top_p import TopP
from flexsparse.masks.vsa import VSA

__all__ = [
    "BSA",
    "VSA",
    "CoarseInputs",
    "Dense",
    "FrameCausal",
    "Intersection",
    "MaskBuilder",
    "PerHead",
    "Radial",
    "SlidingTile",
    "StaticBuilder",
    "TopP",
    "Union",
    "keep_top",
]
