"""Attention that would be of one rank's tokens alone is refused, and what only looks like it is not."""

from __future__ import annotations

import pytest

from distributed import strangers
from distributed.processes import Processes

SLOW = pytest.mark.slow
REFUSED = {
    "flat": "shapes (4, 64, 16) and (4, 64, 16)",
    "joint": "shapes (2, 2, 144, 16) and (2, 2, 144, 16)",
    "registers": "shapes (2, 2, 64, 16) and (2, 2, 67, 16)",
    "pooled": "shapes (2, 2, 64, 16) and (2, 2, 16, 16)",
}


@pytest.mark.parametrize("compile", [False, pytest.param("regional", marks=SLOW), pytest.param(True, marks=SLOW)])
def test_attention_that_is_not_spread(two: Processes, compile: bool | str) -> None:
    for messages in two.run(strangers.all_said, list(REFUSED), compile):
        for kind, message in messages.items():
            assert REFUSED[kind] in message and "or run the model on one rank" in message, kind


def test_queries_and_keys_of_different_features_of_the_same_tokens(two: Processes) -> None:
    """A graph sees through norms of their own; features that it takes for another sequence are not left to a rank's tokens."""
    for messages in two.run(strangers.all_said, ["norms", "mixed"], "regional"):
        assert messages["norms"] == "" and "cannot be spread over ranks" in messages["mixed"]


@pytest.mark.parametrize("compile", [False, pytest.param("regional", marks=SLOW), pytest.param(True, marks=SLOW)])
def test_text_that_is_longer_than_a_ranks_tokens(two: Processes, compile: bool | str) -> None:
    """In cross-attention, and on its own before tokens are cut."""
    kinds = ["cross", "torch's cross"] if compile is False else ["cross"]
    for messages in two.run(strangers.all_said, kinds, compile):
        assert set(messages.values()) == {""}, messages
