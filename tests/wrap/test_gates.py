"""Gates as files: a round trip, FastVideo's names, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexsparse as fs

from .conftest import Stranger


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
    from flexsparse.gates import add_gates

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
