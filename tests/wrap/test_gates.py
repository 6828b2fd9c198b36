"""Gates as files: a round trip, FastVideo's names, and files that do not fit."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import flexsparse as fs
from flexsparse.gates import add_gates, gate_modules

from .conftest import WAN, Block, Stranger


@pytest.fixture
def gated(stranger: Stranger) -> Stranger:
    fs.wrap(stranger, fs.VSA(top_k=2), gates=True, compile=False)
    for parameter in fs.gate_parameters(stranger):
        torch.nn.init.normal_(parameter)
    return stranger


def test_round_trip(gated: Stranger, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    before = [p.detach().clone() for p in fs.gate_parameters(gated)]
    fs.save_gates(gated, path)
    for parameter in fs.gate_parameters(gated):
        torch.nn.init.zeros_(parameter)
    assert fs.load_gates(gated, path) == ["blocks.0.to_gate_compress", "blocks.1.to_gate_compress"]
    assert all(torch.equal(a, b) for a, b in zip(before, fs.gate_parameters(gated)))


def test_fastvideos_names(tmp_path: Path) -> None:
    """FastVideo keeps the gate beside the attention module, in the whole model's checkpoint."""
    block = torch.nn.Module()
    block.attn1 = torch.nn.Module()
    block.attn1.to_q, block.attn1.to_k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    assert add_gates(model, True) == ["blocks.0.attn1"]
    weight, bias = torch.randn(8, 8), torch.randn(8)
    path = tmp_path / "fastvideo.safetensors"
    keys = {
        "blocks.0.to_gate_compress.weight": weight,
        "blocks.0.to_gate_compress.bias": bias,
        "blocks.0.ffn": bias + 1,
    }
    save_file(keys, path)
    fs.load_gates(model, path)
    assert torch.equal(block.attn1.to_gate_compress.weight, weight)
    assert torch.equal(block.attn1.to_gate_compress.bias, bias)


