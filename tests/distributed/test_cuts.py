"""What a rank gets of what a plan cuts: leading tokens, what a module returns in several pieces; and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flexsparse.distributed.cuts import Cut
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks
from flexsparse.models import Leading, Part, Whole


class Pair(NamedTuple):
    """What a module may return."""

    video: Tensor
    other: Tensor


def cut_of(rank: int, ranks: int = 2) -> Cut:
    """Of one of some ranks; eight tokens."""
    interceptor = SimpleNamespace(known_grid=lambda: (1, 2, 4), local=SimpleNamespace(cut=False))
    state = SimpleNamespace(runs_dense=lambda: False, interceptor=interceptor)
    return Cut(SequenceParallel.planned(Ranks("", rank, ranks), Ranks()), state, text_first=False)


def returned(out: Any) -> Any:
    """By a module whose first output is cut along dimension 1; on the second rank."""
    _, (hook,) = cut_of(1).hooks(nn.Identity(), "one", {0: Part(1, 3)})
    return hook(nn.Identity(), (), out)


@pytest.mark.parametrize("count, held", [(0, [0, 0]), (3, [3, 0]), (5, [4, 1]), (8, [4, 4])])
def test_leading_tokens_are_those_that_a_rank_holds(count: int, held: list[int]) -> None:
    assert [cut_of(rank).cut(count, Leading()) for rank in (0, 1)] == held


def test_each_kind_of_several_stays_what_it_is() -> None:
    video, other = torch.arange(8.0).view(1, 8, 1), torch.ones(1, 8, 1)
    assert torch.equal(returned(video), video[:, 4:])
    for out in ((video, other), [video, other], Pair(video, other)):
        found = returned(out)
        assert type(found) is type(out) and torch.equal(found[0], video[:, 4:]) and found[1] is other


def test_a_dictionary_is_refused() -> None:
    with pytest.raises(TypeError, match="a module of the plan returned dict, where a tensor, a tuple or a list"):
        returned({"video": torch.ones(1, 8, 1)})


def test_attention_is_told_while_tokens_are_cut() -> None:
    """From the first tensor of tokens to where they are joined; a table of positions says nothing."""
    cut, x = cut_of(0, ranks=1), torch.ones(1, 8, 1)
    local = cut.state.interceptor.local
    cut.cut(x, Part(1, 3), "rotary_emb")
    assert not local.cut
    cut.cut(x, Part(1, 3), "hidden_states")
    assert local.cut
    cut.join(x, Whole(1))
    assert not local.cut


def test_a_block_that_a_backward_redoes_says_nothing() -> None:
    """It knows nothing of the blocks after it, which may have joined the tokens."""
    cut = cut_of(0, ranks=1)

    class Redone(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return cut.cut(grad, Part(1, 3), "hidden_states")

    x = torch.ones(1, 8, 1, requires_grad=True)
    Redone.apply(x).sum().backward()
    assert x.grad is not None and not cut.state.interceptor.local.cut
