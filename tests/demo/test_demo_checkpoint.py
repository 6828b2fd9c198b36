"""Checkpoints: exact, atomic, and never executed."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexsparse.training import checkpoint as module
from flexsparse.training import files
from flexsparse.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flexsparse.training.errors import RunError


def _checkpoint(step: int = 1) -> Checkpoint:
    tensors = {"a.weight": torch.randn(5, 3), "a.step": torch.tensor(float(step)), "empty": torch.empty(0)}
    return Checkpoint(tensors=tensors, state={"step": step, "curves": {"loss": [0.1, 1 / 3]}})


def test_round_trip_is_exact(tmp_path):
    path, saved = tmp_path / "c.safetensors", _checkpoint()
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert loaded.state == saved.state
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], value) for name, value in saved.tensors.items())
    assert os.listdir(tmp_path) == [path.name]


def _disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, function):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, _checkpoint(1))
    with monkeypatch.context() as patched:
        patched.setattr(files.os, function, _disk_full)
        with pytest.raises(RunError, match=r"No space left.*previous checkpoint is intact.*--resume"):
            save_checkpoint(path, _checkpoint(2))
    assert load_checkpoint(path).state["step"] == 1
    assert os.listdir(tmp_path) == [path.name], "the partial file is gone"


def test_full_disk_while_writing(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, _checkpoint(1))
    real = os.fdopen

    def open_full(handle, mode):
        file = real(handle, mode, buffering=0)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[:100])
                _disk_full()

        return Full()

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fdopen", open_full)
        with pytest.raises(RunError, match="No space left"):
            save_checkpoint(path, _checkpoint(2))
    assert load_checkpoint(path).state["step"] == 1
    assert os.listdir(tmp_path) == [path.name]


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    path = tmp_path / "c.safetensors"
    (tmp_path / ".c.safetensors.123.partial").write_bytes(b"half")
    save_checkpoint(path, _checkpoint())
    assert os.listdir(tmp_path) == [path.name]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("hello" * 100)


def _foreign(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Bomb()))


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _text, _foreign, _pickle])
def test_corrupt_checkpoint_is_one_clear_error(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, _checkpoint())
    damage(path)
    with pytest.raises(RunError, match=r"checkpoint '.*c\.safetensors' is corrupt \(.*--force") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


def test_nothing_in_the_demo_unpickles():
    source = "".join(path.read_text() for path in Path(module.__file__).parent.glob("*.py"))
    assert "torch.load" not in source and "import pickle" not in source


def test_optimizer_round_trip():
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = make()
    step(layer, optimizer)
    tensors = {name: value.clone() for name, value in module.optimizer_tensors(optimizer, ["weight", "bias"]).items()}
    other, other_optimizer = make()
    other.load_state_dict(layer.state_dict())
    module.load_optimizer_tensors(other_optimizer, ["weight", "bias"], tensors)
    step(layer, optimizer)
    step(other, other_optimizer)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