def test_a_folder_of_save_pretrained_and_fastvideos_names_there_and_back(tmp_path: Path) -> None:
    """diffusers saves gates with the model and drops them on loading, which wrapping says."""
    from diffusers import WanTransformer3DModel

    def say(model: torch.nn.Module) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fs.wrap(model, fs.VSA(top_k=2), gates=True, compile=False)
        return [str(w.message) for w in caught if "gates" in str(w.message)]

    model = WanTransformer3DModel(**WAN)
    assert say(model) == []
    for parameter in fs.gate_parameters(model):
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "model")
    (warning,) = say(again)
    assert "4 tensors of gates" in warning and f"load_gates(model, {str(tmp_path / 'model')!r})" in warning
    assert not any(p.any() for p in fs.gate_parameters(again))
    assert fs.load_gates(again, tmp_path / "model") == [f"blocks.{i}.attn1.to_gate_compress" for i in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(fs.gate_parameters(model), fs.gate_parameters(again), strict=True))

    fs.save_gates(model, tmp_path / "fastvideo.safetensors", names="fastvideo")
    assert sorted(load_file(tmp_path / "fastvideo.safetensors")) == [
        f"blocks.{i}.to_gate_compress.{kind}" for i in (0, 1) for kind in ("bias", "weight")
    ]
    for parameter in fs.gate_parameters(again):
        torch.nn.init.zeros_(parameter)
    fs.load_gates(again, tmp_path / "fastvideo.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fs.gate_parameters(model), fs.gate_parameters(again), strict=True))


def test_the_file_says_what_the_gates_were_trained_with(gated: Stranger, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    fs.save_gates(gated, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "flexsparse-gates" and metadata["flexsparse"] == fs.__version__
    assert json.loads(metadata["builder"]) == {"*": repr(fs.VSA(top_k=2))} and json.loads(metadata["tile"]) == [4, 4, 4]
    other = fs.wrap(fs.unwrap(gated), fs.VSA(top_k=2), tile=(2, 4, 4), gates=True, compile=False)
    with pytest.warns(
        UserWarning, match=r"trained with tile=\[4, 4, 4\], and the model is wrapped with tile=\[2, 4, 4\]"
    ):
        fs.load_gates(other, path)
    with pytest.raises(ValueError, match="names is 'theirs'"):
        fs.save_gates(other, path, names="theirs")  # type: ignore[arg-type]


class Two(nn.Module):
    """A model with a second one in it, under a name that is sorted before or after its own blocks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.blocks, self.name = Stranger().blocks, name
        self.add_module(name, Stranger())


@pytest.mark.parametrize("name", ["aux", "draft"])
def test_a_name_in_a_file_is_that_of_one_module(name: str, tmp_path: Path) -> None:
    """Names were compared by their ends: a module's gates were loaded into another one, and a file did not fit its model."""
    how = {"grid": (4, 8, 8), "compile": False}
    path = tmp_path / "gates.safetensors"
    both = fs.wrap(Two(name), fs.VSA(top_k=2), gates=True, **how)
    for parameter in fs.gate_parameters(both):
        nn.init.normal_(parameter)
    expected = [p.detach().clone() for p in fs.gate_parameters(both)]
    fs.save_gates(both, path)
    for parameter in fs.gate_parameters(both):
        nn.init.zeros_(parameter)
    assert len(fs.load_gates(both, path)) == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, fs.gate_parameters(both), strict=True))
    inner = fs.wrap(Two(name), fs.VSA(top_k=2), gates=[f"{name}.blocks.[01]"], dense_layers=["blocks.*"], **how)
    fs.save_gates(inner, path)
    outer = fs.wrap(Two(name), fs.VSA(top_k=2), gates=["blocks.?"], dense_layers=[name], **how)
    with pytest.raises(ValueError, match=rf"unknown to the model \['{name}\.blocks\.0"):
        fs.load_gates(outer, path)


@pytest.mark.parametrize("prefix", ["module.", "model.diffusion_model."])
def test_all_names_in_a_file_may_have_one_prefix(prefix: str, stranger: Stranger, tmp_path: Path) -> None:
    fs.wrap(stranger, fs.VSA(top_k=2), gates=True, compile=False)
    fs.save_gates(stranger, tmp_path / "gates.safetensors")
    tensors = load_file(tmp_path / "gates.safetensors")
    changed = {f"{prefix}{name}": x + 1 for name, x in tensors.items()}
    save_file(changed, tmp_path / "gates.safetensors")
    assert len(fs.load_gates(stranger, tmp_path / "gates.safetensors")) == 2
    assert all(bool((parameter == 1).all()) for parameter in fs.gate_parameters(stranger))


@pytest.mark.parametrize("first", [True, False], ids=["before wrap", "after wrap"])
def test_names_of_gates_in_shells(first: bool, stranger: Stranger, tmp_path: Path) -> None:
    """torch's `checkpoint_wrapper` adds to names, and hands on attributes: a module had two gates, its file fitted no other."""
    plain = fs.wrap(copy.deepcopy(stranger), fs.VSA(top_k=2), gates=True, compile=False)

    def shells() -> None:
        apply_activation_checkpointing(
            stranger, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: type(module) is Block
        )

    if first:
        shells()
    rules = {"blocks.0": fs.VSA(top_k=3), "*": fs.VSA(top_k=2)}
    fs.wrap(stranger, rules, gates=["blocks.[01]"], compile=False)
    if not first:
        shells()
    for parameter in fs.gate_parameters(plain):
        nn.init.normal_(parameter)
    assert len(fs.gate_parameters(stranger)) == len(fs.gate_parameters(plain)) == 4
    for one, other in ((plain, stranger), (stranger, plain)):
        fs.save_gates(one, tmp_path / "gates.safetensors")
        assert fs.load_gates(other, tmp_path / "gates.safetensors") == [f"blocks.{i}.to_gate_compress" for i in (0, 1)]
    x = torch.randn(1, 3, 4, 16, 16)
    stranger(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in fs.gate_parameters(stranger))
    densities = [call.density for call in fs.report(stranger).calls]
    assert len(densities) == 2 and densities[0] > densities[1], "builders go by names without the shells"


def test_fine_gates_are_in_the_file(stranger: Stranger, tmp_path: Path) -> None:
    fs.wrap(stranger, fs.VSA(top_k=2), gates=True, fine_gates=True, compile=False)
    assert len(fs.gate_parameters(stranger)) == 8
    for parameter in fs.gate_parameters(stranger):
        torch.nn.init.normal_(parameter)
    before = [p.detach().clone() for p in fs.gate_parameters(stranger)]
    fs.save_gates(stranger, tmp_path / "gates.safetensors")
    for parameter in fs.gate_parameters(stranger):
        torch.nn.init.zeros_(parameter)
    loaded = fs.load_gates(stranger, tmp_path / "gates.safetensors")
    assert loaded == [f"blocks.{i}.to_gate_{kind}" for i in (0, 1) for kind in ("compress", "fine")]
    assert all(torch.equal(a, b) for a, b in zip(before, fs.gate_parameters(stranger), strict=True))
    assert not any("to_gate" in name for name in fs.unwrap(stranger).state_dict())
    coarse = fs.wrap(Stranger(), fs.VSA(top_k=2), gates=True, compile=False)
    with pytest.raises(ValueError, match=r"to_gate_fine.*wrap with gates=True and the training's fine_gates first"):
        fs.load_gates(coarse, tmp_path / "gates.safetensors")


def test_two_gates_of_a_block_have_no_fastvideo_name(tmp_path: Path) -> None:
    block = torch.nn.Module()
    for name in ("attn1", "attn2"):
        module = torch.nn.Module()
        module.to_q, module.to_k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        block.add_module(name, module)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    add_gates(model, True)
    with pytest.raises(ValueError, match=r"blocks.0 has two gates: save them with names='flexsparse'"):
        fs.save_gates(model, tmp_path / "gates.safetensors", names="fastvideo")
    save_file({"blocks.0.to_gate_compress.weight": torch.zeros(8, 8)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"to_gate_compress.weight in .* fits two gates"):
        fs.load_gates(model, tmp_path / "f.safetensors", strict=False)


def test_files_that_are_none(gated: Stranger, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    path.write_text("hello")
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match=r"gates\.safetensors is no safetensors file \(.*\): give one"):
            fs.load_gates(gated, given)
    with pytest.raises(FileNotFoundError, match=r"no/gates\.safetensors, but there is no folder .*no: make it first"):
        fs.save_gates(gated, tmp_path / "no" / "gates.safetensors")


def test_a_pipeline_of_two_transformers_is_not_mixed_up(gated: Stranger, tmp_path: Path) -> None:
    """Wan 2.2 has two; the gates of the last one read would do for both."""
    for number, name in ((1.0, "transformer"), (2.0, "transformer_2")):
        (tmp_path / name).mkdir()
        for parameter in fs.gate_parameters(gated):
            torch.nn.init.constant_(parameter, number)
        fs.save_gates(gated, tmp_path / name / "model.safetensors")
    said = r"where .*former/model.* and .*transformer_2/model.* have different values for blocks\.0.*give one of these files"
    with pytest.raises(ValueError, match=said):
        fs.load_gates(gated, tmp_path)
    fs.load_gates(gated, tmp_path / "transformer")
    assert all(bool((parameter == 1).all()) for parameter in fs.gate_parameters(gated))
    (tmp_path / "transformer_2" / "model.safetensors").unlink()
    fs.save_gates(gated, tmp_path / "transformer_2" / "model.safetensors")  # the same values twice are no question
    fs.load_gates(gated, tmp_path)


def test_a_file_that_cannot_be_written_keeps_what_it_held(
    gated: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gates.safetensors"
    fs.save_gates(gated, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    torch.nn.init.ones_(next(iter(fs.gate_parameters(gated))))
    with pytest.raises(OSError, match="No space left"):
        fs.save_gates(gated, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_gate_of_the_models_own_is_neither_used_nor_replaced_nor_taken_away(stranger: Stranger) -> None:
    own = torch.nn.Linear(32, 32)
    stranger.blocks[0].to_gate_compress = own  # of a port of another project
    x = torch.randn(1, 3, 4, 16, 16)
    plain = copy.deepcopy(stranger)
    with pytest.raises(ValueError, match=r"blocks\.0 has a to_gate_compress of its own.*delete it"):
        fs.wrap(stranger, fs.VSA(top_k=2), gates=True, compile=False)
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    out = stranger(x)
    del plain.blocks[0].to_gate_compress
    assert torch.equal(fs.wrap(plain, fs.VSA(top_k=2), compile=False)(x), out)
    assert fs.unwrap(stranger).blocks[0].to_gate_compress is own


def test_files_that_do_not_fit_change_nothing(gated: Stranger, tmp_path: Path) -> None:
    before = [p.detach().clone() for p in fs.gate_parameters(gated)]
    with pytest.raises(FileNotFoundError, match=r"there is no such file"):
        fs.load_gates(gated, tmp_path / "missing.safetensors")
    path = tmp_path / "gates.safetensors"
    fs.save_gates(gated, path)
    tensors = load_file(path)
    half = {key: value + 1 for key, value in tensors.items() if key.startswith("blocks.0")}
    save_file(half, path)
    with pytest.raises(ValueError, match=r"missing in the file \['blocks.1.*strict=False"):
        fs.load_gates(gated, path)
    save_file({key: value[:1].contiguous() for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"is \(1, 32\).*the model's gate \(32, 32\)"):
        fs.load_gates(gated, path)
    assert all(torch.equal(a, b) for a, b in zip(before, fs.gate_parameters(gated)))
    save_file(half, path)
    assert fs.load_gates(gated, path, strict=False) == ["blocks.0.to_gate_compress"]
    with pytest.raises(ValueError, match="has no gates: wrap it with gates=True"):
        fs.save_gates(fs.unwrap(gated), path)


def test_gates_that_an_adapter_trains_are_the_ones_that_are_saved(gated: Stranger, tmp_path: Path) -> None:
    """peft leaves the gate frozen and trains a copy; an optimizer of `gate_parameters` trained nothing."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["proj"], modules_to_save=["to_gate_compress"])
    adapted = peft.get_peft_model(gated, config)
    trained = {id(p) for p in adapted.parameters() if p.requires_grad}
    gates = fs.gate_parameters(adapted)
    assert len(gates) == 4 and all(id(p) in trained for p in gates)
    with torch.no_grad():
        for p in gates:
            p.fill_(0.5)
        video = torch.randn(1, 3, 4, 16, 16)
        on = adapted(video)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(video), on)
    fs.save_gates(gated, tmp_path / "gates.safetensors")
    plain = fs.wrap(copy.deepcopy(fs.unwrap(gated)), fs.VSA(top_k=2), gates=True, compile=False)
    fs.load_gates(plain, tmp_path / "gates.safetensors")
    assert all((p == 0.5).all() for p in fs.gate_parameters(plain))


def test_tied_gates_are_saved_by_each_name(gated: Stranger, tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory, with a remedy that is not for gates."""
    one, other = (gated.get_submodule(f"blocks.{i}.to_gate_compress") for i in range(2))
    other.weight = one.weight
    nn.init.normal_(one.weight)
    fs.save_gates(gated, tmp_path / "gates.safetensors")
    saved = load_file(tmp_path / "gates.safetensors")
    assert all(torch.equal(saved[f"blocks.{i}.to_gate_compress.weight"], one.weight) for i in range(2))


def test_a_parametrised_gate_is_saved_as_it_computes(gated: Stranger, tmp_path: Path) -> None:
    """Else the file has names that no other model knows."""
    gates = [gate for *_, gate in gate_modules(gated)]
    whole = [gate.weight.detach().clone() for gate in gates]
    for gate in gates:
        torch.nn.utils.parametrizations.weight_norm(gate)
    path = tmp_path / "gates.safetensors"
    fs.save_gates(gated, path)
    with pytest.raises(ValueError, match=r"the gate blocks\.0\.\w+ is parametrized.*remove_parametrizations"):
        fs.load_gates(gated, path)
    for gate in gates:
        torch.nn.utils.parametrize.remove_parametrizations(gate, "weight")
        nn.init.zeros_(gate.weight)
    fs.load_gates(gated, path)
    for gate, weight in zip(gates, whole, strict=True):
        torch.testing.assert_close(gate.weight, weight)


def test_an_adapter_over_a_gate_is_an_error(gated: Stranger, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(gated, peft.LoraConfig(r=2, target_modules="all-linear"))
    for call in (lambda: fs.gate_parameters(gated), lambda: fs.save_gates(gated, tmp_path / "gates.safetensors")):
        with pytest.raises(
            ValueError, match=r"to_gate_compress was replaced by Linear: merge .*target_modules.*modules_to_save"
        ):
            call()


def test_projections_stored_in_what_nothing_is_computed_in(stranger: Stranger) -> None:
    stranger.to(torch.float8_e4m3fn)  # all of it: elsewhere a weight says in which dtype
    with pytest.raises(ValueError, match=r"blocks\.0 stores its projections as torch\.float8_e4m3fn.*wrap before"):
        fs.wrap(stranger, fs.VSA(top_k=2), gates=True, compile=False)
    assert not any("flexsparse" in key for module in stranger.modules() for key in vars(module))
    assert not any("gate" in name for name in stranger.state_dict())


def test_gates_begin_at_zero_where_memory_is_made_later() -> None:
    """As trainers with FSDP do: they were random then, as any linear map."""
    with torch.device("meta"):
        model = Stranger()
    fs.wrap(model, fs.VSA(top_k=2), gates=True, fine_gates=True, compile=False).to_empty(device="cpu")
    for module in model.modules():
        getattr(module, "reset_parameters", lambda: None)()
    gates = dict(model.named_parameters())
    assert all((p == ("fine.bias" in name)).all() for name, p in gates.items() if "to_gate" in name)
    assert sum("to_gate" in name for name in gates) == 8
