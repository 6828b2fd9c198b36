"""Sequence parallel models whose attention joins text with the video: `fs.distributed.ulysses` on the models of the zoo."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flexsparse as fs
from distributed import joint
from distributed.processes import Processes
from flexsparse.distributed.cuts import Cut
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks
from flexsparse.models import Joined, Leading

pytest.importorskip("diffusers")

from models.zoo import ZOO

ROTARY = {"config": {"use_rotary_positional_embeddings": True}, "rotary": 16}
AS_TEXT = (1, 4, 6)  # of two ranks each has as many video tokens as there is text
CROSS = {"config": {"cross_attention_dim": 48}}  # of three heads
REPLACE = {"config": {"image_condition_type": "token_replace"}}
FORCING = {
    "inputs": {"enable_diffusion_forcing": True, "timestep": torch.arange(6.0).reshape(joint.BATCH, joint.GRID[0])}
}
Case = tuple[str, bool | str, dict[str, Any]]
CASES: dict[str, Case] = {
    "after the video, lengths": (
        "hunyuan",
        False,
        {"fine_gates": True, "checkpointing": True, "grids": [joint.GRID, AS_TEXT]},
    ),
    "before the video": ("cogvideox", False, ROTARY),
    "each sample by itself": ("mochi", False, {}),
    "compiled": ("cogvideox", "regional", {"gates": False}),
}
SLOW: dict[str, Case] = {
    "a mask made in the block": ("hunyuan15", False, {}),
    "a mask made in the block, compiled": ("hunyuan15", "regional", {"checkpointing": True}),
    "the first frame apart": ("hunyuan", False, {**REPLACE, "gates": False}),
    "the first frame apart, compiled": ("hunyuan", "regional", {**REPLACE, "gates": False}),
    "a dense layer with a mask": (
        "hunyuan",
        "regional",
        {"dense_layers": [-1], "gates": False, "grids": [joint.GRID, (2, 6, 7)]},
    ),
    "regional": ("hunyuan", "regional", {"fine_gates": True}),
    "whole": ("hunyuan", True, {}),
    "whole, checkpointing": ("hunyuan", True, {"checkpointing": True, "dense_layers": [-1], "gates": False}),
    "whole, before the video": ("cogvideox", True, {**ROTARY, "checkpointing": True}),
    "each sample by itself, checkpointing": ("mochi", False, {"checkpointing": True, "grids": [joint.GRID, (2, 6, 7)]}),
    "BSA": ("hunyuan", False, {"builder": fs.BSA(kv_density=0.5), "gates": False}),
    "text in cross-attention": ("ltx", False, CROSS),
    "text in cross-attention, compiled": ("ltx", True, CROSS),
    "Allegro": ("allegro", False, {"config": {"cross_attention_dim": 36}, "rotary": 12}),
    "SkyReels-V2": ("skyreels", False, {}),
    "SkyReels-V2, a time a frame": ("skyreels", False, FORCING),
    "TI2V": ("wan-ti2v", False, {}),
    "Wan": ("wan", False, {}),
    "WanVACE": ("wan-vace", False, {}),
    "WanVACE, compiled": ("wan-vace", "regional", {"checkpointing": True}),
    "ChronoEdit": ("chronoedit", False, {}),
    "Cosmos": ("cosmos", False, {"checkpointing": True}),
    "Cosmos, a time a frame": (
        "cosmos",
        False,
        {"inputs": {"timestep": torch.arange(6.0).reshape(joint.BATCH, 1, joint.GRID[0], 1, 1)}},
    ),
    "EasyAnimate": ("easyanimate", False, {}),
    "Kandinsky 5": ("kandinsky5", False, {"checkpointing": True}),
    "Kandinsky 5, compiled": ("kandinsky5", "regional", {}),
}
WHOLE = {  # models that are not spread, and why
    "ltx2": "its audio attends to the video's, of which a rank would",
    "kandinsky6": "its audio attends to the video's, of which a rank would",
    "framepack": "its history attends to the video's, of which a rank would",
    "helios": "its history attends to the video's, of which a rank would",
    "motif": "has no _cp_plan",
    "wan-animate": "has no _cp_plan",
    "anyflow": "has no _cp_plan",
}


def _check(processes: Processes, case: Case) -> None:
    name, _, options = case
    heads = [2, *[1] * (processes.size - 1)] if processes.size == 2 else [2, 1, 1, 1]
    sparse = len(ZOO[name].sparse) - len(options.get("dense_layers", ()))
    for rank, calls in enumerate(processes.run(joint.same_joint, *case, limit=300)):
        shapes = [shape for _, is_sparse, shape in calls if is_sparse]
        assert len(shapes) >= sparse or "::" in calls[0][0], calls
        assert shapes and all(shape[1] == heads[rank] for shape in shapes), "a call has this rank's heads"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(two: Processes, name: str) -> None:
    _check(two, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_ranks_slow(two: Processes, name: str) -> None:
    _check(two, SLOW[name])


def test_every_model_is_among_them() -> None:
    """docs/models.md says so."""
    assert {name for name, _, _ in (*CASES.values(), *SLOW.values())} == set(ZOO) - set(WHOLE)


@pytest.mark.parametrize("name", WHOLE)
def test_models_that_are_not_spread(name: str) -> None:
    model = fs.wrap(ZOO[name].model(), fs.VSA(top_k=2), compile=False)
    with pytest.raises(ValueError, match=WHOLE[name]):
        fs.distributed.ulysses(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", [("hunyuan", False, {}), ("hunyuan", "regional", {}), ("mochi", False, {})])
def test_four_ranks(four: Processes, case: Case) -> None:
    _check(four, case)


SHORT: list[Any] = [
    ("cogvideox", False, ROTARY),
    ("wan-ti2v", False, {}),
    pytest.param(("allegro", False, {"config": {"cross_attention_dim": 36}, "rotary": 12}), marks=pytest.mark.slow),
    pytest.param(("cogvideox", "regional", ROTARY), marks=pytest.mark.slow),
    pytest.param(("cogvideox", True, ROTARY), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", SHORT)
def test_videos_too_short_to_be_sparse(two: Processes, case: Case) -> None:
    """Models of which the plan cuts arguments: what it does to them depends on the grid."""
    two.run(joint.same_short, *case)


def test_a_mask_over_video_tokens(two: Processes) -> None:
    for message in two.run(joint.said, "mask"):
        assert "its attention mask hides video tokens: run the model on one rank" in message


@pytest.mark.slow
def test_lengths_that_depend_on_data(two: Processes) -> None:
    for message in two.run(joint.said, "data"):
        assert "compile=False" in message


@pytest.mark.parametrize(
    "kind, match",
    [
        ("joined", "but the grid has 75 tokens: cut the video's tokens only"),
        ("name", "the plan cuts 'latents' of Hunyuan"),
    ],
)
def test_plans_that_do_not_fit(two: Processes, kind: str, match: str) -> None:
    for message in two.run(joint.said, kind):
        assert match in message


def test_a_plan_that_cuts_text() -> None:
    model = fs.wrap(ZOO["ltx"].model(), fs.VSA(top_k=2), compile=False)
    with pytest.raises(ValueError, match="cuts encoder_attention_mask, which is text"):
        fs.distributed.ulysses(model, plan=type(model)._cp_plan)


@pytest.mark.parametrize("rank, held", [(0, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 5, 6])])
@pytest.mark.parametrize("first", [True, False])
def test_masks_keep_all_text(rank: int, held: list[int], first: bool) -> None:
    """Three of text and four of video; no model of the zoo has text first and a mask."""
    mask = torch.arange(7).reshape(1, 1, 1, 7)
    state = SimpleNamespace(dense=False, interceptor=SimpleNamespace(known_grid=lambda: (1, 2, 2, 0, 0)))
    state.runs_dense = lambda: state.dense
    cut = Cut(SequenceParallel.planned(Ranks("", rank, 2), Ranks()), state, text_first=first)
    own = cut.cut(mask, Joined(3, 4)).flatten().tolist()
    assert own == (held if first else [*range(2 * rank, 2 * rank + 2), 4, 5, 6])
    state.dense = True
    assert cut.cut(mask, Joined(3, 4)) is mask and cut.cut(3, Leading()) == 3


def test_two_sequences_of_one_length() -> None:
    """A joint call of as many text as video tokens is no cross-attention."""
    model = fs.wrap(ZOO["hunyuan"].model(), fs.VSA(top_k=1), tile=(2, 4, 4), compile=False)
    with torch.no_grad():
        model(**ZOO["hunyuan"].inputs((1, 3, 4), 1))
    assert [call.sparse for call in fs.report(model).calls] == [False, True, True]
