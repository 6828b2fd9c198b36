"""Which layers and which steps are sparse: dense_layers, builders by name, min_tokens, query tiles, DenseSteps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flexsparse as fs

from .test_zoo import ALL, GRID, gradients, run, sparse_names, wrapped
from .zoo import ZOO

WAYS = [True, "regional", False]
SLOWER = [True, pytest.param("regional", marks=pytest.mark.slow), False]
WAN = ZOO["wan"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sample(model: nn.Module, entry: Any = WAN) -> torch.Tensor:
    with torch.no_grad():
        return run(model, entry)


@pytest.mark.parametrize("way", SLOWER)
@pytest.mark.parametrize(
    ("name", "layers", "left"),
    [
        ("wan", [0], ["blocks.1.attn1"]),
        ("wan", ["blocks.1"], ["blocks.0.attn1"]),
        ("hunyuan", [-1], ["transformer_blocks.0.attn"]),
    ],
)
def test_dense_layers(way: Any, name: str, layers: list[Any], left: list[str]) -> None:
    entry = ZOO[name]
    model = wrapped(entry, fs.VSA(top_k=2), way, dense_layers=layers)
    rule = {**dict.fromkeys(left, fs.VSA(top_k=2)), "*": None}
    expected = sample(wrapped(entry, rule, False, attention="reference"), entry)
    torch.testing.assert_close(sample(model, entry), expected, atol=1e-5, rtol=0)
    assert sparse_names(model) == left
    dense = [call for call in fs.report(model).calls if "dense_layers" in call.reason]
    assert {call.name.split(" ")[0] for call in dense} == set(entry.sparse) - set(left)


@pytest.mark.parametrize("way", WAYS)
def test_builders_by_name(way: Any) -> None:
    """Each block its own: swapping them shows, and so would one compiled form for both."""
    first, second = fs.VSA(top_k=1), fs.BSA(keep_queries=0.5, kv_density=0.3)
    rules = {"blocks.0": first, "*": second}
    expected = sample(wrapped(WAN, rules, False, attention="reference"))
    swapped = sample(wrapped(WAN, {"blocks.1": first, "*": second}, False, attention="reference"))
    assert (expected - swapped).abs().max() > 1e-3
    model = wrapped(WAN, rules, way)
    torch.testing.assert_close(sample(model), expected, atol=1e-5, rtol=0)
    density = {call.name: call.density for call in fs.report(model).calls if call.sparse}
    assert density["blocks.0.attn1"] != density["blocks.1.attn1"]


def test_a_schedule_of_one_builder_among_several() -> None:
    """Two builders read schedules of their own; a step of one recompiles nothing and changes its layer only."""
    schedule = fs.SparsitySchedule(start=0.0, target=0.75, step=0.75, every=1)
    other = fs.SparsitySchedule(start=0.5, target=0.75, step=0.25, every=1)
    rules = {"blocks.0": fs.VSA(sparsity=schedule), "blocks.1": fs.VSA(sparsity=other)}
    model = wrapped(WAN, rules, True)
    for top_k in (ALL, 1):
        plain = {"blocks.0": fs.VSA(top_k=top_k), "blocks.1": fs.VSA(top_k=2)}
        expected = sample(wrapped(WAN, plain, False, attention="reference"))
        torch.testing.assert_close(sample(model), expected, atol=1e-5, rtol=0)
        schedule.advance()


def test_gates_go_to_sparse_layers_only() -> None:
    model = wrapped(WAN, fs.VSA(top_k=2), True, gates=True, dense_layers=[0])
    names = {name.split(".to_gate")[0] for name in model.state_dict() if "to_gate_compress" in name}
    assert names == {"blocks.1.attn1"}
    other = wrapped(WAN, fs.VSA(top_k=2), False, gates=True, dense_layers=[0], attention="reference")
    found, expected = gradients(model, WAN, GRID), gradients(other, WAN, GRID)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("way", SLOWER)
def test_min_tokens(way: Any) -> None:
    assert sparse_names_after(wrapped(WAN, fs.VSA(top_k=2), way, min_tokens=256)) == list(WAN.sparse)
    model = wrapped(WAN, fs.VSA(top_k=2), way, min_tokens=257)
    torch.testing.assert_close(sample(model), sample(WAN.model()))
    assert "256 tokens are below min_tokens=257" in str(fs.report(model)) and not sparse_names(model)


def sparse_names_after(model: nn.Module) -> list[str]:
    """What became sparse in a call."""
    sample(model)
    return sparse_names(model)


@pytest.mark.parametrize("way", SLOWER)
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_query_tiles_larger_than_key_tiles(way: Any, name: str) -> None:
    """BSA's 128-slot query tiles that keep half fill 64 rows; with text before the video as well."""
    entry, builder = ZOO[name], fs.BSA(keep_queries=0.5, kv_density=0.4)
    tiles: dict[str, Any] = {"tile": (4, 4, 4), "query_tile": (4, 4, 8)}
    expected = gradients(wrapped(entry, builder, False, attention="reference", **tiles), entry, GRID)
    same = gradients(wrapped(entry, builder, False, attention="reference"), entry, GRID)
    key = next(k for k in expected if "to_q.weight" in k)
    assert (expected[key] - same[key]).abs().max() > 1e-5  # the option does something
    found = gradients(wrapped(entry, builder, way, **tiles), entry, GRID)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected.get(key, torch.zeros_like(grad)), atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("way", [True, False])
