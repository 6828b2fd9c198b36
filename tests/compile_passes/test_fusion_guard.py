"""What enters the key of Inductor's cache beside the graph."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._library.custom_ops import OPDEFS
from torch.fx import Graph

import flexsparse.compiler  # noqa: F401  (defines every op)
from flexsparse.compile_passes import fusion_guard
from flexsparse.compile_passes.fusion_guard import CacheTag, source_files, sources_hash


def test_every_op_is_defined_in_a_hashed_file() -> None:
    ops = [op for name, op in OPDEFS.items() if name.startswith("flexsparse::")]
    assert len(ops) > 10
    for op in ops:
        assert Path(inspect.getfile(op._init_fn)).resolve() in {path.resolve() for path in source_files()}


def test_a_changed_source_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "op.py"
    monkeypatch.setattr(fusion_guard, "source_files", lambda: [source])
    found = []
    for text in ("words = 1", "words = 2"):
        source.write_text(text)
        sources_hash.cache_clear()
        found.append(CacheTag().uuid())
    sources_hash.cache_clear()
    assert found[0] != found[1]


def test_a_users_pass_keeps_its_say() -> None:
    class Pass(CustomGraphPass):
        def __init__(self, name: str | None) -> None:
            self.name, self.ran = name, 0

        def __call__(self, graph: Graph) -> None:
            self.ran += 1

        def uuid(self) -> str | None:
            return self.name

    named, nameless = Pass("a"), Pass(None)
    tag = CacheTag(named)
    tag(torch.fx.symbolic_trace(torch.nn.Identity()).graph)
    assert named.ran == 1
    assert tag.uuid() not in (CacheTag().uuid(), CacheTag(Pass("b")).uuid())
    assert CacheTag(nameless).uuid() is None, "a pass without an identity forbids caching"
    assert CacheTag(lambda graph: None).uuid() is None
