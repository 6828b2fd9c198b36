"""Sequence parallel models: `fs.distributed.ulysses` on a wrapped diffusers Wan."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import flexsparse as fs
from distributed import training
from distributed.processes import Processes
from flexsparse.distributed import same_inputs
from flexsparse.distributed.around import Around
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks

pytest.importorskip("diffusers")

UNEVEN = (2, 12, 10)  # 60 tokens in partial tiles; three heads on two ranks
PER_HEAD = fs.Union(
    fs.PerHead(builders=(fs.VSA(top_k=2), fs.Dense()), heads=(0, 1, 0)), fs.SlidingTile(window=(1, 1, 1))
)
CASES: dict[str, tuple[bool | str, dict[str, Any]]] = {
    "uncompiled": (False, {}),
    "uneven": (False, {"sizes": [UNEVEN, (3, 6, 10)]}),
    "checkpointing": (False, {"checkpointing": True}),
    "a dense layer": (False, {"dense_layers": [1], "gates": False, "sizes": [UNEVEN]}),
    "diffusers": (False, {"diffusers": True}),
    "a builder a head": (False, {"builder": PER_HEAD, "gates": False}),
    "autocast": (False, {"autocast": True, "gates": False}),
    "fine gates": (False, {"fine_gates": True}),
    "regional": ("regional", {}),
}
SLOW: dict[str, tuple[bool | str, dict[str, Any]]] = {
    "whole": (True, {"full": True}),
    "whole, uneven, checkpointing": (True, {"checkpointing": True, "sizes": [UNEVEN]}),
    "regional, resolutions": ("regional", {"sizes": [UNEVEN, (3, 6, 10)]}),
    "regional, checkpointing": ("regional", {"checkpointing": True}),
    "whole, autocast": (True, {"autocast": True}),
    "whole, fine gates": (True, {"fine_gates": True}),
    "regional, diffusers": ("regional", {"diffusers": True}),
    "a dense layer": (True, {"dense_layers": [1], "gates": False}),
}


def _check(processes: Processes, compile: bool | str, options: dict[str, Any]) -> None:
    dense = bool(options.get("dense_layers"))
    for rank, calls in enumerate(processes.run(training.same_model, compile, options, limit=300)):
        heads = [2, 1][rank] if processes.size == 2 else 1
        own = [(sparse, shape[1]) for name, sparse, shape in calls if name.endswith("attn1")]
        assert own, calls
        assert own[0] == (True, heads)
        if len(own) > 1:
            assert own[1] == (not dense, heads), "a dense layer is spread too"


@pytest.mark.parametrize("name", CASES)
def test_wan(two: Processes, name: str) -> None:
    _check(two, *CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_wan_slow(two: Processes, name: str) -> None:
    _check(two, *SLOW[name])


@pytest.mark.slow
def test_three_ranks(three: Processes) -> None:
    _check(three, "regional", {"sizes": [UNEVEN]})


@pytest.mark.parametrize("compile", [False, True])
def test_their_context_parallelism_alone(two: Processes, compile: bool | str) -> None:
    """Its backward recomputes attention outside of the model, where it would be dense."""
    for message in two.run(training.said, "only_context_parallel", compile):
        assert "flexsparse.distributed.ulysses(model)" in message


def test_dense_steps(two: Processes) -> None:
    two.run(training.same_dense)


def test_unwrap_and_copies(two: Processes) -> None:
    two.run(training.same_unwrapped)


@pytest.mark.parametrize("compile", [False, pytest.param("regional", marks=pytest.mark.slow)])
def test_copies_made_before(two: Processes, compile: bool | str) -> None:
    two.run(training.same_copies, compile)


@pytest.mark.parametrize(
    "kind, match", [("name", "but WanTransformer3DModel has no such module"), ("entry", "plan= says")]
)
def test_what_is_refused_changes_nothing(two: Processes, kind: str, match: str) -> None:
    for messages in two.run(training.refused, kind):
        assert len(messages) > 1 and all(match in message for message in messages)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_more_ranks_than_heads(two: Processes, compile: bool | str) -> None:
    """Said at once where the configuration has the heads, else by the first call."""
    for of_config, kind in ((True, "ValueError"), (False, "RewriteError")):
        for message in two.run(training.too_many, compile, of_config):
            assert message.startswith(f"{kind}: ") and "has 1 heads for 2 ranks" in message
            assert "other samples to the other ranks" in message and "tiles=" not in message


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_builder_of_other_heads(two: Processes, compile: bool | str) -> None:
    for message in two.run(training.said, "per_head_of_others", compile, limit=60):
        assert re.match(r"RewriteError: PerHead heads has 3 entries, but blocks\.0\.attn1 has 2 heads", message), (
            message
        )


@pytest.mark.parametrize(
    "kind, said",
    [
        ("values", "hidden_states has other values on rank 1 than on rank 0"),
        ("times", "timestep has other values on rank 1 than on rank 0"),
        ("shapes", "rank 0: hidden_states (1, 4, 2, 16, 16) float32, "),
        ("gradients", "gradients off"),
    ],
)
@pytest.mark.parametrize("compile", [False, pytest.param("regional", marks=pytest.mark.slow)])
def test_ranks_that_are_given_other_inputs(two: Processes, compile: bool | str, kind: str, said: str) -> None:
    """Attention would mix their videos without a word, or a collective never end."""
    for message in two.run(training.said, "given_other_inputs", compile, kind, limit=60):
        assert message.startswith("ValueError: the ranks of ulysses(model, mesh) were given different inputs"), message
        assert said in message and "seed alike" in message


def test_heads_are_those_of_the_calls_own_builder() -> None:
    """Another layer's builder, and a layer that stays dense, say nothing of a call."""
    around = Around(SequenceParallel.planned(Ranks("", 0, 2), Ranks()), {"blocks.0.attn1": 3}.get)
    q = torch.empty(1, 2, 4, 16)
    around.check_heads(q, "blocks.1.attn1")
    with pytest.raises(RuntimeError, match=r"PerHead heads has 3 entries, but blocks\.0\.attn1 has 2 heads"):
        around.check_heads(q, "blocks.0.attn1")


def test_inputs_that_ranks_made_by_themselves(two: Processes) -> None:
    two.run(training.given_nearly_the_same)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
def test_modules_for_models_from_scratch(two: Processes, mesh: tuple[int, int]) -> None:
    two.run(training.same_module, mesh)


def test_a_model_that_is_not_wrapped() -> None:
    with pytest.raises(ValueError, match="is not wrapped"):
        fs.distributed.ulysses(training.wan())


def test_without_a_mesh() -> None:
    with pytest.raises(ValueError, match="give a DeviceMesh"):
        fs.distributed.ulysses(training.wrapped(False))


SOME = (torch.empty(0, 4), torch.ones(3), torch.arange(40), torch.full((20,), torch.nan), torch.arange(17).cfloat())


@pytest.mark.parametrize("x", SOME)
def test_whatever_a_model_is_given_has_sums(x: torch.Tensor) -> None:
    found = same_inputs._sums(x)
    assert found.shape == (same_inputs.SUMS,) and bool(found.isfinite().all())
    assert x.numel() < 20 or x.isnan().any() or not torch.equal(found, same_inputs._sums(x.flip(0)))