def test_training_after_a_validation_with_dense_steps(way: Any) -> None:
    """The callback leaves the model dense for its next run: training went on, dense, without a word."""
    model = wrapped(WAN, fs.VSA(top_k=1), way)
    sparse = sample(model)
    with fs.DenseSteps(model, fraction=0.5, steps=2) as steps:
        for step in (0, 1):
            sample(model)
            steps(None, step, None, {})
        with pytest.raises(RuntimeError, match=r"DenseSteps lets \w+ run dense.* has gradients.*remove\(\).*no_grad"):
            model(**WAN.inputs(GRID, 1))
        model.requires_grad_(False)
        model(**WAN.inputs(GRID, 1))
        model.requires_grad_(True)
    model(**WAN.inputs(GRID, 1), return_dict=False)[0].sum().backward()
    torch.testing.assert_close(sample(model), sparse)
    assert "dense for now" not in str(fs.report(model))
    steps.reset()
    assert "dense for now" not in str(fs.report(model)), "it has let go of the model"


@pytest.mark.parametrize("way", WAYS)
def test_dense_steps(way: Any) -> None:
    """Dense first steps equal the model as it was, gates or not; then sparse; dense again for the next run."""
    plain = sample(WAN.model())
    model = wrapped(WAN, fs.VSA(top_k=1), way, gates=True)
    sparse = sample(model)
    steps = fs.DenseSteps(model, fraction=0.5, steps=4)
    ran = []
    for step in [0, 1, 2, 3] * 2:
        ran.append(torch.allclose(sample(model), plain, atol=1e-5))
        if not ran[-1]:
            torch.testing.assert_close(sample(model), sparse)
        kept = {"latents": torch.zeros(1)}
        assert steps(None, step, None, kept) is kept
    assert ran == [True, True, False, False] * 2


def test_no_dense_step_and_all_dense_steps() -> None:
    model = wrapped(WAN, fs.VSA(top_k=1), False)
    state = model._flexsparse
    for fraction, expected in (
        (0.0, [False] * 4),
        (1.0, [True] * 4),
        (0.1, [False] * 4),
        (np.float32(0.6), [True, True, False, False]),
    ):
        steps, seen = fs.DenseSteps(model, fraction=fraction, steps=4), []
        for step in range(4):
            seen.append(state.dense)
            steps(None, step, None, {})
        assert seen == expected, fraction


def test_the_first_step_is_dense_where_the_pipeline_is_yet_to_say_how_many_there_are() -> None:
    model = wrapped(WAN, fs.VSA(top_k=1), False)
    pipe = SimpleNamespace(num_timesteps=30)
    for steps, expected in ((None, [True, False, False]), (30, [False] * 3), (np.int64(30), [False] * 3)):
        dense_steps, seen = fs.DenseSteps(model, fraction=0.01, steps=steps), []
        for step in range(3):
            seen.append(model._flexsparse.dense)
            dense_steps(pipe, step, None, {})
        assert seen == expected, steps


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"dense_layers": [7]}, fs.VSA(top_k=2), "dense_layers has 7, but WanTransformer3DModel has 2 blocks"),
    ({"dense_layers": 1.5}, fs.VSA(top_k=2), "dense_layers has 1.5: give numbers of blocks, ints, or name patterns"),
    ({"dense_layers": [True, False]}, fs.VSA(top_k=2), "dense_layers has True: give numbers of blocks"),
    ({"dense_layers": ["block.0"]}, fs.VSA(top_k=2), "the pattern 'block.0' matches no module"),
    ({}, {"blocks.9": fs.VSA(top_k=2)}, "the pattern 'blocks.9' matches no module"),
    ({}, {"*": None}, "give at least one mask builder"),
    ({}, {"*": 3}, "builder is {'*': 3}: give a mask builder"),
    ({"gates": True, "dense_layers": ["blocks.*"]}, fs.VSA(top_k=2), "every attention that could have one is dense"),
    ({"gates": True}, {"blocks.0": fs.VSA(top_k=2), "*": fs.BSA()}, "BSA has no coarse output"),
    ({"fine_gates": True}, fs.VSA(top_k=2), "fine_gates is True, but gates is False: give gates=True"),
    ({"fullgraph": False}, fs.VSA(top_k=2), "fullgraph is False: after a graph break"),
]


