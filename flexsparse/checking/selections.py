"""Whether what was selected is what the paper says, in float64 and by the coordinates of tokens.

What backends compute is compared given the selection, so that a wrong one would show nowhere else. Rounding decides where two
scores are nearly alike: a bound says how near.

Shape letters: B batch, H query heads, S tokens in raster order, N tiles, A windows, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexsparse.checking.problems import Problem, membership
from flexsparse.layout import TileLayout
from flexsparse.masks import BSA, VSA, TopP
from flexsparse.schedule import target
from flexsparse.selection import KeptQueries, TileSelection

NEAR = 32 * torch.finfo(torch.float32).eps
"""Of the scores' RMS, of a cosine, of a mass: float32 sums of hundreds of products differ by less."""


def wrong_selection(problem: Problem, inputs: dict[str, Tensor], selection: TileSelection) -> str | None:
    """What is wrong with the selection of a problem's builder; None where nothing is.

    Args:
        problem: its builder is a `VSA`, a `TopP`, or a `BSA` that leaves most options as they are, without text.
        inputs: ``q`` and ``k`` as the builder saw them, on the CPU.
        selection: what it made of them, on the CPU.

    Raises:
        NotImplementedError: another builder.
    """
    builder, member = problem.builder, membership(problem.layout).double()
    q, k = (inputs[name].double() for name in "qk")
    queries = member.expand(*q.shape[:2], -1, -1)
    if isinstance(builder, BSA):
        if _differs(problem.layout, builder) or selection.queries is None:
            raise NotImplementedError(f"nothing checks what {builder} selects")
        wrong = _wrong_queries(problem.layout, builder, q, selection.queries)
        if wrong is not None:
            return wrong
        queries = queries * _is_kept(selection.queries)[:, :, None]
    q = (queries / queries.sum(-1, keepdim=True)) @ q
    k = (member / member.sum(1, keepdim=True)) @ k
    scores = q @ k.repeat_interleave(problem.H // problem.G, 1).mT * problem.D**-0.5
    near = NEAR * float(scores.square().mean().sqrt())
    M = scores.shape[-1]
    if isinstance(builder, VSA):
        least = most = torch.tensor(builder.tiles_kept(M))
    elif isinstance(builder, TopP):
        ranked = scores.softmax(-1).sort(-1, descending=True).values
        before = ranked.cumsum(-1) - ranked
        least, most = ((before < target(builder.mass) + side * (near + NEAR)).sum(-1) for side in (-1, 1))
    elif isinstance(builder, BSA):
        z = torch.special.ndtri(torch.tensor(1 - target(builder.kv_density), dtype=torch.float64))
        threshold = scores.mean(-1, keepdim=True) + z * scores.std(-1, correction=0, keepdim=True)
        bounds = (builder.min_tiles, builder.capacity(M))
        least, most = ((scores > threshold - side * near).sum(-1).clamp(*bounds) for side in (-1, 1))
    else:
        raise NotImplementedError(f"nothing checks what {builder} selects")
    return _wrong_tiles(scores, selection.keep(), least, most, near)


def _wrong_tiles(scores: Tensor, keep: Tensor, least: Tensor, most: Tensor, near: float) -> str | None:
    """Whether every row keeps from ``least`` to ``most`` tiles ``[B, H, N]``, and none that scores below one it leaves out."""
    count = keep.sum(-1)
    for row in ((count < least) | (count > most)).flatten().nonzero()[:1, 0]:
        asked = sorted({int(n.expand_as(count).flatten()[row]) for n in (least, most)})
        return f"keeps {int(count.flatten()[row])} tiles in a row where {' to '.join(map(str, asked))} belong"
    best_left_out = scores.masked_fill(keep, -math.inf).amax(-1, keepdim=True)
    short = float((best_left_out - scores).masked_fill(~keep, -math.inf).amax())
    return None if short <= near else f"keeps a tile whose score is {short:.2e} too low, more than {near:.2e}"


def _differs(layout: TileLayout, builder: BSA) -> bool:
    """Whether a problem of BSA has options that `_wrong_queries` and the threshold do not know."""
    own = (builder.threshold, builder.statistics, builder.score_queries, builder.fill, builder.representative)
    known = ("normal", "row", "kept", "representative", "center")
    return own != known or bool(layout.text_first or layout.text_last or builder.within)


def _is_kept(queries: KeptQueries) -> Tensor:
    """``[B, H, S]``: whether a token takes its own output."""
    return queries.source == torch.arange(queries.source.shape[-1])


def _wrong_queries(layout: TileLayout, builder: BSA, q: Tensor, queries: KeptQueries) -> str | None:
    """What is wrong with the queries that are computed, or with what the others take."""
    kept = _is_kept(queries)
    for tokens in _windows(layout, builder.window or layout.sides):
        centre, number = _centre(layout, tokens), math.ceil(target(builder.keep_queries) * len(tokens))
        own = kept[..., tokens]
        if not bool((own.sum(-1) == number).all()):
            return f"computes {int(own.sum(-1).min())} to {int(own.sum(-1).max())} queries of a window, not {number}"
        if not bool(kept[..., centre].all()):
            return f"leaves out the query of token {centre}, which represents its window"
        if not bool((own | (queries.source[..., tokens] == centre)).all()):
            return f"gives a token another output than that of token {centre}, which represents its window"
        likeness = torch.nn.functional.cosine_similarity(q[..., tokens, :], q[..., centre, None, :], dim=-1)
        others = own & (tokens != centre)
        computed = likeness.masked_fill(~others, -math.inf).amax(-1)
        left_out = likeness.masked_fill(own, math.inf).amin(-1)
        short = float((computed - left_out).amax())
        if short > NEAR:
            return (
                f"computes a query that is {short:.2e} more like its window's than one left out, more than {NEAR:.2e}"
            )
    return _wrong_lists(layout, kept, queries)


def _wrong_lists(layout: TileLayout, kept: Tensor, queries: KeptQueries) -> str | None:
    """Whether the packed lists of every tile hold the tokens that are kept, once each."""
    for tile, own in enumerate(membership(layout).bool()):
        number = int(queries.counts[tile])
        if not bool((kept[..., own].sum(-1) == number).all()):
            return f"counts {number} queries in tile {tile} and computes {int(kept[..., own].sum(-1)[0, 0])}"
        listed = queries.kept[..., tile, :number].sort(-1).values
        tokens = own.nonzero()[:, 0].expand(*kept.shape[:2], -1)[kept[..., own]].view_as(listed)
        if not torch.equal(listed.long(), tokens):
            return f"lists other queries in tile {tile} than it computes"
    return None


def _windows(layout: TileLayout, window: tuple[int, int, int]) -> list[Tensor]:
    """The tokens of every window, ascending."""
    place = _place(layout, torch.arange(layout.num_tokens))
    group = torch.zeros(layout.num_tokens, dtype=torch.long)
    for at, extent, side, w in zip(place, layout.grid, layout.sides, window):
        windows = -(-side // w)
        group = (group * -(-extent // side) + at // side) * windows + at % side // w
    return [(group == number).nonzero()[:, 0] for number in group.unique()]


def _centre(layout: TileLayout, tokens: Tensor) -> int:
    """The token at ``floor(extent / 2)`` along each axis of what these tokens span."""
    _, H, W = layout.grid
    t, h, w = (int(at.min()) + (int(at.max()) - int(at.min()) + 1) // 2 for at in _place(layout, tokens))
    return (t * H + h) * W + w


def _place(layout: TileLayout, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of video tokens on the grid."""
    _, H, W = layout.grid
    return token // (H * W), token // W % H, token % W
