"""Memory, communication and times of a plan."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch

pytest.importorskip("diffusers")

import flexsparse as fs
from flexsparse.distributed import traffic
from flexsparse.planning import PlanError, Settings, evaluate, machines, measure
from flexsparse.planning.counting import fake, parameters
from flexsparse.planning.figure import over_density, over_gpus
from flexsparse.planning.machines import MACHINES
from flexsparse.planning.models import PRESETS, build, example, find, grid_of, heads_of
from flexsparse.planning.shares import Shares, shares
from tests.models.zoo import ZOO

GRID = (4, 8, 8)
CONFIG = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 2, "ffn_dim": 512}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The folder of a tiny Wan."""
    place = tmp_path_factory.mktemp("wan")
    kind, config = ZOO["wan"].make
    (place / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
    return str(place)


@pytest.fixture
def planned(wan):
    """Settings of a tiny Wan, and its counts, which do not depend on the GPUs."""

    def make(**changes):
        settings = Settings(**{"model": wan, "grid": GRID, "builder": fs.VSA(top_k=2), **changes})
        return settings, counted(dataclasses.replace(settings, gpus=1, ulysses=1, fsdp=1))

    return make


counted = functools.cache(measure)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Counts of a Wan of two blocks on a long sequence, where attention and not its weights takes the time."""
    place = tmp_path_factory.mktemp("long")
    kind, config = ZOO["wan"].make
    (place / "config.json").write_text(json.dumps({"_class_name": kind, **config, **CONFIG, "rope_max_seq_len": 1024}))
    settings = Settings(model=str(place), grid=(16, 32, 32), builder=fs.VSA(sparsity=0.9))
    return settings, measure(settings)


def test_weights_are_the_parameters_bytes(planned):
    real = ZOO["wan"].model().bfloat16()
    settings, counts = planned(training=False)
    found = evaluate(settings, counts).memory
    bytes_ = sum(x.nbytes for x in real.parameters())
    assert found.weights == bytes_ and found.gradients == found.optimizer == 0
    assert found.total == found.weights + found.activations + found.lists > bytes_


def test_gates_are_weights(planned):
    model = fs.wrap(ZOO["wan"].model(), fs.VSA(top_k=2), gates=True, compile=False)
    found = evaluate(*planned(gates=True)).memory
    assert found.weights == sum(x.nbytes for x in model.parameters())  # float32 in training


def test_training_holds_four_float32_tensors_and_fsdp_cuts_them(planned):
    settings, counts = planned()
    one = evaluate(settings, counts).memory
    half = evaluate(dataclasses.replace(settings, gpus=2, fsdp=2), counts).memory
    bytes_ = sum(x.nbytes for x in ZOO["wan"].model().parameters())
    assert (one.weights, one.gradients, one.optimizer) == (bytes_, bytes_, 2 * bytes_)
    assert one.compute_weights == bytes_ / 2  # bfloat16
    assert (half.weights, half.gradients, half.optimizer) == (bytes_ / 2, bytes_ / 2, bytes_)
    assert half.compute_weights == bytes_ / 2  # two blocks, all that it has, and what is in none


def test_fsdp_gathers_blocks_with_their_gates(planned):
    model = fs.wrap(ZOO["wan"].model(), fs.VSA(top_k=2), gates=True, compile=False)
    whole, *blocks = (sum(x.numel() for x in part.parameters()) for part in (model, *model.blocks))
    found = evaluate(*planned(gates=True, gpus=2, fsdp=2)).memory
    assert found.compute_weights == 2 * (2 * max(blocks) + whole - sum(blocks))  # bfloat16


def test_the_dense_step_has_no_gates(planned):
    plain, gated = (evaluate(*planned(gates=gates, gpus=4, fsdp=2)) for gates in (False, True))
    assert gated.dense == plain.dense
    assert gated.sparse.optimizer > plain.sparse.optimizer and gated.sparse.beside > plain.sparse.beside


def test_lists_and_bitmasks_are_those_of_selections(planned):
    settings, counts = planned()
    found = evaluate(settings, counts).memory
    layout = fs.TileLayout(grid=GRID, tile=(4, 4, 4))
    q = torch.randn(1, 2, layout.seq_len, 16)
    selection = settings.builder.select(q, q, layout)
    columns = sum(x.nbytes for x in selection.transpose())
    assert found.lists == selection.kv_indices.nbytes + columns
    assert found.bitmasks == 2 * (selection.bits.nbytes + selection.counts.nbytes)  # of two calls


def test_activations_with_and_without_checkpointing(planned):
    settings, counts = planned(checkpointing=True)
    own = evaluate(settings, counts).memory
    without = evaluate(*planned(checkpointing=False)).memory
    assert own.activations == own.checkpointed < own.plain == without.activations
    half = evaluate(dataclasses.replace(settings, gpus=2, ulysses=2), counts).memory
    assert half.activations == own.activations / 2


@pytest.mark.parametrize(("how", "times"), [({"training": False}, 1), ({"checkpointing": False}, 2), ({}, 3)])
@pytest.mark.parametrize("gates", [False, True])
def test_ulysses_bytes_are_those_of_the_exchange(planned, how, times, gates):
    settings, counts = planned(gates=gates, gpus=2, ulysses=2, batch=2, **how)
    layout = fs.TileLayout(grid=GRID, tile=(4, 4, 4))
    each = traffic(layout, heads=2, head_dim=16, ulysses=2, gates=int(gates), batch=2).total
    assert evaluate(settings, counts).communication.ulysses == 2 * times * each  # two calls
    elements = (4 + gates) * 2 * layout.seq_len * 16 / 2 * (2 - 1) / 2  # as docs/distributed.md has it
    assert each == 2 * 2 * elements


def test_text_that_joins_the_video_is_on_every_gpu(folder):
    settings = Settings(model=str(folder("hunyuan")), grid=GRID, builder=fs.VSA(top_k=2), checkpointing=False)
    counts = measure(settings)
    one, two = (evaluate(dataclasses.replace(settings, gpus=n, ulysses=n), counts) for n in (1, 2))
    calls = counts.sparse.sparse
    video, text = calls[0].layout.num_tokens, calls[0].layout.text_last
    assert len(calls) == 2 and text > 0
    for heads, dim in ((call.heads, call.head_dim) for call in calls):
        assert (heads, dim) == (2, 16)
    each = (3 * video / 2 + video / 2 + text) * 16 * 2  # q, k, v of the video, and outputs of both, of the other's head
    assert two.communication.ulysses == 2 * 2 * each  # forward and backward of two calls
    share = (video / 2 + text) / (video + text)
    assert two.memory.activations == pytest.approx(one.memory.activations * share)
    assert two.sparse.products == pytest.approx(one.sparse.products * share)


@pytest.mark.parametrize(("gpus", "fsdp"), [(2, 2), (4, 4), (4, 2), (4, 1)])
def test_fsdp_bytes_are_the_others_shards(planned, gpus, fsdp):
    settings, counts = planned(gpus=gpus, fsdp=fsdp)
    found = evaluate(settings, counts).communication
    bytes_ = 2 * counts.parameters
    others = sum(bytes_ / fsdp for _ in range(fsdp - 1))  # what a rank lacks of all weights
    again = others * counts.sparse.in_blocks / counts.parameters  # in backward, those of blocks
    assert found.gather == pytest.approx(others + again) and found.scatter == others
    copies = gpus // fsdp
    assert found.replicas == pytest.approx(2 * sum(bytes_ / fsdp / copies for _ in range(copies - 1)))
    assert found.ulysses == 0


def test_lower_density_costs_less(long):
    for builder in (fs.VSA(sparsity=0.9), fs.BSA(keep_queries=0.5, kv_density=0.1)):
        plans = over_density(dataclasses.replace(long[0], builder=builder), long[1])
        for low, high in itertools.pairwise(plans):
            assert low.density < high.density
            assert low.flops.sparse_total < high.flops.sparse_total
            assert low.sparse.total < high.sparse.total
            assert low.dense == high.dense


def test_all_tiles_cost_what_dense_attention_costs(long):
    full = evaluate(dataclasses.replace(long[0], builder=fs.VSA(sparsity=0.0)), long[1])
    assert full.padding == 0
    assert full.flops.fine == full.flops.attention
    assert full.flops.fine_valid == full.flops.attention[0]


def test_more_gpus_take_less_time_until_communication_does(long):
    plans = over_gpus(*long)
    assert [plan.settings.gpus for plan in plans] == [1, 2, 4]
    assert plans[0].sparse.ulysses == plans[0].sparse.beside == 0
    for few, many in itertools.pairwise(plans):
        assert many.sparse.compute < few.sparse.compute
        assert few.flops == many.flops  # of the whole replica
        assert many.memory.total < few.memory.total
    slow = dataclasses.replace(MACHINES["h200"], nvlink=1e6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machines, "MACHINES", {"h200": slow})
        plans = over_gpus(*long)
    assert plans[1].sparse.total > plans[0].sparse.total
    assert plans[1].sparse.ulysses > plans[1].sparse.compute


def test_groups_beyond_a_node_use_the_network(long):
    machine, share = MACHINES["h200"], Shares().links.value
    for gpus, fsdp in ((8, 8), (16, 16), (16, 8)):
        found = evaluate(dataclasses.replace(long[0], gpus=gpus, fsdp=fsdp), long[1])
        bytes_, within = found.communication, machine.nvlink if fsdp == 8 else machine.network
        expected = (bytes_.gather + bytes_.scatter) / within + bytes_.replicas / machine.network
        assert found.sparse.beside == pytest.approx(expected / share)
        assert (bytes_.replicas > 0) == (gpus > fsdp)


def test_heads_that_do_not_divide_wait_for_the_busiest(long):
    one, two, three = (evaluate(dataclasses.replace(long[0], gpus=n, ulysses=n), long[1]) for n in (1, 2, 3))
    for name in ("fine", "selection", "coarse"):  # two of four heads, either way
        parts = [getattr(plan.sparse, name) for plan in (one, two, three)]
        assert parts == pytest.approx([parts[0], parts[0] / 2, parts[0] / 2])
    assert one.dense.attention / 2 == pytest.approx(two.dense.attention) == pytest.approx(three.dense.attention)
    assert three.sparse.products == pytest.approx(one.sparse.products / 3)


def test_a_step_is_its_parts(long):
    found = evaluate(dataclasses.replace(long[0], gpus=2, ulysses=2, fsdp=2), long[1])
    for times, flops in ((found.sparse, found.flops.fine), (found.dense, found.flops.attention)):
        parts = dataclasses.asdict(times)
        beside, optimizer = parts.pop("beside"), parts.pop("optimizer")
        assert times.total == pytest.approx(max(sum(parts.values()), beside) + optimizer)
        assert sum(flops) > 0
    rate, share = MACHINES["h200"].products["bfloat16"], Shares()
    forward, again = found.flops.attention[0], found.flops.attention[1] - 2.5 * found.flops.attention[0]
    assert again == pytest.approx(forward)
    expected = 2 * forward / (rate * share.dense_forward.value) + 2.5 * forward / (rate * share.dense_backward.value)
    assert found.dense.attention == pytest.approx(expected / 2)  # of two GPUs


def _file(path, gpu="NVIDIA H200", suite="gpu"):
    row = {"case": "x", "dtype": "bfloat16", "part": None, "ms": [2.0, 1.0, 3.0], "D": 64, "tflops": None}
    peak = MACHINES["h200"].products["bfloat16"] / 1e12
    rows = [
        row | {"op": "fine_forward", "impl": "flexsparse", "tflops": 0.25 * peak},
        row | {"op": "fine_forward", "impl": "flexsparse", "tflops": 0.9 * peak, "D": 128},
        row | {"op": "fine_forward", "impl": "flexsparse", "tflops": 0.9 * peak, "case": "tune-x"},
        row | {"op": "fine_forward", "impl": "dense_cudnn", "tflops": 0.5 * peak, "ms": None},
        row | {"op": "ceiling", "impl": "torch", "part": "copy", "bytes": 0.75 * 2e-3 * MACHINES["h200"].hbm},
    ]
    path.write_text(json.dumps({"header": {"suite": suite, "gpu": gpu}, "rows": rows}))


def test_what_was_measured_takes_the_place_of_assumptions(long, tmp_path):
    _file(tmp_path / "run.json")
    found = shares(MACHINES["h200"], 64, "bfloat16", tmp_path)
    assert found.fine_forward.value == pytest.approx(0.25) and found.fine_forward.origin == "run.json"
    assert found.memory.value == pytest.approx(0.75) and found.memory.measured
    assert found.dense_forward == Shares().dense_forward and not found.dense_forward.measured
    nothing = tmp_path / "empty"
    nothing.mkdir()
    assumed, measured = (evaluate(dataclasses.replace(long[0], results=r), long[1]) for r in (nothing, tmp_path))
    assert "every share" in assumed.notes[0] and "every share" not in measured.notes[0]
    assert "dense_forward" in measured.notes[0] and "fine_forward" not in measured.notes[0]
    assert measured.sparse.fine > assumed.sparse.fine  # half the share in forward


@pytest.mark.parametrize("file", [{"gpu": "NVIDIA H100 80GB HBM3"}, {"suite": "cpu"}, {"gpu": None}])
def test_other_machines_files_say_nothing(file, tmp_path):
    _file(tmp_path / "run.json", **file)
    (tmp_path / "broken.json").write_text("{")
    assert shares(MACHINES["h200"], 64, "bfloat16", tmp_path) == Shares()


def test_presets_have_the_sizes_of_their_names():
    expected = {"wan2.1-1.3b": (1.2e9, 1.5e9), "wan2.1-14b": (13.5e9, 14.6e9), "hunyuanvideo": (12.5e9, 13.5e9)}
    for name, (low, high) in (expected | {"cogvideox-5b": (5e9, 6e9)}).items():
        with fake():
            size, _, block = parameters(build(find(name), torch.bfloat16))
        assert low < size < high and 0 < block < size / 10
    assert set(PRESETS) == {*expected, "cogvideox-5b"}


def test_heads_are_known_before_a_model_is_made():
    assert {name: heads_of(find(name)) for name in PRESETS} == {
        "wan2.1-1.3b": 12,
        "wan2.1-14b": 40,
        "hunyuanvideo": 24,
        "cogvideox-5b": 48,
    }


def test_pixels_become_tokens():
    source = find("wan2.1-1.3b")
    with fake():
        model = build(source, torch.bfloat16)
        assert grid_of(model, source, (81, 480, 832)) == (21, 30, 52)
        for pixels, match in (
            ((80, 480, 832), "frames is 80"),
            ((81, 481, 832), "height is 481"),
            ((81, 480, 8), "width"),
            ((-3, 480, 832), "frames is -3"),
        ):
            with pytest.raises(PlanError, match=match):
                grid_of(model, source, pixels)


@pytest.mark.parametrize(
    ("changes", "vae", "side"),
    [
        ({}, None, 16),
        ({"in_channels": 48, "out_channels": 48}, None, 32),  # Wan2.2-TI2V
        ({"in_channels": 48, "out_channels": 48}, "{}", 32),
        ({}, '{"scale_factor_temporal": 4, "scale_factor_spatial": 16}', 32),
        ({"in_channels": 48}, '{"scale_factor_temporal": 4, "scale_factor_spatial": 8}', 16),
        ({}, "[]", 16),
    ],
)
def test_pixels_of_a_latent_are_those_of_the_vae_beside_it(folder, tmp_path, changes, vae, side):
    place = folder("wan", **changes)
    if vae is not None:
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae" / "config.json").write_text(vae)
    source = find(str(place))
    with fake():
        assert grid_of(build(source, torch.bfloat16), source, (9, 64, 96)) == (3, 64 // side, 96 // side)


def test_cosmos_1_has_a_vae_of_its_own(folder, monkeypatch):
    for changes, frames in (({}, 17), ({"extra_pos_embed_type": None}, 9)):
        source = find(str(folder("cosmos", **changes)))
        with fake():
            assert grid_of(build(source, torch.bfloat16), source, (frames, 64, 96)) == (3, 4, 6)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = Settings(model=str(folder("cosmos", concat_padding_mask=True)), grid=GRID, builder=fs.VSA(top_k=2))
    with pytest.raises(PlanError, match=r"has concat_padding_mask, for which diffusers needs torchvision: pip install"):
        measure(settings)


@pytest.mark.parametrize("name", ["ltx2", "motif"])
def test_what_does_not_run_sequence_parallel_is_not_planned_so(folder, name):
    settings = Settings(model=str(folder(name)), grid=GRID, builder=fs.VSA(top_k=2), gpus=2, ulysses=2)
    with pytest.raises(PlanError, match=r"ulysses: .* is not known to run sequence parallel: leave it at 1"):
        measure(settings)


def test_each_token_of_a_ti2v_has_a_time(folder):
    """As its pipeline calls it; without, what blocks compute of the time is not counted token by token."""
    how = {"grid": GRID, "builder": fs.VSA(top_k=2), "training": False}
    for channels, shape in ((4, (2,)), (48, (2, 256))):
        model = folder("wan", in_channels=channels, out_channels=channels)
        source = find(str(model))
        with fake():
            assert example(build(source, torch.bfloat16), GRID, 2, torch.bfloat16)["timestep"].shape == shape
        assert len(measure(Settings(model=str(model), **how)).sparse.sparse) == 2


def test_a_grid_that_the_model_has_no_positions_for(folder):
    settings = Settings(model=str(folder("wan", rope_max_seq_len=8)), grid=(16, 8, 8), builder=fs.VSA(top_k=2))
    with pytest.raises(PlanError, match=r"WanTransformer3DModel: cannot run on grid \(16, 8, 8\) \(.*: give one that"):
        measure(settings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gpus": 3, "ulysses": 2}, "does not divide 3 GPUs: give gpus a multiple of 2, or ulysses a divisor of them"),
        ({"gpus": 6, "ulysses": 6, "fsdp": 4}, "fsdp is 4, which does not divide 6 GPUs: give gpus a multiple of 12"),
        ({"batch": 0}, "batch is 0"),
        ({"grid": None}, "either the grid"),
        ({"pixels": (5, 16, 16)}, "either the grid"),
        ({"gpu": "b200"}, "gpu is 'b200'"),
        ({"dtype": "fp4"}, "dtype is 'fp4'"),
        ({"builder": fs.BSA(), "gates": True}, "no coarse output"),
    ],
)
def test_settings_that_make_no_sense(change, match):
    with pytest.raises(PlanError, match=match):
        Settings(**{"model": "x", "grid": GRID, "builder": fs.VSA(top_k=1), **change})


def test_more_gpus_than_heads(long):
    with pytest.raises(PlanError, match="ulysses is 8, but the model has 4 heads"):
        evaluate(dataclasses.replace(long[0], gpus=8, ulysses=8), long[1])
