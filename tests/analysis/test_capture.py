"""Watching a model: what is seen is what ran, what runs is what ran before, and nothing stays behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from models.entry import kind_of
from models.zoo import NOT_CALLED, TEXT, ZOO

import flexsparse as fs
from flexsparse.analysis import SparseCall, inspect, measures, view, watch
from flexsparse.analysis.inputs import channels_of, model_inputs, patch_of
from flexsparse.wrap import state_of

GRID = (3, 6, 10)
BSA = fs.BSA(keep_queries=0.5, kv_density=0.4)


def wrapped(name: str, builder: Any, **options: Any) -> nn.Module:
    model = fs.wrap(ZOO[name].model(), builder, compile=False, **options)
    with torch.no_grad():
        for parameter in fs.gate_parameters(model):
            parameter.fill_(0.05)
    return model


def run(model: nn.Module, name: str, batch: int = 2) -> Tensor:
    with torch.no_grad():
        return model(**ZOO[name].inputs(GRID, batch), return_dict=False)[0]


def seen(model: nn.Module, name: str) -> tuple[list[SparseCall], Tensor]:
    calls: list[SparseCall] = []
    with watch(model, calls.append):
        out = run(model, name)
    return calls, out


@pytest.mark.parametrize(("name", "builder", "gates"), [("wan", fs.VSA(top_k=3), True), ("hunyuan", BSA, False)])
def test_the_output_is_the_same_and_every_sparse_call_is_seen(name: str, builder: Any, gates: bool) -> None:
    model = wrapped(name, builder, gates=gates)
    before = run(model, name)
    calls, out = seen(model, name)
    assert torch.equal(out, before) and torch.equal(run(model, name), before)
    assert [call.name for call in calls] == list(ZOO[name].sparse)
    assert not any(call.q.requires_grad for call in calls)


def test_q_k_and_the_selection_are_those_of_the_call() -> None:
    """The text that the mask hides is not among the valid tokens; sample 1 has three tokens less than sample 0."""
    builder = fs.VSA(top_k=2)
    for call in seen(wrapped("hunyuan", builder), "hunyuan")[0]:
        layout = call.selection.layout
        assert (layout.grid, layout.text_last, call.q.shape) == (GRID, TEXT, (2, 2, 180 + TEXT, 16))
        assert torch.equal(call.selection.bits, builder.select(call.q, call.k, layout, scale=call.scale).bits)
        assert call.scale == 0.25 and call.selection.kv_tile_counts()[:, -1].tolist() == [TEXT, TEXT - 3]
        assert not torch.equal(call.q, call.k)


def test_a_builder_of_somebodys_own() -> None:
    class Own:
        def select(self, q: Tensor, k: Tensor, layout: Any, **options: Any) -> fs.TileSelection:
            return fs.VSA(top_k=1).select(q, k, layout, **options)

    calls, _ = seen(wrapped("wan", Own()), "wan")
    assert [int(call.selection.counts.max()) for call in calls] == [1, 1]


def test_builders_by_name_and_dense_blocks() -> None:
    rules = {"blocks.1": fs.VSA(top_k=2), "*": None}
    calls, _ = seen(wrapped("wan", rules), "wan")
    assert [(call.name, int(call.selection.counts.max())) for call in calls] == [("blocks.1.attn1", 2)]


def test_nothing_stays_behind() -> None:
    model = wrapped("wan", fs.VSA(top_k=2))
    state = state_of(model)
    rules = state.backend.rules

    def broken(_: SparseCall) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watch(model, broken):
        run(model, "wan")
    with watch(model, broken):
        assert state.backend.rules.builders[0].has_coarse, "a gate could not be used else"
    assert state.backend.rules is rules and "sdpa" not in vars(state.interceptor)
    assert len(seen(model, "wan")[0]) == 2


def test_what_cannot_be_watched() -> None:
    model = ZOO["wan"].model()
    with pytest.raises(ValueError, match="is not wrapped"), watch(model, print):
        pass
    fs.wrap(model, fs.VSA(top_k=2), compile="regional")
    with (
        pytest.raises(ValueError, match=r"compile='regional'.*give wrap\(\.\.\., compile=False\)"),
        watch(model, print),
    ):
        pass
    model = wrapped("wan", fs.VSA(top_k=2))
    with watch(model, print), pytest.raises(ValueError, match="watched already"), watch(model, print):
        pass
    model.blocks[0].compile()
    with pytest.raises(ValueError, match="has compiled parts"), watch(model, print):
        pass


@pytest.mark.parametrize("name", NOT_CALLED)
def test_models_that_cannot_be_called_here_say_why(name: str) -> None:
    model = ZOO[name].model()
    with pytest.raises(ValueError, match=NOT_CALLED[name]):
        model_inputs(model, torch.randn(1, channels_of(model), *GRID), 0.25, 6)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_CALLED])
def test_every_model_can_be_looked_at(name: str) -> None:
    model = ZOO[name].model()
    patch = patch_of(model)
    latents = torch.randn(1, channels_of(model), *(size * side for size, side in zip(GRID, patch)))
    inputs = model_inputs(model, latents, 0.25, 6)
    found = inspect(fs.wrap(model, BSA, compile=False), inputs, sample=2)
    assert sorted(layer.name for layer in found.layers) == sorted(ZOO[name].sparse)
    assert {layer.layout.grid for layer in found.layers} == {GRID}
    assert {call.name for call in found.calls if call.sparse} == set(ZOO[name].sparse)
    for layer in found.layers:
        assert float(layer.recall.min()) > 0 and bool(layer.kept_queries is not None)
        assert float(layer.mass.sum(-1).sub(1).abs().max()) < 1e-5


COSMOS = {"in_channels": 5, "extra_pos_embed_type": None}
COSMOS_25 = COSMOS | {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 24,
    "encoder_hidden_states_channels": 16,
}


@pytest.mark.parametrize(
    ("name", "others", "size"),
    [
        ("cosmos", {}, (3, 8, 12)),
        ("cosmos", COSMOS_25, (3, 8, 12)),
        ("easyanimate", {}, (3, 8, 12)),
        ("kandinsky5", {}, (3, 8, 12)),
        ("kandinsky5", {"visual_cond": True, "num_visual_blocks": 1}, (1, 60, 60)),
        ("motif", {"image_embed_dim": 12}, (3, 8, 12)),
        ("chronoedit", {}, (3, 8, 12)),
    ],
)
def test_a_model_is_called_as_in_fine_tuning(name: str, others: dict, size: tuple) -> None:
    """Which the tests of fine-tuning compare with its pipeline: times, positions, layouts, masks."""
    pytest.importorskip("accelerate")
    from finetune.pipelines import Recorder

    from flexsparse.finetune.families import family_of
    from flexsparse.finetune.inputs import Batch

    kind, config = ZOO[name].make
    model = kind_of(kind)(**{**config, **others})
    latents = torch.randn(1, channels_of(model), *size)
    ours = model_inputs(model, latents, 0.75, 6)
    recorder = Recorder(model)
    text, pooled = torch.zeros_like(ours["encoder_hidden_states"]), ours.get("pooled_projections")
    batch = Batch(noisy=latents, t=torch.tensor([0.75]), text=text, lengths=torch.tensor([6]), pooled=pooled)
    family_of(type(model), model.config).velocity(model, model.config, batch)
    theirs = recorder.calls[0]
    theirs.pop("padding_mask", None)  # in pixels; both are zeros, and not used without torchvision
    assert theirs.keys() == {key for key, value in ours.items() if value is not None} - {"return_dict", "padding_mask"}
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[key].to(value.dtype), value, msg=lambda m, key=key: f"{key}: {m}")
        elif key == "visual_rope_pos":
            assert all(torch.equal(mine, other) for mine, other in zip(ours[key], value, strict=True))
        else:
            assert ours[key] == value


def test_audio_and_control_are_neutral() -> None:
    """LTX-2's video does not see its audio; WanVACE's control is of a grey video, all of which is to be made."""
    model = ZOO["ltx2"].model()
    inputs = model_inputs(model, torch.randn(1, 4, *GRID), 0.5, 6)
    with torch.no_grad():
        heard, other = (model(**{**inputs, "audio_hidden_states": torch.full((1, 1, 4), x)})[0] for x in (0.0, 3.0))
    assert torch.equal(heard, other)
    vace = ZOO["wan-vace"].model()
    control = model_inputs(vace, torch.randn(1, 4, 3, 8, 8), 0.5, 6)["control_hidden_states"]
    assert control.shape == (1, 8, 3, 8, 8) and not control.any()
    config = {**ZOO["wan-vace"].make[1], "vace_in_channels": 72}
    control = model_inputs(type(vace)(**config), torch.randn(1, 4, 3, 8, 8), 0.5, 6)["control_hidden_states"]
    assert not control[:, :8].any() and bool((control[:, 8:] == 1).all()) and control.shape[1] == 72


def test_consisid_is_called_as_cogvideox() -> None:
    import diffusers

    config = {**ZOO["cogvideox"].make[1], "use_rotary_positional_embeddings": True, "is_train_face": False}
    model = diffusers.ConsisIDTransformer3DModel(**config)
    inputs = model_inputs(model, torch.randn(1, 4, 3, 12, 20), 0.5, 64)
    found = inspect(fs.wrap(model, fs.VSA(top_k=2), compile=False), inputs, sample=2)
    assert [layer.name for layer in found.layers] == list(ZOO["cogvideox"].sparse)
    assert (found.layers[0].layout.grid, found.layers[0].layout.text_first) == (GRID, 8)


def test_a_grid_beyond_the_tables_of_cogvideox() -> None:
    import diffusers

    changed = {"use_rotary_positional_embeddings": True, "patch_size_t": 2}
    model = diffusers.CogVideoXTransformer3DModel(**{**ZOO["cogvideox"].make[1], **changed})
    with pytest.raises(ValueError, match=r"the grid is \(2, 6, 10\).* positions up to \(8, 8\)"):
        model_inputs(model, torch.zeros(1, 4, 4, 12, 20), 0.5, 6)


def test_time_runs_the_other_way_in_mochi() -> None:
    latents = torch.zeros(1, 12, 2, 4, 4)
    steps = {name: float(model_inputs(ZOO[name].model(), latents, 0.25, 6)["timestep"]) for name in ("wan", "mochi")}
    assert steps == {"wan": 250, "mochi": 750}


@pytest.mark.parametrize("temporal", [None, 2])
def test_rotary_tables_of_cogvideox_are_its_pipelines(temporal: int | None) -> None:
    pipelines = pytest.importorskip("diffusers.pipelines.cogvideo.pipeline_cogvideox")
    import diffusers

    changed = {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": temporal,
        "sample_height": 20,
        "sample_width": 24,
    }
    model = diffusers.CogVideoXTransformer3DModel(**{**ZOO["cogvideox"].make[1], **changed})
    latents = torch.zeros(1, 4, 4, 12, 20)
    mine = model_inputs(model, latents, 0.5, 6)["image_rotary_emb"]
    stand_in = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    prepare = pipelines.CogVideoXPipeline._prepare_rotary_positional_embeddings
    for one, other in zip(mine, prepare(stand_in, 12 * 8, 20 * 8, 4, torch.device("cpu"))):
        assert torch.equal(one, other)


def test_rotary_tables_of_allegro_are_its_pipelines() -> None:
    pipelines = pytest.importorskip("diffusers.pipelines.allegro.pipeline_allegro")
    model = ZOO["allegro"].model()
    latents = torch.zeros(1, 4, 3, 12, 20)
    mine = model_inputs(model, latents, 0.5, 6)["image_rotary_emb"]
    stand_in = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    prepare = pipelines.AllegroPipeline._prepare_rotary_positional_embeddings
    other = prepare(stand_in, 1, 12 * 8, 20 * 8, 3, torch.device("cpu"))
    flat = [torch.utils._pytree.tree_leaves(x) for x in (mine, other)]
    assert len(flat[0]) == len(flat[1]) > 4
    for one, two in zip(*flat):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def test_heads_of_a_call_are_its_own() -> None:
    """Of one head, in GQA too: as if the others were not there."""
    layout = fs.TileLayout(grid=(3, 5, 7), tile=(2, 3, 4), text_last=5)
    q, k = torch.randn(2, 4, layout.seq_len, 8), torch.randn(2, 2, layout.seq_len, 8)
    call = SparseCall(name="x", q=q, k=k, scale=0.5, selection=BSA.select(q, k, layout, scale=0.5))
    every, some = view(call, sample=4), view(call, heads=[3, 1], sample=4)
    assert some.heads == [3, 1]
    for field in ("bits", "density", "row_density", "mass", "recall", "kept_queries"):
        assert torch.equal(getattr(some, field), getattr(every, field)[[3, 1]]), field
    mass = measures.tile_mass(q, k, call.selection, every.rows, 0.5)
    torch.testing.assert_close(every.mass, mass[0], atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_on_a_gpu_are_those_of_the_cpu() -> None:
    layout = fs.TileLayout(grid=(3, 5, 7), tile=(2, 3, 4), text_last=5)
    q, k = torch.randn(1, 4, layout.seq_len, 16), torch.randn(1, 2, layout.seq_len, 16)
    chosen = BSA.select(q.cuda(), k.cuda(), layout)
    there = view(SparseCall(name="x", q=q.cuda(), k=k.cuda(), scale=0.25, selection=chosen))
    here = view(SparseCall(name="x", q=q, k=k, scale=0.25, selection=BSA.select(q, k, layout)))
    assert torch.equal(there.bits, here.bits)
    for field in ("density", "row_density", "mass", "recall"):
        torch.testing.assert_close(getattr(there, field), getattr(here, field), atol=1e-5, rtol=0)


def test_layers_and_heads_out_of_range() -> None:
    model = wrapped("wan", fs.VSA(top_k=2))
    inputs = model_inputs(model, torch.randn(1, 4, 3, 12, 20), 0.5, 6)
    assert [layer.index for layer in inspect(model, inputs, layers=[1]).layers] == [1]
    with pytest.raises(ValueError, match=r"layers has 2, but WanTransformer3DModel has 2 sparse calls: .* from 0 to 1"):
        inspect(model, inputs, layers=[0, 2])
    with pytest.raises(ValueError, match=r"heads has 2, but blocks\.0\.attn1 has 2 heads: .* from 0 to 1"):
        inspect(model, inputs, heads=[2])


def test_a_model_with_arguments_that_are_not_known() -> None:
    class Strange(nn.Module):
        config: ClassVar[dict[str, Any]] = {"patch_size": (1, 2, 2), "in_channels": 4}

        def forward(self, hidden_states: Tensor, camera: Tensor) -> Tensor:
            return hidden_states

    with pytest.raises(ValueError, match=r"Strange needs camera: it is no video transformer"):
        model_inputs(Strange(), torch.zeros(1, 4, 2, 4, 4), 0.5, 6)
