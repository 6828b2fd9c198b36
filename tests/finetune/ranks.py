"""What the ranks of a gloo group run: a whole fine-tuning with DDP, or with accelerate's FSDP2.

accelerate offers FSDP2 on accelerators only; on CPU its state is told that it has it, and all that follows is its own code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from finetune.tiny import stop_after, tuned
from flexsparse.finetune import run, state
from flexsparse.finetune.launch import make_accelerator
from flexsparse.finetune.settings import Options, Settings
from flexsparse.training.errors import RunError


def _with_fsdp(settings: Settings, options: Options) -> Any:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = make_accelerator(settings, options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["WanTransformerBlock"],
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    if settings.bf16:
        plugin.set_mixed_precision("bf16")
    accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def full_disk_of_one(folder: Path) -> str:
    """What this rank raises where the disk of the second one is full."""
    names = state.save_checkpoint.__globals__
    real = names["write_atomically"]

    def full(path: Path, data: bytes) -> None:
        if path.name == state.part(1):
            raise OSError(28, "No space left on device")
        real(path, data)

    names["write_atomically"] = full
    try:
        on_ranks(folder, True, -1, {"batch": 2})
    except RunError as error:
        return str(error)
    finally:
        names["write_atomically"] = real
    return "nothing"


def on_ranks(folder: Path, fsdp: bool, until: int, others: dict[str, Any]) -> tuple[list[float], list[Any], Any]:
    """Trains on this rank.

    Args:
        folder: of the run.
        fsdp: whether accelerate shards the model.
        until: stop after so many steps, as if killed; -1: not at all.
        others: as `tuned`.

    Returns:
        Training losses, held-out losses, skipped clips.
    """
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    before, run.make_accelerator = run.make_accelerator, _with_fsdp if fsdp else make_accelerator
    try:
        result = tuned(folder, stop_after(until), **others)
    except InterruptedError:
        return [], [], None
    finally:
        run.make_accelerator = before
    return result.curves.loss, [point["losses"] for point in result.curves.held_out], result.bad
