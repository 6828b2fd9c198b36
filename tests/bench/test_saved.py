"""What is saved for backward: which tensors, how many bytes, and that counting without values counts the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flexsparse as fs
from bench import saved
from bench.saved import MODES, Case, count, saved_tensors
from flexsparse.masks import coarse

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

VSA = Case(name="VSA", builder=fs.VSA(top_k=5), grid=(3, 6, 10), tile=(1, 4, 4), H=2, D=16)
BSA = replace(VSA, name="BSA", builder=fs.BSA(keep_queries=0.5, kv_density=0.2), grid=(4, 8, 16), tile=(2, 4, 4))
WIDE = replace(VSA, D=128)  # of which what is not q, k, v, o or lse is as small a part as of a real call
H, S, P, N, D = 2, 180, 288, 18, 16  # tokens and padded tokens differ: no tensor of one passes for one of the other


def tensors(case: Case, mode: str) -> Counter[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what is saved, the layout's tables left out: token positions, and valid tokens of each tile."""
    found = [(tuple(x["shape"]), x["dtype"]) for x in count(case, mode)["tensors"]]
    return Counter(x for x in found if x not in [((n,), "int32") for n in (P, S, N)])


ROWS, LSE = ((1, H, S, D), "bfloat16"), ((1, H, P), "float32")  # nothing is brought to tile order
SELECTION = [((1, H, N, 2), "int32"), ((1, H, N), "int32")]
POOLED, COARSE_LSE = ((1, H, N, D), "float32"), ((1, H, N), "float32")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_queries_keys_values_the_output_and_the_selection(mode: str, dtype: torch.dtype) -> None:
    rows = [(ROWS[0], str(dtype).removeprefix("torch."))] * 4
    assert tensors(replace(VSA, dtype=dtype), mode) == Counter([*rows, LSE, *SELECTION])


def test_the_coarse_stage_of_a_gated_call() -> None:
    # pooled q, k, v, the coarse output (of tiles, not of tokens) and its log-sum-exp
    expected = Counter([ROWS] * 4 + [LSE, *SELECTION] + [POOLED] * 4 + [COARSE_LSE])
    gated = replace(VSA, gated=True)
    for mode in MODES:
        assert tensors(gated, mode) == expected
        assert count(gated, mode)["gate_bytes"] == S * H * D * 2
    # in float32 training no kernel adds it, and it is not saved for each token either
    rows = [(ROWS[0], "float32")] * 4
    assert tensors(replace(gated, dtype=torch.float32), "eager") == expected - Counter([ROWS] * 4) + Counter(rows)


def test_packed_queries() -> None:
    row = count(BSA, "compiled")
    kept = [x for x in row["tensors"] if x["dtype"] == "bfloat16"]
    assert Counter(x["shape"][2] for x in kept) == {256: 2, 512: 2}, "half of queries and output, all keys and values"
    assert row["bytes"] < row["needed_bytes"]


@pytest.mark.parametrize("gated", [False, True])
def test_counting_without_values_counts_what_is_saved_with_them(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(VSA, gated=gated)
    fake = count(case, "eager")
    monkeypatch.setattr(
        saved.triton._Interpreted,
        "apply",
        lambda q, k, v, *rest: torch.ops.flexsparse.tile_attention(q, k, v, *rest),
    )
    assert not coarse.is_tracing()
    real, gate = saved_tensors(case, saved.eager)
    floats = Counter((tuple(x.shape), x.untyped_storage().nbytes()) for x in real if x.is_floating_point())
    assert floats == Counter((tuple(x["shape"]), x["bytes"]) for x in fake["tensors"] if "float" in x["dtype"])
    assert len(gate) == gated


def test_bytes_and_the_target() -> None:
    row = count(WIDE, "eager")
    assert row["needed_bytes"] == H * P * (4 * WIDE.D * 2 + 4)
    assert row["bytes"] == sum(x["bytes"] for x in row["tensors"]) < row["needed_bytes"], "padding is saved"
    assert row["bytes"] >= H * S * 4 * WIDE.D * 2
    assert row["checked"] and not saved.over([row])
    assert saved.over([{**row, "checked": False}]) != []


def test_the_file_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"a\n{saved.BEGIN}\nold\n{saved.END}\nb\n")
    for name, value in (("PAGE", page), ("RESULTS", tmp_path / "saved.json"), ("CASES", (WIDE,))):
        monkeypatch.setattr(saved, name, value)
    arguments = ["--out", str(tmp_path / "saved.json")]
    assert saved.main(arguments) == 0
    result = json.loads((tmp_path / "saved.json").read_text())
    assert [row["mode"] for row in result["rows"]] == ["eager", "compiled"] and "torch" in result["header"]
    text = page.read_text()
    assert "VSA, compiled" in text and "old" not in text and text.startswith("a\n") and text.endswith("b\n")
    page.write_text(f"{saved.BEGIN}\n{saved.END}\n")
    assert saved.main(["--table", *arguments]) == 0 and saved.table(result) in page.read_text()
    monkeypatch.setattr(saved, "ALLOWED", 0.1)
    assert saved.main(["--out", str(tmp_path / "other.json")]) == 1
