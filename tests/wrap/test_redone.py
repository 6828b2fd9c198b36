"""Blocks that backward redoes, uncompiled and in regions, are redone as in their own forward."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
import flexsparse.redone
from flexsparse.redone import Forward, Redone

C, SIZES = 32, [(4, 4, 8), (4, 8, 4)]
"""Two grids of as many tokens."""
TOKENS = 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(C), nn.Linear(C, 3 * C)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        q, k, v = (2 * self.qkv(self.norm(x))).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


Redo = Callable[..., Tensor]


class Net(nn.Module):
    """Three blocks, each run by ``redo``; keeps the hidden states after the second one."""

    def __init__(self, redo: Redo) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.redo = redo
        self.feature: Tensor | None = None
        self.register_buffer("table", torch.zeros(TOKENS, C))

    def forward(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = self.redo(block, x, self.table)
            if i == 1:
                self.feature = x
        return x


def plainly(block: Any, *args: Tensor) -> Tensor:
    return block(*args)


def not_reentrant(block: Any, *args: Tensor) -> Tensor:
    return checkpoint(block, *args, use_reentrant=False)


def reentrant(block: Any, *args: Tensor) -> Tensor:
    return checkpoint(block, *args, use_reentrant=True)


def nested(block: Any, *args: Tensor) -> Tensor:
    """A checkpoint within a checkpoint, as of a group of blocks; the tensors that the inner one keeps are made in backward."""
    return checkpoint(lambda *args: checkpoint(block, *args, use_reentrant=True), *args, use_reentrant=True)


def copied(block: Any, x: Tensor, *others: Tensor) -> Tensor:
    """A function that gives the block another tensor each time, as one that is kept elsewhere in between."""
    return checkpoint(lambda x: block(x.clone(), *others), x, use_reentrant=False)


CHECKPOINTS = [not_reentrant, reentrant, nested, copied]


def net(redo: Redo, way: Any = False, **options: Any) -> Net:
    torch.manual_seed(0)
    how = {"inner": "aot_eager"} if way else {}
    options = {"tile": (2, 2, 4), "grid": lambda model, args, kwargs: args[1], "compile": way, **how, **options}
    return fs.wrap(Net(redo), options.pop("builder", fs.VSA(top_k=2)), **options)


def video(seed: int) -> Tensor:
    return torch.randn(1, TOKENS, C, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients_of(loss: Tensor, *videos: Tensor) -> list[Tensor]:
    """By `backward`: a reentrant checkpoint takes no other."""
    loss.backward()
    found = [x.grad for x in videos]
    assert all(x is not None for x in found)
    return found  # type: ignore[return-value]


def of_features(model: Net) -> list[Tensor]:
    """Gradients of a loss of one forward's hidden states and another's output."""
    first, second = video(0), video(1)
    model(first, SIZES[0])
    feature = model.feature
    assert feature is not None
    loss = feature.square().sum() + model(second, SIZES[1]).square().sum()
    return gradients_of(loss, first, second)


@pytest.mark.parametrize("redo", CHECKPOINTS)
@pytest.mark.parametrize("way", [False, "regional"])
def test_hidden_states_of_a_forward_whose_output_is_not_in_the_loss(way: Any, redo: Redo) -> None:
    torch._dynamo.reset()
    expected = of_features(net(plainly))
    model = net(redo, way)
    for _ in range(2):  # tables that are not of one forward do not count
        for mine, other in zip(of_features(model), expected):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def of_outputs(model: Net, sizes: list[Any], seeds: list[int]) -> list[Tensor]:
    """Gradients of a loss of what all forwards returned."""
    videos = [video(seed) for seed in seeds]
    loss = torch.stack([model(x, size).square().sum() for x, size in zip(videos, sizes)]).sum()
    return gradients_of(loss, *videos)


@pytest.mark.parametrize("redo", CHECKPOINTS)
def test_several_forwards_in_one_backward(redo: Redo) -> None:
    sizes = [*SIZES, SIZES[0]]
    expected = of_outputs(net(plainly), sizes, [0, 1, 2])
    for mine, other in zip(of_outputs(net(redo), sizes, [0, 1, 2]), expected):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("redo", CHECKPOINTS)
def test_one_video_on_two_grids(redo: Redo) -> None:
    """What the first block was given is that of either forward."""

    def gradient(model: Net) -> Tensor:
        x = video(0)
        loss = torch.stack([model(x, size).square().sum() for size in SIZES]).sum()
        return gradients_of(loss, x)[0]

    torch.testing.assert_close(gradient(net(redo)), gradient(net(plainly)), atol=1e-5, rtol=0)


def test_threads_that_train_one_model() -> None:
    model = net(not_reentrant)

    def gradient(i: int) -> Tensor:
        x = video(i)
        return gradients_of(model(x, SIZES[i]).square().sum(), x)[0]

    expected, found = [gradient(0), gradient(1)], {}

    def work(i: int) -> None:
        found[i] = [gradient(i) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1]
    for i, each in found.items():
        for mine in each:
            torch.testing.assert_close(mine, expected[i], atol=1e-5, rtol=0)


@contextlib.contextmanager
def another_thread_compiles() -> Iterator[None]:
    """Something of its own. Torch has one flag for all threads that says so."""
    inside, done = threading.Event(), threading.Event()

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        inside.set()
        assert done.wait(60)
        return gm.forward

    thread = threading.Thread(target=lambda: torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(3)))
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join()
        torch._dynamo.reset()


compiles_in_threads = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.11 crashes where one thread after another compiles, whatever it is"
)


@compiles_in_threads
@pytest.mark.parametrize("redo", [plainly, *CHECKPOINTS])
def test_another_thread_compiles(redo: Redo) -> None:
    """What torch's flag says of this thread would leave redone blocks dense."""

    def gradient() -> Tensor:
        x = video(0)
        return gradients_of(model(x, SIZES[0]).square().sum(), x)[0]

    model = net(redo)
    expected = gradient()
    with another_thread_compiles():
        torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=0)


