"""Processes that run a test's function as the ranks of a gloo group.

They start once and serve many tests. Rendezvous is a file, so no port is chosen; every call has a time limit, and what each
rank raised is shown.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


class RankError(AssertionError):
    """What the ranks raised, or which of them did not answer in time."""


def _serve(rank: int, size: int, folder: str, connection: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "rendezvous"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    connection.send(("ok", None))
    while True:
        task = connection.recv()
        if task is None:
            break
        function, args = task
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            answer = ("ok", function(*args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        connection.send(answer)
    dist.destroy_process_group()


class Processes:
    """Ranks of one group.

    Args:
        size: how many.
        start_limit: seconds that they may take to start.
    """

    def __init__(self, size: int, start_limit: float = 240.0) -> None:
        self.size, self.start_limit = size, start_limit
        self.workers: list[Any] = []
        self.connections: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Any]:
        """What ``function(*args)`` returns on each rank; a function of a module, as processes import it.

        Raises:
            RankError: a rank raised, died, or did not answer within ``limit`` seconds.
        """
        if not self.workers:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        return self._collect(limit)

    def stop(self) -> None:
        """End the processes."""
        for connection in self.connections:
            try:
                connection.send(None)
            except OSError:
                continue  # died already
        for worker in self.workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self.workers, self.connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        # children inherit the environment: one thread each, and gloo on the loopback interface
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")}
        os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        try:
            for rank in range(self.size):
                mine, theirs = context.Pipe()
                worker = context.Process(target=_serve, args=(rank, self.size, self.folder.name, theirs), daemon=True)
                worker.start()
                theirs.close()  # so that a dead worker is an end of file here
                self.workers.append(worker)
                self.connections.append(mine)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._collect(self.start_limit)

    def _collect(self, limit: float) -> list[Any]:
        end = time.monotonic() + limit
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.size and time.monotonic() < end:
            if any(kind == "error" for kind, _ in answers.values()):
                end = min(end, time.monotonic() + 5)  # the others may wait for it forever, or be about to say more
            for rank, connection in enumerate(self.connections):
                if rank in answers or not connection.poll(0.02):
                    continue
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    self.workers[rank].join(1)
                    answers[rank] = ("error", f"the process ended with exit code {self.workers[rank].exitcode}")
        for rank in range(self.size):
            answers.setdefault(rank, ("error", "no answer in time"))
        if any(kind == "error" for kind, _ in answers.values()):
            for worker in self.workers:
                worker.kill()
                worker.join()
            self.workers, self.connections = [], []
            said = [f"--- rank {rank}\n{answers[rank][1]}" for rank in range(self.size) if answers[rank][0] == "error"]
            raise RankError("\n".join(said))
        return [answers[rank][1] for rank in range(self.size)]
