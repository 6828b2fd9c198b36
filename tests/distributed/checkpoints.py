"""Checkpoints of `torch.distributed.checkpoint` of a wrapped model that several ranks train; runs on the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distributed.training import STEPS, ddp, video, wrapped


def resumes(kind: str, compile: bool | str, folder: str) -> None:
    """Saved by `torch.distributed.checkpoint`, loaded by a model that began elsewhere, trained on: the same losses, to the bit.

    The whole state dict, gathered, has the names of the model as it stands in one process.
    """
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = wrapped(compile)
        if kind == "ddp":
            model = ddp(model)
        else:
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(STEPS):
            loss = model(**video(rank))[0].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    model, optimizer = make()
    train_on(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    wanted = train_on(model, optimizer)

    other, optimizer = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    weights, moments = get_state_dict(other, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(other, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert train_on(other, optimizer) == wanted
    assert wanted[-1] < wanted[0], "nothing was trained"

    whole = get_model_state_dict(other, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        alone = wrapped(False)
        alone.load_state_dict(whole)
        assert any("to_gate" in name for name in whole)