@compiles_in_threads
@pytest.mark.parametrize("compile", [True, "regional"])
def test_a_compiled_model_while_another_thread_compiles(compile: Any) -> None:
    model = net(plainly, compile)
    expected = model(video(0), SIZES[0])
    with another_thread_compiles():
        torch.testing.assert_close(model(video(0), SIZES[0]), expected)


def test_a_block_of_which_nothing_tells_the_forward() -> None:
    """Its grid is not known: an error, and not that of a forward before."""

    def reentrant_copied(block: Any, x: Tensor, *others: Tensor) -> Tensor:
        return checkpoint(lambda x: block(x.clone(), *others), x, use_reentrant=True)

    model = net(reentrant_copied)
    of_outputs(model, SIZES, [0, 1])
    model(video(0), SIZES[0])
    assert model.feature is not None
    with pytest.raises(RuntimeError, match=r"let the checkpoint be one of a module"):
        model.feature.square().sum().backward()


def test_a_copy_of_a_model_has_forwards_of_its_own() -> None:
    model = net(not_reentrant)
    x = video(0)
    loss = model(x, SIZES[0]).square().sum()
    model.feature = None
    other = copy.deepcopy(model)
    of_outputs(other, [SIZES[1]], [1])
    expected = of_outputs(net(plainly), [SIZES[0]], [0])
    torch.testing.assert_close(gradients_of(loss, x)[0], expected[0], atol=1e-5, rtol=0)


def test_what_is_there_no_more_is_forgotten() -> None:
    model = net(not_reentrant)
    given = model._flexsparse.interceptor.redone.given  # type: ignore[union-attr]
    counts = []
    for i in range(5):
        of_outputs(model, [SIZES[i % 2]], [i])
        counts.append(len(given))
    assert len(set(counts[1:])) == 1 and counts[0] > 3, "the table, and what one forward gave"
    model.feature = None
    with torch.no_grad():
        for _ in range(2):
            model(video(0), SIZES[0])
    assert len(given) == 1, "only the table, where nothing will be redone"


