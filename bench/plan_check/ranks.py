"""Bytes that two real processes exchange in a training step: Ulysses, FSDP2, DDP.

Counted where torch dispatches a collective, and of DDP, whose reducer dispatches none, in its communication hook.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flexsparse as fs
from bench.plan_check.cases import Case, inputs_of, model_of, step_of
from flexsparse.planning import evaluate, measure
from flexsparse.wrap import repeated_blocks

RANKS = 2
COLLECTIVES = {
    "ulysses": {"all_to_all": "ulysses", "all_gather": None, "reduce_scatter": None},
    "fsdp": {"all_gather": "gather", "reduce_scatter": "scatter"},
    "ddp": {"all_reduce": "replicas"},
}
"""By what is spread: collectives, and the plan's part that says their bytes; None where it leaves them out."""


def planned_bytes(kind: str, case: Case, folder: Path) -> dict[str, float]:
    """What a plan says of two ranks."""
    spread = {"gpus": RANKS} | ({} if kind == "ddp" else {kind: RANKS})
    settings = case.settings(folder, **spread)
    return dict(vars(evaluate(settings, measure(settings)).communication))


class Received(TorchDispatchMode):
    """Bytes that this rank receives from others, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count(name, args, out)
        return out

    def count(self, name: str, args: Any, out: Any) -> None:
        """One collective."""
        ranks, me = dist.get_world_size(), dist.get_rank()
        first = next(x for x in tree_leaves(args) if isinstance(x, Tensor))
        if "all_to_all" in name or "alltoall" in name:  # rows received from each rank, this one among them
            received = list(args[1]) if name == "all_to_all_single" else list(args[3])
            row = first[0].nbytes if len(first) else 0
            self.bytes["all_to_all"] += (sum(received) - received[me]) * row
        elif "reduce_scatter" in name:
            source = args[1] if name.startswith("_reduce") else first
            self.bytes["reduce_scatter"] += source.nbytes * (ranks - 1) // ranks
        elif "allgather" in name or "all_gather" in name:
            source = args[1] if name.startswith("_allgather") else first
            self.bytes["all_gather"] += source.nbytes * (ranks - 1)
        elif "allreduce" in name or "all_reduce" in name:
            self.bytes["all_reduce"] += 2 * first.nbytes * (ranks - 1) // ranks


def counted(kind: str, case: Case) -> dict[str, int]:
    """Bytes by collective of one training step on this rank, which has a process group.

    Args:
        kind: one of `COLLECTIVES`.
        case: the model and its step.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = run = model_of(case, Path(folder))
    inputs, received = inputs_of(case, model), Received()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "ulysses":
        fs.distributed.ulysses(model, mesh)
    elif kind == "fsdp":
        for block in repeated_blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        run = nn.parallel.DistributedDataParallel(model)
        run.register_comm_hook(received, _reduce)
    step = step_of(case, run, inputs)
    if kind == "ddp":
        step()
    else:
        with received:
            step()
    return dict(received.bytes)


def _reduce(received, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """DDP's hook: averages, as its default does, and counts."""
    ranks, buffer = dist.get_world_size(), bucket.buffer()
    received.bytes["all_reduce"] += 2 * buffer.nbytes * (ranks - 1) // ranks
    future = dist.all_reduce(buffer.div_(ranks), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _rank(rank: int, folder: str, cases: list[tuple[str, Case]]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "rendezvous"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=300))
    found = [counted(kind, case) for kind, case in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(cases: list[tuple[str, Case]]) -> list[list[dict[str, int]]]:
    """What `counted` says of each case on each rank, in two processes of their own: ``[rank][case]``."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, (folder, cases), nprocs=RANKS, start_method="spawn")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(RANKS)]
