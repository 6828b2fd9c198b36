"""A builder of a user's own that changes after a graph was compiled: what the graph reads anew, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.builder_state import held_by
from flexsparse.masks import keep_top

from .conftest import Stranger


def clip(T: int = 4) -> Tensor:
    return torch.randn(1, 3, T, 16, 16, generator=torch.Generator().manual_seed(T))


class First:
    """The first tiles, as many as a number says, be it a tensor."""

    def __init__(self, n: Any) -> None:
        self.n, self.traced, self.cache = n, 0, {}

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **_: Any) -> fs.TileSelection:
        self.traced += 1
        order = -torch.arange(layout.num_tiles, device=q.device).float()
        return fs.TileSelection.from_mask(keep_top(order.expand(*q.shape[:2], layout.num_tiles, -1), self.n), layout)


class Learnt(nn.Module):
    """The tiles with the highest score of weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(16, 16)

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **_: Any) -> fs.TileSelection:
        q, k = (layout.to_tiles(x).unflatten(2, (layout.num_tiles, -1)).mean(3) for x in (q, k))
        return fs.TileSelection.from_mask(keep_top(self.map(q) @ k.transpose(-1, -2), 2), layout)


def same_as_uncompiled(model: nn.Module, plain: nn.Module, T: int = 4) -> None:
    torch.testing.assert_close(model(clip(T)), plain(clip(T)), atol=1e-5, rtol=0)


def both(builder: Any) -> tuple[nn.Module, nn.Module]:
    """Compiled, and uncompiled by another builder object, as select of that one runs at every call."""
    torch.manual_seed(1)
    model = Stranger(depth=1)
    plain = fs.wrap(copy.deepcopy(model), copy.deepcopy(builder), compile=False)
    return fs.wrap(model, builder, inner="aot_eager"), plain


@torch.no_grad()
def test_a_number_that_has_changed_is_refused() -> None:
    """The graph would have kept four tiles without a word."""
    builder = First(4)
    model, plain = both(builder)
    same_as_uncompiled(model, plain)
    same_as_uncompiled(model, plain, 8)  # what it counts itself while it is traced is no change
    same_as_uncompiled(model, plain)
    builder.cache["of an uncompiled call"] = clip()
    same_as_uncompiled(model, plain)
    builder.n = 1
    for T in (4, 8):
        with pytest.raises(
            RuntimeError, match=r"First\.n was 4 when this graph was compiled and is 1 now.*tensor.*wrap the"
        ):
            model(clip(T))
    fs.wrap(fs.unwrap(model), builder, inner="aot_eager")
    same_as_uncompiled(model, fs.wrap(fs.unwrap(plain), First(1), compile=False))


def test_a_tensor_is_changed_in_place() -> None:
    builder, one = First(torch.tensor(4)), First(torch.tensor(1))
    model, plain = both(builder)
    same_as_uncompiled(model, plain)
    builder.n.fill_(1)
    same_as_uncompiled(model, fs.wrap(fs.unwrap(plain), one, compile=False))
    builder.n = torch.tensor(4)
    with pytest.raises(
        RuntimeError, match=r"First\.n was a tensor \(\) when this graph was compiled and is another tensor"
    ):
        model(clip())


def test_a_builder_with_weights() -> None:
    builder = Learnt()
    model, plain = both(builder)
    same_as_uncompiled(model, plain)
    new = torch.randn(16, 16)
    with torch.no_grad():
        builder.map.weight.copy_(new)
        fs.wrap(fs.unwrap(plain), copy.deepcopy(builder), compile=False)
    same_as_uncompiled(model, plain)
    builder.map.weight = nn.Parameter(new)
    with pytest.raises(RuntimeError, match=r"Learnt\.map\.weight was a tensor \(16, 16\)"):
        model(clip())


class ByNumber:
    """Reads a schedule's value; `ByTensor` reads its tensor."""

    def __init__(self, schedule: fs.SparsitySchedule) -> None:
        self.schedule = schedule

    def share(self) -> Any:
        return self.schedule.value

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **_: Any) -> fs.TileSelection:
        keep = torch.arange(layout.num_tiles, device=q.device) < (1 - self.share()) * layout.num_tiles
        return fs.TileSelection.from_mask(keep.expand(*q.shape[:2], layout.num_tiles, -1), layout)


class ByTensor(ByNumber):
    def share(self) -> Any:
        return self.schedule.tensor


class Reads:
    """The first tiles, as many as a function finds in it."""

    shared = 4

    def __init__(self, find: Callable[[Any], Any], **held: Any) -> None:
        self.find = find
        self.__dict__ |= held

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **options: Any) -> fs.TileSelection:
        return First(self.find(self)).select(q, k, layout)


@dataclasses.dataclass
class Settings:
    n: int


class Slots:
    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = n

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **options: Any) -> fs.TileSelection:
        return First(self.n).select(q, k, layout)


class Around(Reads):
    """A builder in a builder."""

    def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, **options: Any) -> fs.TileSelection:
        return self.find(self).select(q, k, layout)


def _shares(value: Any) -> None:
    Reads.shared = value


