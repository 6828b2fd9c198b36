"""Trainable block-sparse attention for video diffusion transformers, integrated with torch.compile."""

from flexsparse import distributed, masks, nn
from flexsparse.attention import AttentionAux, sparse_attention
from flexsparse.compiler import backend
from flexsparse.gate_files import load_gates, save_gates
from flexsparse.gates import gate_parameters
from flexsparse.layout import TileLayout
from flexsparse.masks import (
    BSA,
    VSA,
    Dense,
    FrameCausal,
    Intersection,
    PerHead,
    Radial,
    SlidingTile,
    TopP,
    Union,
)
from flexsparse.ops import flop_formulas as _flop_formulas  # noqa: F401  # registers them with torch
from flexsparse.schedule import SparsitySchedule
from flexsparse.selection import KeptQueries, TileSelection
from flexsparse.steps import DenseSteps
from flexsparse.wrap import report, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "BSA",
    "VSA",
    "AttentionAux",
    "Dense",
    "DenseSteps",
    "FrameCausal",
    "Intersection",
    "KeptQueries",
    "PerHead",
    "Radial",
    "SlidingTile",
    "SparsitySchedule",
    "TileLayout",
    "TileSelection",
    "TopP",
    "Union",
    "backend",
    "distributed",
    "gate_parameters",
    "load_gates",
    "masks",
    "nn",
    "report",
    "save_gates",
    "sparse_attention",
    "unwrap",
    "wrap",
]
