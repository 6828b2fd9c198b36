"""What a module of a plan may return: a tensor, a tuple, a list or a named tuple; anything else is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flexsparse.distributed.cuts import Cut
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks
from flexsparse.models import Part


class Pair(NamedTuple):
    """What a module may return."""

    video: Tensor
    other: Tensor


def returned(out: Any) -> Any:
    """By a module whose first output is cut along dimension 1; this is the second of two ranks."""
    parallel = SequenceParallel.planned(Ranks("", 1, 2), Ranks())
    state = SimpleNamespace(runs_dense=lambda: False)
    state.interceptor = SimpleNamespace(known_grid=lambda: (1, 2, 4), local=SimpleNamespace(cut=False))
    _, (hook,) = Cut(parallel, state, False).hooks(nn.Identity(), "one", {0: Part(1, 3)})
    return hook(nn.Identity(), (), out)


def test_each_kind_of_several_stays_what_it_is() -> None:
    video, other = torch.arange(8.0).view(1, 8, 1), torch.ones(1, 8, 1)
    assert torch.equal(returned(video), video[:, 4:])
    for out in ((video, other), [video, other], Pair(video, other)):
        found = returned(out)
        assert type(found) is type(out) and torch.equal(found[0], video[:, 4:]) and found[1] is other


def test_a_dictionary_is_refused() -> None:
    with pytest.raises(TypeError, match="a module of the plan returned dict, where a tensor, a tuple or a list"):
        returned({"video": torch.ones(1, 8, 1)})