CHANGES: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "part": (
        Around(lambda own: own.part, part=fs.VSA(top_k=1)),
        lambda own: setattr(own, "part", fs.VSA(top_k=2)),
        r"Around\.part was VSA\(.*top_k=1.* is VSA\(.*top_k=2",
    ),
    "part in a list": (
        Around(lambda own: own.parts[0], parts=[fs.VSA(top_k=1)]),
        lambda own: own.parts.__setitem__(0, fs.VSA(top_k=2)),
        r"Around\.parts\[0\] was",
    ),
    "schedule": (
        ByTensor(fs.SparsitySchedule(target=0.9)),
        lambda own: setattr(own, "schedule", fs.SparsitySchedule(target=0.5)),
        r"ByTensor\.schedule was",
    ),
    "dict": (
        Reads(lambda own: own.all["n"], all={"n": 4}),
        lambda own: own.all.update(n=1),
        r"Reads\.all\['n'\] was 4",
    ),
    "namespace": (
        Reads(lambda own: own.all.n, all=SimpleNamespace(n=4)),
        lambda own: setattr(own.all, "n", 1),
        r"Reads\.all\.n was 4",
    ),
    "dataclass": (
        Reads(lambda own: own.all.n, all=Settings(4)),
        lambda own: setattr(own.all, "n", 1),
        r"Reads\.all\.n was 4",
    ),
    "class": (Reads(lambda own: own.shared), lambda own: _shares(1), r"Reads\.shared was 4"),
    "slots": (Slots(4), lambda own: setattr(own, "n", 1), r"Slots\.n was 4"),
    "tensor in a list": (
        Reads(lambda own: own.all[0], all=[torch.tensor(4)]),
        lambda own: own.all.__setitem__(0, torch.tensor(1)),
        r"Reads\.all\[0\] was a tensor \(\) .* is another tensor now",
    ),
    "function": (Reads(lambda own: 4), lambda own: setattr(own, "find", lambda own: 1), r"Reads\.find was <function"),
    "select": (First(4), lambda own: setattr(own, "select", First(1).select), r"First\.select was None"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_whatever_holds_the_number_is_watched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reads, "shared", 4)
    builder, change, message = CHANGES[name]
    builder = copy.deepcopy(builder)
    model, plain = both(builder)
    same_as_uncompiled(model, plain)
    same_as_uncompiled(model, plain)
    change(builder)
    with pytest.raises(RuntimeError, match=message):
        model(clip())


@torch.no_grad()
def test_what_fills_up_is_no_change() -> None:
    """And a part that was replaced by an equal one is as before."""
    builder = Around(lambda own: own.part, part=fs.VSA(top_k=2), seen={}, tables={"mask": clip()}, history=[clip()])
    model, plain = both(builder)
    same_as_uncompiled(model, plain)
    builder.seen["an uncompiled call"] = 3
    builder.tables["mask"] = clip()
    builder.history.append(clip())
    builder.part = fs.VSA(top_k=2)
    same_as_uncompiled(model, plain)


@dataclasses.dataclass(frozen=True)
class Planned(fs.masks.MaskBuilder):
    """Is given a schedule that it may not read a number of."""

    schedule: fs.SparsitySchedule

    def plan(self, coarse: fs.masks.CoarseInputs, v: Tensor | None = None) -> tuple[fs.TileSelection, None]:
        scores = coarse.pooled_q() @ coarse.pooled_k().mT
        share = 1 - self.schedule.value
        return fs.TileSelection.from_mask(keep_top(scores, round(share * scores.shape[-1])), coarse.layout), None


@torch.no_grad()
def test_a_schedules_tensor_is_read_anew_and_its_number_refused() -> None:
    """The number was a constant of the graph: a schedule that moved changed nothing, without a word."""
    schedule = fs.SparsitySchedule(target=0.75, step=0.25, every=1)
    torch.manual_seed(1)
    model = Stranger(depth=1)
    plain = fs.wrap(copy.deepcopy(model), ByNumber(schedule), compile=False)
    fs.wrap(model, ByTensor(schedule), inner="aot_eager")
    seen = []
    for _ in range(3):
        same_as_uncompiled(model, plain)
        seen.append(model(clip()))
        schedule.advance()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    for builder in (ByNumber(schedule), Planned(schedule)):
        model = fs.wrap(Stranger(depth=1), builder, inner="aot_eager")
        with pytest.raises(RuntimeError, match=r"^a builder reads SparsitySchedule\.value.*read \.tensor"):
            model(clip())
    assert schedule.value == 0.75 and schedule.finished  # outside of graphs as ever


def test_torch_compile_with_the_backend() -> None:
    builder = First(4)
    torch.manual_seed(1)
    model = torch.compile(Stranger(), backend=fs.backend(builder, grid=(4, 8, 8), inner="aot_eager"))
    model(clip())
    builder.n = 2
    with pytest.raises(RuntimeError, match=r"First\.n was 4"):
        model(clip())


@pytest.mark.parametrize(
    "make",
    [
        lambda: fs.VSA(sparsity=fs.SparsitySchedule(target=0.9)),
        lambda: fs.PerHead(builders=(fs.BSA(), fs.VSA(top_k=1, within=fs.FrameCausal(chunk=4))), heads=(0, 1)),
    ],
)
def test_what_cannot_change_is_not_watched(make: Callable[[], Any]) -> None:
    assert not held_by([make()])


@pytest.mark.parametrize("kind", [list, dict])
def test_what_contains_itself_is_walked_once(kind: type) -> None:
    own = First(1)
    own.held = [2] if kind is list else {"two": 2}
    own.held.append(own.held) if kind is list else own.held.update(itself=own.held)
    own.again = own.held
    held = held_by([own])
    key = "0" if kind is list else "'two'"
    assert f"First.held[{key}]" in held and f"First.again[{key}]" in held
