"""Our selection as other packages' lists.

Shape letters: B batch, H query heads, N query tiles, M KV tiles, K list length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bench.baselines.protocol import Problem, Unavailable
from flexsparse.tile_bits import ascending_lists


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """What block-sparse kernels read, contiguous int32; past a count lies 0.

    Attributes:
        q2k: ``[B, H, N, K]`` KV tiles of each query tile, ascending.
        q2k_counts: ``[B, H, N]``.
        k2q: ``[B, H, M, N]`` query tiles that keep each KV tile, ascending; None where it was not asked for.
        k2q_counts: ``[B, H, M]``, or None.
        sizes: ``[M]`` valid tokens of each KV tile.
        fixed: kept tiles of a row where all rows keep equally many, else None.
    """

    q2k: Tensor
    q2k_counts: Tensor
    k2q: Tensor | None
    k2q_counts: Tensor | None
    sizes: Tensor
    fixed: int | None


def lists_of(problem: Problem, name: str, columns: bool) -> Lists:
    """The lists of a problem's selection.

    Args:
        columns: whether the transposed lists are wanted.

    Raises:
        Unavailable: what tiles alone do not say (extra tokens, pruned queries, counts that differ by batch).
    """
    selection, layout = problem.selection, problem.layout
    if layout.tiles_first or layout.tiles_last or selection.queries is not None or selection.kv_layout != layout:
        raise Unavailable(f"{name} takes video tokens alone: no extra tokens, no pruned queries, keys on the same grid")
    sizes = selection.kv_tile_counts()
    if sizes.dim() != 1:
        raise Unavailable(f"{name} takes one count of valid tokens a tile, and this selection has one a batch entry")
    keep, counts = selection.keep(), selection.counts
    least, most = (int(x) for x in counts.aminmax())
    k2q = k2q_counts = None
    if columns:
        by_column = keep.transpose(-1, -2).contiguous()
        k2q, k2q_counts = ascending_lists(by_column, layout.num_tiles), by_column.sum(-1).int()
    return Lists(
        q2k=ascending_lists(keep, max(most, 1)),
        q2k_counts=counts.int().contiguous(),
        k2q=k2q,
        k2q_counts=k2q_counts,
        sizes=sizes.int().contiguous(),
        fixed=most if least == most else None,
    )
