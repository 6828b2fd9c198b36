"""More than one process: DDP and accelerate's FSDP2 give the curve of one process with the same batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed.processes import Processes
from safetensors.torch import load_file

from finetune.ranks import full_disk_of_one, on_ranks
from finetune.test_finetune_models import CASES, RUN
from finetune.tiny import tuned, write_video

TOLD = {"batch": 4, "ema_decay": 0.9, "export": "ema"}
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    """Two ranks."""
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Clips of which one is bad, and three are held out: not a multiple of the processes."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(6):
        write_video(folder / f"{index}.mp4", seed=index)
    (folder / "bad.mp4").write_text("no video")
    return str(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, tuned(folder, data=data, held_out=3, **TOLD)


def _same(found, alone, folder: Path, tolerance: float = 1e-5) -> None:
    wanted_folder, wanted = alone
    losses, held_out, bad = found[0]
    assert found[0] == found[1], "every rank knows the same"
    assert losses == pytest.approx(wanted.curves.loss, rel=tolerance)
    for mine, other in zip(held_out, wanted.curves.held_out, strict=True):
        assert mine == pytest.approx(other["losses"], rel=tolerance)
    assert list(bad) == ["bad.mp4"] == list(wanted.bad)
    mine, other = load_file(folder / WEIGHTS), load_file(wanted_folder / WEIGHTS)
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=1e-4, msg=name)
    assert (folder / "gates.safetensors").is_file()
    assert (folder / "transformer" / "config.json").read_text() == (
        wanted_folder / "transformer" / "config.json"
    ).read_text()


def test_two_processes_with_ddp(two, alone, data, tmp_path):
    told = {**TOLD, "data": data, "held_out": 3}
    found = two.run(on_ranks, tmp_path / "run", False, -1, told, limit=200.0)
    _same(found, alone, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints" / "step-00000006").iterdir()] == [
        "part-00000.safetensors"
    ]


def test_two_processes_with_fsdp_killed_and_resumed(two, alone, data, tmp_path):
    told = {**TOLD, "data": data, "held_out": 3}
    two.run(on_ranks, tmp_path / "run", True, 3, told, limit=200.0)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert sorted(p.name for p in checkpoint.iterdir()) == ["part-00000.safetensors", "part-00001.safetensors"]
    found = two.run(on_ranks, tmp_path / "run", True, -1, {**told, "resume": True}, limit=200.0)
    _same(found, alone, tmp_path / "run")
    two.run(on_ranks, tmp_path / "whole", True, -1, told, limit=200.0)
    mine, other = load_file(tmp_path / "run" / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS)
    assert all(torch.equal(mine[name], other[name]) for name in mine), "bitwise"


def test_all_end_where_one_cannot_write(two, tmp_path):
    first, second = two.run(full_disk_of_one, tmp_path / "run", limit=60.0)
    assert first == "another process cannot go on: see its message"
    assert "No space left on device" in second and "part-00001" in second


@pytest.mark.slow
def test_lora_in_bfloat16_with_fsdp(two, data, tmp_path):
    told = {**TOLD, "data": data, "lora_rank": 2, "bf16": True}
    losses, _, _ = two.run(on_ranks, tmp_path / "run", True, -1, told, limit=200.0)[0]
    wanted = tuned(tmp_path / "alone", **told)
    assert losses == pytest.approx(wanted.curves.loss, rel=2e-2)
    name = "pytorch_lora_weights.safetensors"
    mine, other = load_file(tmp_path / "run" / name), load_file(tmp_path / "alone" / name)
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}


@pytest.mark.slow
def test_a_model_with_parameters_that_nothing_depends_on(two, tmp_path):
    """HunyuanVideo-1.5's last block makes text that nothing reads; DDP would wait for its gradients."""
    model, clips = CASES["hunyuan15"].save(tmp_path / "model", tmp_path / "clips")
    told = {**RUN, "steps": 3, "batch": 2, "model": model, "data": clips}
    losses, _, _ = two.run(on_ranks, tmp_path / "run", False, -1, told, limit=200.0)[0]
    assert losses == pytest.approx(tuned(tmp_path / "alone", **told).curves.loss, rel=1e-5)


def test_the_configuration_in_the_documents_is_what_accelerate_makes_fsdp2_of(tmp_path, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    page = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
    (tmp_path / "fsdp2.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    args = ["--config_file", str(tmp_path / "fsdp2.yaml"), "-m", "flexsparse.cli", "finetune"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(args))
    assert args.use_fsdp and args.num_processes == 8
    with monkeypatch.context() as patched:
        for name, value in prepare_multi_gpu_env(args).items():
            if "FSDP" in name:
                patched.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.transformer_cls_names_to_wrap == ["WanTransformerBlock"]
