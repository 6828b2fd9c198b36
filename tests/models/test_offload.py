"""Offloading: what `enable_model_cpu_offload` and its relatives put around a model, with the CPU as the device to run on."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import flexsparse as fs

from .zoo import ZOO, Entry

GRID = (4, 4, 4)


def wrapped(model: nn.Module, compile: bool | str) -> nn.Module:
    return fs.wrap(model, fs.VSA(top_k=2), tile=(2, 2, 2), compile=compile)


@torch.no_grad()
def run(entry: Entry, model: nn.Module) -> Tensor:
    return model(**entry.inputs(GRID, 1), return_dict=False)[0]


def expected(entry: Entry, model: nn.Module) -> Tensor:
    out = run(entry, model)
    assert [call.name for call in fs.report(model).calls if call.sparse] == list(entry.sparse)
    return out


@pytest.mark.parametrize("compile", [False, *(pytest.param(way, marks=pytest.mark.slow) for way in ("regional", True))])
def test_a_wrapped_model_is_offloaded(compile: bool | str, fresh_dynamo: None) -> None:
    """As `pipe.enable_model_cpu_offload()` does with each of its models."""
    entry = ZOO["wan"]
    model = wrapped(entry.model(), compile)
    out = expected(entry, model)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    for _ in range(2):
        assert torch.equal(run(entry, model), out)
        assert [call.name for call in fs.report(model).calls if call.sparse] == list(entry.sparse)
        hook.offload()


@pytest.mark.parametrize("compile", [False, pytest.param("regional", marks=pytest.mark.slow)])
def test_an_offloaded_model_is_wrapped(compile: bool | str, fresh_dynamo: None) -> None:
    entry = ZOO["wan"]
    out = expected(entry, wrapped(entry.model(), compile))
    model, _ = accelerate.cpu_offload_with_hook(entry.model(), execution_device="cpu")
    assert torch.equal(expected(entry, wrapped(model, compile)), out)


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan"])
def test_offloaded_layer_by_layer(name: str) -> None:
    """As `pipe.enable_sequential_cpu_offload()`: weights are on the meta device until their layer runs."""
    entry = ZOO[name]
    out = expected(entry, wrapped(entry.model(), False))
    model = accelerate.cpu_offload(entry.model(), execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(expected(entry, wrapped(model, False)), out)
    later = fs.wrap(entry.model(), fs.VSA(top_k=2), tile=(2, 2, 2), compile=False, gates=True)
    assert torch.equal(run(entry, accelerate.cpu_offload(later, execution_device="cpu")), out), (
        "gates are zero at first"
    )


def test_hooks_inside_of_a_graph_are_refused_before_anything_changes() -> None:
    entry = ZOO["wan"]
    model, _ = accelerate.cpu_offload_with_hook(entry.model(), execution_device="cpu")
    with pytest.raises(
        ValueError, match=r"the model has a hook that moves weights.*wrap before enable_model_cpu_offload"
    ):
        wrapped(model, True)
    layered = accelerate.cpu_offload(entry.model(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"blocks\.0\S* has a hook that moves weights"):
        wrapped(layered, "regional")
    grouped = entry.model()
    apply_group_offloading(grouped, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="has a hook that moves weights"):
        wrapped(grouped, True)
    with pytest.raises(ValueError, match="hooks load the model's weights layer by layer, and would not load theirs"):
        fs.wrap(layered, fs.VSA(top_k=2), tile=(2, 2, 2), compile=False, gates=True)
    assert not any("gate" in name for name, _ in layered.named_parameters())
    for refused in (model, layered):
        with pytest.raises(ValueError, match="is not wrapped"):
            fs.report(refused)
