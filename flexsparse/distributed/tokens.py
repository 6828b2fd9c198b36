"""Which tokens a rank holds, and gathering the tokens of all ranks.

Shape letters: L tokens of one rank, S tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse.tables import is_compiling

Text = Literal["replicated", "split", "joined"]


@dataclass(frozen=True)
class Ranks:
    """One dimension of a device mesh as this process sees it: plain values, which a compiler can trace.

    Attributes:
        group: name of the process group.
        rank: this process's place in it.
        size: processes in it.
    """

    group: str = ""
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, mesh: DeviceMesh | None, name: str) -> Ranks:
        """From a mesh of one dimension; None is this process alone.

        Raises:
            TypeError: no device mesh.
            ValueError: a mesh of several dimensions.
        """
        if mesh is None:
            return cls()
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"{name} is a {type(mesh).__name__}: give a torch DeviceMesh (init_device_mesh(...))")
        if mesh.ndim != 1:
            raise ValueError(
                f"{name} has {mesh.ndim} dimensions, named {mesh.mesh_dim_names}: give one of them, mesh[name]"
            )
        group = mesh.get_group()
        return cls(group.group_name, dist.get_rank(group), dist.get_world_size(group))


def parts(length: int, size: int) -> tuple[int, ...]:
    """``length`` things in ``size`` parts that differ by one at most, larger ones first, as `torch.tensor_split` cuts.

    The last part is what the others leave: so parts of a symbolic length add up to it, and no graph needs a guard that they do.
    """
    first = [(length + size - 1 - rank) // size for rank in range(size - 1)]
    return (*first, length - sum(first))


def bounds(sizes: Sequence[int], rank: int) -> tuple[int, int]:
    """Start and end of a rank's part."""
    start = sum(sizes[:rank])
    return start, start + sizes[rank]


@dataclass(frozen=True)
class Segment:
    """A run of tokens of a sequence, in parts on the ranks, or whole on each of them.

    Attributes:
        sizes: tokens on each rank.
        split: whether these are parts of it.
        even: whether they are as `parts` cuts.
    """

    sizes: tuple[int, ...]
    split: bool
    even: bool = False

    @classmethod
    def of(cls, length: int, size: int) -> Segment:
        """In even parts on so many ranks."""
        return cls(parts(length, size), True, True)

    @property
    def length(self) -> int:
        """Tokens of the segment."""
        return sum(self.sizes) if self.split else self.sizes[0]

    def start(self, rank: int) -> int:
        """Where the tokens of a rank start in the segment."""
        return sum(self.sizes[:rank]) if self.split else 0


Segments = Sequence[Segment]


def segments_of(first: int, video: Segment, last: int, text: str) -> tuple[Segment, ...]:
    """The segments of a sequence of extra tokens, video tokens, extra tokens.

    Args:
        first: extra tokens before the video.
        video: the video tokens.
        last: extra tokens after them.
        text: ``"replicated"``: every rank holds all extra tokens; ``"split"``: its part of the first ones, its part of the
            video, its part of the last ones; ``"joined"``: an equal part of the whole sequence.

    Raises:
        ValueError: another ``text``.
    """
    size = len(video.sizes)
    if text not in get_args(Text):
        raise ValueError(f"text is {text!r}: give one of {get_args(Text)}")
    if text == "joined":
        return (Segment.of(first + video.length + last, size),)
    ends = [Segment.of(n, size) if text == "split" else Segment((n,) * size, False) for n in (first, last)]
    return ends[0], video, ends[1]


def local_length(segments: Segments, rank: int) -> int:
    """L: tokens that a rank holds."""
    return sum(segment.sizes[rank] for segment in segments)


def sent_range(segments: Segments, rank: int) -> tuple[int, int]:
    """Start and length of the split tokens among a rank's tokens; replicated ones are before and after them."""
    start = length = 0
    before = True
    for segment in segments:
        if segment.split:
            length += segment.sizes[rank]
            before = False
        elif before:
            start += segment.length
    return start, length


def own_pieces(x: Tensor, segments: Segments, rank: int, dim: int) -> list[Tensor]:
    """A rank's tokens of a whole sequence: of each segment that has any, views."""
    pieces, at = [], 0
    for segment in segments:
        pieces.append((at + segment.start(rank), segment.sizes[rank]))
        at += segment.length
    return [x.narrow(dim, *piece) for piece in pieces if not known_empty(piece[1])] or [x.narrow(dim, 0, 0)]


def own_part(x: Tensor, segments: Segments, rank: int, dim: int) -> Tensor:
    """A rank's tokens of a whole sequence."""
    pieces = own_pieces(x, segments, rank, dim)
    return pieces[0] if len(segments) == 1 else torch.cat(pieces, dim)


def in_sequence(own: Tensor, blocks: Sequence[Tensor], segments: Segments, rank: int, dim: int) -> Tensor:
    """The whole sequence.

    Args:
        own: this rank's tokens, for the replicated segments.
        blocks: the split tokens of every rank.
        segments: the sequence.
        rank: this rank.
        dim: dimension of the tokens.
    """
    pieces, at, done = [], 0, [0] * len(blocks)
    for segment in segments:
        if segment.split:
            for other, size in enumerate(segment.sizes):
                pieces.append((blocks[other], done[other], size))
                done[other] += size
        else:
            pieces.append((own, at, segment.length))
        at += segment.sizes[rank]
    return torch.cat([x.narrow(dim, start, size) for x, start, size in pieces if not known_empty(size)], dim)


def known_empty(size: int) -> bool:
    """Whether a size is 0; a symbolic one is not asked, as the answer would be a case of the graph."""
    return statically_known_true(size == 0)


def without_autograd() -> bool:
    """Whether uncompiled code runs under inference mode: torch 2.11 has its collectives with a backward for autograd alone."""
    return not is_compiling() and torch.is_inference_mode_enabled()


def all_gather(x: Tensor, group: str) -> Tensor:
    """``[n, ...]`` of every rank as ``[ranks * n, ...]``; backward is a reduce-scatter: it sums over the ranks."""
    if without_autograd():
        plain: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
        return funcol.wait_tensor(plain(x.contiguous(), 0, group))
    gather: Any = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd
    return gather(x.contiguous(), 0, group)


def gather_tokens(x: Tensor, segments: Segments, ranks: Ranks, dim: int) -> Tensor:
    """The whole sequence, from every rank's tokens in dimension ``dim``; shorter parts travel padded to the longest."""
    if ranks.size == 1:
        return x
    dim = dim % x.dim()
    start, length = sent_range(segments, ranks.rank)
    sizes = [sent_range(segments, rank)[1] for rank in range(ranks.size)]
    sent = x.narrow(dim, start, length).movedim(dim, 0)
    split = [segment for segment in segments if segment.split]
    even = all(segment.even for segment in split)
    longest = sizes[0] if even else max(sizes)
    if statically_known_true(length < longest):
        sent = torch.cat([sent, sent.new_zeros((longest - length, *sent.shape[1:]))])
    elif not statically_known_true(length == longest):  # whether it is shorter must not be a case of the graph
        missing = len(split) if even else longest  # at most
        sent = torch.cat([sent, sent.new_zeros((missing, *sent.shape[1:]))]).narrow(0, 0, longest)
    blocks = [block.movedim(0, dim) for block in all_gather(sent, ranks.group).split([longest] * ranks.size)]
    return in_sequence(x, blocks, segments, ranks.rank, dim)