@pytest.mark.parametrize(("options", "builder", "says"), BAD)
def test_bad_rules(options: dict[str, Any], builder: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        fs.wrap(WAN.model(), builder, **options)


def test_bad_dense_steps() -> None:
    model = wrapped(WAN, fs.VSA(top_k=1), False)
    with pytest.raises(ValueError, match=r"fraction is 1.5: give .* in \[0, 1\]"):
        fs.DenseSteps(model, fraction=1.5)
    for steps in (0, True, 2.5, "4"):
        with pytest.raises(ValueError, match=f"steps is {steps!r}: give the number of denoising steps"):
            fs.DenseSteps(model, fraction=0.5, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not wrapped"):
        fs.DenseSteps(nn.Linear(1, 1), fraction=0.5)
    with pytest.raises(TypeError, match=r"models is object: give one or several wrapped models"):
        fs.DenseSteps(object(), fraction=0.5)
    with pytest.raises(ValueError, match="has no num_timesteps: give"):
        fs.DenseSteps(model, fraction=0.5)(object(), 0, None, {})


def test_a_whole_pipeline() -> None:
    """WanPipeline with tiny parts and prompt embeddings given: two transformers, a few steps, the first dense."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        from diffusers import WanTransformer3DModel

        from .zoo import WAN as CONFIG

        def transformer() -> nn.Module:
            torch.manual_seed(1)
            return WanTransformer3DModel(**{**CONFIG, "in_channels": 16, "out_channels": 16}).eval()

        def pipeline() -> Any:
            pipe = WanPipeline(
                tokenizer=None,
                text_encoder=None,
                vae=vae,
                scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
                transformer=transformer(),
                transformer_2=transformer(),
                boundary_ratio=0.5,
            )
            pipe.set_progress_bar_config(disable=True)
            return pipe

    def latents(pipe: Any, **more: Any) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        embeds = torch.randn(1, 8, 16, generator=g)
        return pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=-embeds,
            height=64,
            width=64,
            num_frames=13,
            num_inference_steps=4,
            generator=g,
            output_type="latent",
            **more,
        ).frames

    dense = latents(pipeline())
    for builder, same in ((fs.VSA(top_k=1), True), (fs.VSA(top_k=1), False)):
        pipe = pipeline()
        models = [fs.wrap(m, builder, tile=(2, 2, 2), compile=False) for m in (pipe.transformer, pipe.transformer_2)]
        found = latents(pipe, callback_on_step_end=fs.DenseSteps(models, fraction=1.0 if same else 0.25))
        assert torch.allclose(found, dense, atol=1e-4) == same
        assert all(bool(fs.report(m).sparse_calls) != same for m in models)


@pytest.mark.parametrize(
    ("way", "name"), [(True, "hunyuan"), (False, "wan"), pytest.param(True, "wan", marks=pytest.mark.slow)]
)
def test_fine_gates(way: Any, name: str) -> None:
    """At first they change nothing; then they weigh the fine output of the video's tokens (a joint block's text has none)."""
    entry = ZOO[name]
    plain = fs.wrap(entry.model(), fs.VSA(top_k=2), compile=False)
    fresh = fs.wrap(entry.model(), fs.VSA(top_k=2), gates=True, fine_gates=True, compile=way, inner="aot_eager")
    torch.testing.assert_close(sample(fresh, entry), sample(plain, entry), atol=1e-5, rtol=0)
    options: dict[str, Any] = {"gates": True, "fine_gates": True}
    model = wrapped(entry, fs.VSA(top_k=2), way, **options)
    expected = gradients(wrapped(entry, fs.VSA(top_k=2), False, attention="reference", **options), entry, GRID)
    found = gradients(model, entry, GRID)
    assert {key.split(".to_gate_fine")[0] for key in found if "to_gate_fine" in key} == set(entry.sparse)
    for key, grad in found.items():
        assert "to_gate" not in key or grad.any(), key
        torch.testing.assert_close(grad, expected.get(key, torch.zeros_like(grad)), atol=2e-6, rtol=1e-3)