def test_a_backward_that_failed_is_over() -> None:
    """Its end is never called back; what comes after it is no part of its forward."""
    model = net(not_reentrant)
    redone = model._flexsparse.interceptor.redone  # type: ignore[union-attr]

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            assert len(redone.tasks) == 1
            raise MemoryError("as if")

    for _ in range(2):
        with pytest.raises(MemoryError):
            model(Fails.apply(video(0)), SIZES[0]).square().sum().backward()
        assert not redone.tasks


def test_slices_of_what_stays_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As texts of a data set that is in memory: no storage ever goes."""
    monkeypatch.setattr(flexsparse.redone, "MOST", 50)
    monkeypatch.setattr(flexsparse.redone, "FEW", 5)
    redone, texts, found = Redone(), torch.zeros(400, 6), 0
    for number, text in enumerate(texts):
        redone.forget()
        redone.note(Forward((1, 2, number, 0, 0), ()), (text,), {})
        found = max(found, len(redone.given))
    assert 50 <= found <= 150
    newest = [key[1] for key in redone.given][-50:]
    assert newest == [6 * number for number in range(350, 400)]


def test_storages_are_told_apart_by_life_and_not_by_address() -> None:
    redone, first = Redone(), Forward((1, 2, 3, 0, 0), ())
    one = torch.zeros(4, 6)
    redone.note(first, (one[:2],), {"named": [one[2:]]})
    assert len(redone.given) == 2
    found = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            for given in (one[1:3], torch.zeros(2, 6), one.detach()[2:]):
                redone.find((given,), {})
                found.append(redone.current())
            return gradient

    redone.find((one[:2],), {})
    assert redone.current() is None, "outside of backward"
    Asks.apply(torch.zeros(2, requires_grad=True)).sum().backward()
    assert found == [None, None, first]
    assert redone.current() is None and not redone.tasks
    one = torch.zeros(1)
    redone.forget()
    assert not redone.given


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("way", [False, "regional", True])
def test_a_schedule_that_moves_before_the_whole_model_is_redone(way: Any, use_reentrant: bool) -> None:
    schedule = fs.SparsitySchedule(start=0.0, target=0.75, step=0.75, every=1)
    model = net(plainly, way, builder=fs.VSA(sparsity=schedule), grid=SIZES[0])
    for early in (False, True):
        x = video(0)
        out = checkpoint(model, x, SIZES[0], use_reentrant=use_reentrant).square().sum()
        if not early:
            out.backward()
        schedule.advance()
        if early:
            with pytest.raises(
                RuntimeError, match=r"a SparsitySchedule moved from \(0.0,\) to \(0.75,\) .*after backward"
            ):
                out.backward()
        schedule.seek(0)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("way", [False, "regional"])
def test_a_schedule_that_moves_before_backward(way: Any, checkpointed: bool) -> None:
    """Blocks were redone at the new sparsity: the gradients were those of no loss."""

    schedule = fs.SparsitySchedule(start=0.0, target=0.75, step=0.75, every=1)
    model = net(not_reentrant if checkpointed else plainly, way, builder=fs.VSA(sparsity=schedule), grid=SIZES[0])
    for early in (False, True):
        loss = model(video(0), SIZES[0]).square().sum()
        if not early:
            loss.backward()
        schedule.advance()
        if early and checkpointed:
            with pytest.raises(
                RuntimeError, match=r"a SparsitySchedule moved from \(0.0,\) to \(0.75,\) .*after backward"
            ):
                loss.backward()
        elif early:
            loss.backward()
        schedule.seek(0)
    model(video(0), SIZES[0]).sum().backward()
