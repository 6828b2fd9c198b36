"""Sequence parallel models cost two graphs for any number of resolutions, whether or not ranks divide their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

import flexsparse as fs
from distributed import resolutions
from distributed.processes import Processes
from flexsparse.compile_passes import RewriteError, marks
from flexsparse.compile_passes.sdpa_call import SDPA
from flexsparse.compiler import Backend
from flexsparse.distributed.around import Around
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks, parts


def _one_graph(found: list[list[int]]) -> None:
    for counts in found:
        assert set(counts) == {1}, f"a number of tokens costs a graph: {counts}"


def test_exchange(two: Processes) -> None:
    _one_graph(two.run(resolutions.of_exchange, "replicated", limit=300))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["split", "joined"])
def test_exchange_of_other_text(two: Processes, text: str) -> None:
    _one_graph(two.run(resolutions.of_exchange, text, limit=300))


@pytest.mark.slow
def test_exchange_on_three_ranks(three: Processes) -> None:
    """Parts of text and of video that are shorter together: two rows are missing."""
    _one_graph(three.run(resolutions.of_exchange, "split", limit=300))


@given(length=st.integers(0, 200), size=st.integers(1, 9))
def test_parts(length: int, size: int) -> None:
    cut = torch.arange(length).tensor_split(size)
    assert parts(length, size) == tuple(len(piece) for piece in cut)


def test_parts_of_a_symbolic_length_add_up_to_it() -> None:
    """Else every graph would have to ask whether they do."""
    length = ShapeEnv().create_unbacked_symint()
    for size in (1, 2, 3, 8):
        assert statically_known_true(sum(parts(length, size)) == length)


def test_an_operator_that_takes_no_operands() -> None:
    """Its branches cannot be told a grid that changes; a number is a part of the graph."""
    around = Around(SequenceParallel.planned(Ranks("", 0, 2), Ranks()))
    seen: list[str] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        try:
            around.rewrite(gm, Backend(fs.VSA(top_k=2)))
        except RewriteError as error:
            seen.append(str(error))
        return lambda *args: (args[-1],)

    def run(q: Tensor, T: int) -> Tensor:
        marks.GRID(T, 4, 4, 0, 0)
        return torch.cond(q.sum() > 0, lambda x: SDPA(x, x, x), lambda x: x.clone(), (q,))

    for dynamic in (False, True):
        torch._dynamo.reset()
        torch.compile(run, backend=backend, dynamic=dynamic, fullgraph=True)(torch.randn(1, 2, 24, 8), 3)
        assert len(seen) == int(dynamic), seen
    assert "attention is inside of cond" in seen[0] and "dynamic=False" in seen[0]


@pytest.mark.slow
def test_a_model_nobody_knows(two: Processes) -> None:
    _two_graphs(two.run(resolutions.of_stranger, "regional", limit=600))


def _two_graphs(found: list[list[int]]) -> None:
    for first, *others in found:
        assert first > 0 and set(others) == {2 * first}, f"a grid costs graphs of its own: {[first, *others]}"


# what joins text to the video needs more than what does not: masks, lengths, text that is whole on every rank
SLOW: dict[str, tuple[str, bool | str, dict[str, Any]]] = {
    "Wan, regional": ("wan", "regional", {}),
    "Wan, whole": ("wan", True, {}),
    "Wan, whole, checkpointing": ("wan", True, {"checkpointing": True, "gates": False}),
    "HunyuanVideo, regional": ("hunyuan", "regional", {"fine_gates": True}),
    "HunyuanVideo, whole": ("hunyuan", True, {"gates": False}),
    "HunyuanVideo-1.5, regional": ("hunyuan15", "regional", {}),
    "CogVideoX, regional": ("cogvideox", "regional", {"checkpointing": True}),
    "CogVideoX, whole": (
        "cogvideox",
        True,
        {"gates": False, "config": {"use_rotary_positional_embeddings": True}, "rotary": 16},
    ),
    "LTX-Video, whole": ("ltx", True, {"gates": False, "config": {"cross_attention_dim": 48}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_models(two: Processes, name: str) -> None:
    pytest.importorskip("diffusers")
    _two_graphs(two.run(resolutions.of_model, *SLOW[name], limit=900))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["regional", True])
def test_three_ranks(three: Processes, way: bool | str) -> None:
    _two_graphs(three.run(resolutions.of_stranger, way, limit=900))


@pytest.mark.slow
def test_four_ranks(four: Processes) -> None:
    _two_graphs(four.run(resolutions.of_stranger, "regional", limit=900))


@pytest.mark.slow
def test_inductor(two: Processes) -> None:
    _two_graphs(two.run(resolutions.of_stranger, "regional", "inductor", limit=900))
