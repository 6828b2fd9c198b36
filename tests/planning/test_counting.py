"""What a plan counts on fake tensors, against torch's counter on real models."""

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

import flexsparse as fs
from flexsparse.planning import modes
from flexsparse.planning.counting import PlanError, count, fake
from flexsparse.planning.models import KINDS, Source, build, example
from flexsparse.planning.modes import Products, values
from tests.models.zoo import ZOO

GRID = (4, 8, 8)


def _counts(name, batch=1, **how):
    with fake():
        model = build(Source(name=name, kind=ZOO[name].make[0], config=ZOO[name].make[1]), torch.float32)
        text = ZOO[name].inputs(GRID, 1)["encoder_hidden_states"].shape[-2]
        inputs = example(model, GRID, batch, torch.float32, text)
        if name == "hunyuan15":
            inputs["encoder_hidden_states_2"] = inputs["encoder_hidden_states_2"][:, :4]
            with unset_fake_temporarily():
                inputs["image_embeds"] = torch.zeros(batch, 3, 12)
                inputs["encoder_attention_mask_2"] = torch.ones(batch, 4).long()
        if name == "ltx2":  # the zoo's audio is shorter than its video
            inputs["audio_hidden_states"], inputs["audio_num_frames"] = inputs["audio_hidden_states"][:, :10], 10
        return count(model, inputs, **how)


def _real(name, batch=1, training=False, checkpointing=False):
    """FLOPs that torch counts of the model itself; attention as two products."""
    model, inputs = ZOO[name].model(), ZOO[name].inputs(GRID, batch)
    for key in {"easyanimate": ["encoder_hidden_states_t5"], "motif": ["image_embeds"]}.get(name, []):
        del inputs[key]  # which its pipeline for text to video does not give
    for key in inputs:
        if "mask" in key:
            inputs[key] = torch.ones_like(inputs[key])
    if checkpointing:
        model.enable_gradient_checkpointing()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training):
        out = model(**inputs, return_dict=False)[0]
        if training:
            out.sum().backward()
    return counter.get_total_flops()


AS_WAN = ("wan-ti2v", "skyreels")


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].make[0] in KINDS and name not in AS_WAN])
def test_a_dense_forward_counts_what_torch_counts(name):
    found = _counts(name)
    assert not found.sparse and found.dense
    assert found.other + found.dense_attention == _real(name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_a_training_step_counts_what_torch_counts(name, checkpointing):
    found = _counts(name, training=True, checkpointing=checkpointing)
    inside = [call for call in found.dense if "refiner" not in call.name]  # hunyuan's refiner is not checkpointed
    again = sum(call.flops for call in inside) if checkpointing else 0
    attention = 3 * found.dense_attention + again  # plain torch: four products backward for two forward
    assert found.other + values(found.backward) + attention == _real(name, training=True, checkpointing=checkpointing)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox", "mochi", "wan-vace"])
def test_the_sparse_calls_are_the_models(name):
    batch = 2
    dense, sparse = _counts(name, batch), _counts(name, batch, builder=fs.VSA(top_k=2))
    entry = ZOO[name]
    samples = batch if name == "mochi" else 1  # which runs them one by one
    assert len(sparse.sparse) == samples * len(entry.sparse)
    assert len(sparse.sparse) + len(sparse.dense) == len(dense.dense)
    assert sparse.other == dense.other
    for call in sparse.sparse:
        assert (call.layout.text_first, call.layout.text_last) == entry.text
        assert call.layout.grid == GRID and call.batch * samples == batch


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("cosmos", {"in_channels": 5}, {"hidden_states": (2, 4, 4, 16, 16), "condition_mask": (2, 1, 4, 16, 16)}),
        ("cosmos", {"in_channels": 5, "out_channels": 4}, {"timestep": (2, 1, 4, 1, 1)}),
        (
            "cosmos",
            {"use_crossattn_projection": True, "crossattn_proj_in_channels": 24, "encoder_hidden_states_channels": 16},
            {"encoder_hidden_states": (2, 512, 24)},
        ),
        ("kandinsky5", {"visual_cond": True}, {"hidden_states": (2, 4, 16, 16, 9), "pooled_projections": (2, 8)}),
        ("ltx2", {}, {"audio_hidden_states": (2, 26, 4), "audio_encoder_attention_mask": (2, 1024)}),
        ("wan-vace", {}, {"control_hidden_states": (2, 8, 4, 16, 16)}),
    ],
)
def test_what_only_one_class_is_given(name, changes, wanted):
    kind, config = ZOO[name].make
    with fake():
        model = build(Source(name=name, kind=kind, config={**config, **changes}), torch.float32)
        inputs = example(model, GRID, 2, torch.float32)
        assert {key: tuple(inputs[key].shape) for key in wanted} == wanted
        assert count(model, inputs).dense


def test_gates_are_counted():
    plain, gated = (_counts("wan", builder=fs.VSA(top_k=2), gates=gates) for gates in (False, True))
    width, tokens, calls = 32, 4 * 8 * 8, 2
    assert gated.other - plain.other == calls * 2 * tokens * width * width
    assert gated.gate_parameters == calls * (width * width + width) and plain.gate_parameters == 0
    assert [call.gates for call in gated.sparse] == [1, 1]


def test_checkpointing_saves_less_and_computes_more():
    plain, again = (_counts("wan", training=True, checkpointing=c) for c in (False, True))
    assert 0 < again.saved < plain.saved / 2
    assert values(again.backward) > values(plain.backward)
    assert plain.largest_block * 2 <= plain.saved


def test_saved_bytes_are_those_of_the_real_model():
    model, inputs = ZOO["wan"].model(), ZOO["wan"].inputs(GRID, 1)
    own, held = {x.untyped_storage().data_ptr() for x in model.parameters()}, {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(**inputs, return_dict=False)[0]
    real = sum(x.untyped_storage().nbytes() for key, x in held.items() if key not in own)
    assert _counts("wan", training=True).saved == pytest.approx(real, rel=0.02)  # small constants apart
    assert out.requires_grad


def test_nothing_fake_is_left_behind(monkeypatch):
    monkeypatch.setattr(modes, "SMALL", 0)  # as for tables of a large grid
    _counts("wan", builder=fs.BSA(keep_queries=0.5, window=(1, 2, 3)))
    layout = fs.TileLayout(grid=GRID, tile=(4, 4, 4))
    x = torch.randn(1, 1, layout.seq_len, 4)
    assert torch.equal(layout.to_raster(layout.to_tiles(x)), x)
    out = fs.sparse_attention(x, x, x, layout, fs.BSA(keep_queries=0.5, window=(1, 2, 3)))
    assert type(out) is torch.Tensor and out.isfinite().all()


def test_a_builder_that_does_not_fit_is_one_error():
    with pytest.raises(PlanError, match="top_k is 99"):
        _counts("wan", builder=fs.VSA(top_k=99))


def test_peak_is_what_is_alive_at_once():
    with fake(), Products() as products, torch.no_grad():
        x = torch.empty(1000)
        for _ in range(3):
            x = x + 1  # two are alive at once
        y = x.view(10, 100)
        del x
        z = y @ y.T
    assert products.peak == 2 * 4000
    assert products.bytes == 4000 + z.numel() * 4
    assert dict(products.found["forward"]) == {(2.0 * 10 * 10 * 100, 4 * (1000 + 1000 + 100)): 1}


def test_inference_needs_less_than_training():
    forward, step = _counts("wan"), _counts("wan", training=True)
    assert 0 < forward.peak < step.saved < step.peak and forward.saved == 0
