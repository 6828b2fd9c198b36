"""DDP and FSDP2: a wrapped model trains as in one process, compiled or not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distributed import checkpoints, training
from distributed.processes import Processes

pytest.importorskip("diffusers")

QUICK = [
    ("ddp", False),
    ("ddp", "regional"),
    ("fsdp", False),
    ("fsdp", "regional"),
    ("fsdp root", False),
    ("fsdp first", False),
    ("fsdp ulysses", False),
    ("fsdp ulysses", "regional"),
]
LONG = [("ddp", True), ("fsdp root", True), ("fsdp first", "regional")]


@pytest.mark.parametrize("kind, compile", QUICK)
def test_two_ranks(two: Processes, kind: str, compile: bool | str) -> None:
    two.run(training.same_training, kind, compile)


@pytest.mark.slow
@pytest.mark.parametrize("kind, compile", LONG)
def test_two_ranks_slow(two: Processes, kind: str, compile: bool | str) -> None:
    two.run(training.same_training, kind, compile, limit=300)


@pytest.mark.slow
@pytest.mark.parametrize("kind, compile", [("ddp", False), ("ddp", "regional"), ("fsdp", False), ("fsdp", "regional")])
def test_four_ranks(four: Processes, kind: str, compile: bool | str) -> None:
    four.run(training.same_training, kind, compile, limit=300)


@pytest.mark.parametrize("compile", [False, "regional"])
def test_checkpointing(two: Processes, compile: bool | str) -> None:
    two.run(training.same_training, "fsdp", compile, True)


def test_a_checkpoint_of_all_ranks(two: Processes, tmp_path: Path) -> None:
    two.run(checkpoints.resumes, "fsdp", False, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "compile"), [("fsdp", "regional"), ("ddp", False), ("ddp", "regional"), ("ddp", True)]
)
def test_a_checkpoint_in_other_ways(two: Processes, kind: str, compile: bool | str, tmp_path: Path) -> None:
    two.run(checkpoints.resumes, kind, compile, str(tmp_path), limit=300)


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("gates_after_sharding", "wrap it before fully_shard"),
        ("gates_after_fsdp1", "wrap it before fully_shard (or FullyShardedDataParallel)"),
        (
            "gates_after_ddp",
            "to_gate_compress is no parameter of the DistributedDataParallel .*: wrap the model before",
        ),
    ],
)
def test_gates_that_ranks_would_train_alone(two: Processes, what: str, remedy: str) -> None:
    for message in two.run(training.said, what):
        assert re.search(remedy.replace("(", r"\(").replace(")", r"\)"), message)


def test_a_backend_inside_ddp_says_what_to_set(two: Processes) -> None:
    for message in two.run(training.said, "backend_inside_ddp"):
        assert "set torch._dynamo.config.optimize_ddp = False" in message, message


def test_gate_files_of_sharded_gates(two: Processes, tmp_path: Path) -> None:
    two.run(training.same_gate_files, str(tmp_path / "gates.safetensors"))
    for message in two.run(training.said, "gates_saved_by_fsdp1", str(tmp_path / "others.safetensors")):
        assert re.match(
            r"ValueError: the gate blocks\.0\.attn1\.to_gate_compress is part of a flat tensor .*summon", message
        )


@pytest.mark.slow
def test_blocks_of_a_whole_graph(two: Processes) -> None:
    """FSDP2's hooks on blocks break the graph of a model that is compiled as a whole; it says what to do."""
    for message in two.run(training.said, "same_training", "fsdp", True, limit=300):
        assert "compile='regional'" in message
