"""What the papers print, typed once: VSA, arXiv 2505.13389, Table 1 (120M model unless stated, 16,384 latent tokens, 87.5 % of
the tiles left out), and the claim in words of BSA. Nothing else in the study's report is typed by hand."""

from __future__ import annotations

SOURCE = "arXiv 2505.13389, Table 1"
SMALL_BUDGET, LARGE_BUDGET = "4.5e20 FLOPs", "4e21 FLOPs"

ATTENTIONS: dict[str, tuple[str, float, float | None]] = {
    "dense": ("Full", 0.13877, 0.12703),
    "vsa": ("VSA", 0.13162, 0.12687),
    "sliding_tile": ("Strided Window", 0.13271, 0.12716),
    "fine_only": ("F, without O_c", 0.13296, None),
    "spatial_full": ("Spatial-Full", 0.13555, 0.12811),
    "spatial_temporal": ("Spatial-Temporal", 0.13574, 0.13034),
    "compressed_kv": ("CompressKV", 0.15281, 0.14282),
}
"""Our method -> the paper's name and its losses at the small and the large budget. The sliding tile is the nearest that is
here to the paper's strided window, and not the same."""

PARTS: dict[str, float] = {
    "vsa": 0.13162,
    "fine_only": 0.13296,
    "vsa_tile16": 0.13155,
    "vsa_tile128": 0.13244,
    "vsa_tile256": 0.13375,
    "vsa_max": 0.13929,
}
"""Variant -> the paper's loss, at the small budget."""

SHARING_PAYS = 0.5
"""Least overlap of neighbouring query tiles' lists at which loading KV tiles once for both was found worthwhile (a design
decision of this project, no paper's number)."""
