"""The table of choices: what is tried, what is chosen, what the forward does with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse.compile_passes.templates import forward as template
from flexsparse.compile_passes.templates import (
    hopper_backward,
    hopper_forward,
    hopper_pairs,
    hopper_specialized,
    pair_lists,
    tuned,
)
from flexsparse.compile_passes.templates.tuned import (
    OPS,
    Choice,
    arch_of,
    candidates,
    chosen,
    hopper_choice,
    using,
    write_table,
)

from .attention_cases import Case, build
from .gluon_simulator import simulate

BF16 = torch.bfloat16
SHAPE: tuple[Any, ...] = ("sm_90a", BF16, 128, 64, 64)
ROW = {"arch": "sm_90a", "dtype": "bf16", "D": 128, "query_rows": 64, "slots": 64}
HOPPER = Choice(kernel="hopper", rows=64, keys=64, num_warps=4, num_stages=1)
PAIRS = Choice(kernel="hopper_pairs", rows=64, keys=64, num_warps=4, num_stages=6)
SPECIALIZED = Choice(op="dkdv", kernel="hopper_specialized", rows=64, keys=64, num_warps=4, num_stages=2)
BACKWARD = {op: Choice(op=op, kernel="hopper", rows=64, keys=64, num_warps=4, num_stages=2) for op in ("dq", "dkdv")}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty table in the shipped one's place."""
    path = tmp_path / "tuned.json"
    path.write_text("[]")
    monkeypatch.setattr(tuned, "TABLE", path)
    yield path


def test_the_shipped_table_can_be_taken() -> None:
    results = Path(__file__).resolve().parents[2] / "bench" / "results"
    for (op, arch, dtype, D, query_rows, slots), choice in tuned._table(tuned.TABLE).items():
        known = {name: kind for kind, name in tuned.TYPES.items()}[dtype]
        configs = [x.config() for x in candidates(arch, known, D, query_rows, slots, op)]
        assert choice.config() in configs and choice.source and (results / choice.source).exists()


@pytest.mark.parametrize("arch", [None, "sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_candidates_begin_with_the_default_and_divide_their_tiles(
    arch: str | None, dtype: torch.dtype, D: int, table: Path
) -> None:
    for query_rows in (16, 64, 128, 256):
        for slots in (16, 64, 128, 256):
            found = candidates(arch, dtype, D, query_rows, slots)
            assert found[0] == chosen(arch, dtype, D, query_rows, slots) and found[0].kernel == "triton"
            assert len(set(found)) == len(found)
            assert all(query_rows % x.rows == 0 and slots % x.keys == 0 and x.source is None for x in found)
            assert all(Choice(**json.loads(json.dumps(x.config()))) == x for x in found)
            tuned_kernels = [x for x in found if x.kernel == "hopper"]
            wanted = arch == "sm_90a" and dtype != torch.float32 and D in (64, 128) and min(query_rows, slots) >= 64
            assert bool(tuned_kernels) == wanted
            assert all(hopper_forward.refuses(dtype, D, query_rows, slots, x.blocks) is None for x in tuned_kernels)
            by_pairs = [x for x in found if x.kernel == "hopper_pairs"]
            assert bool(by_pairs) == (wanted and query_rows in (64, 128) and slots % 64 == 0)
            assert all(hopper_pairs.refuses(dtype, D, query_rows, slots, x.blocks) is None for x in by_pairs)


@pytest.mark.parametrize("arch", [None, "sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("D", [32, 64, 128, 256])
@pytest.mark.parametrize("op", ["dq", "dkdv"])
def test_candidates_of_the_backward(arch: str | None, dtype: torch.dtype, D: int, op: str, table: Path) -> None:
    modules = {"hopper": hopper_backward, "hopper_specialized": hopper_specialized}
    refuses = {kernel: module.dq_refuses if op == "dq" else module.dkdv_refuses for kernel, module in modules.items()}
    for query_rows in (16, 64, 128, 256):
        for slots in (16, 64, 128, 256):
            plain, *rest = candidates(arch, dtype, D, query_rows, slots, op)
            assert plain == Choice(op=op, kernel="triton") == chosen(arch, dtype, D, query_rows, slots, op)
            wanted = arch == "sm_90a" and dtype != torch.float32 and D in (64, 128) and min(query_rows, slots) >= 64
            assert bool(rest) == wanted and len({plain, *rest}) == 1 + len(rest)
            assert all((x.op, x.source) == (op, None) for x in rest)
            assert {x.kernel for x in rest} == (set(modules) if wanted else set())
            assert all(refuses[x.kernel](dtype, D, query_rows, slots, x.blocks) is None for x in rest)
            assert all(Choice(**json.loads(json.dumps(x.config()))) == x for x in (plain, *rest))


def test_each_op_has_rows_of_its_own(table: Path) -> None:
    write_table([ROW | BACKWARD["dq"].config()], "h200/tune.json", table)
    assert [chosen(*SHAPE, op).kernel for op in OPS] == ["triton", "hopper", "triton"]
    write_table([ROW | HOPPER.config(), ROW | BACKWARD["dkdv"].config()], "h200/later.json", table)
    found = [chosen(*SHAPE, op) for op in OPS]
    assert [x.source for x in found] == ["h200/later.json", "h200/tune.json", "h200/later.json"]
    assert [x.op for x in found] == list(OPS) and found[0].num_stages == 1 and found[2].num_stages == 2
    write_table([ROW | Choice(op="dq", kernel="triton").config()], "h200/again.json", table)
    assert chosen(*SHAPE, "dq").kernel == "triton" and chosen(*SHAPE, "dkdv").kernel == "hopper"
    rows = json.loads(table.read_text())
    assert [next(iter(row)) for row in rows] == ["op"] * 3 and sorted(row["op"] for row in rows) == sorted(OPS)
    with using(HOPPER), using(BACKWARD["dkdv"]):
        assert [tuned.forced(op) for op in OPS] == [True, False, True]
        assert chosen(*SHAPE) is HOPPER and chosen(*SHAPE, "dkdv") is BACKWARD["dkdv"]
        assert chosen(*SHAPE, "dq").source == "h200/again.json"


def test_the_hopper_backward_runs_where_it_is_chosen_and_nowhere_else(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.zeros(1, 1, 64, 128, dtype=BF16)
    write_table([ROW | BACKWARD["dq"].config()], "h200/tune.json", table)
    assert hopper_choice("dq", q, 64, 64) is None, "a CPU is no row of the table"
    with using(BACKWARD["dkdv"]), pytest.raises(ValueError, match="kernel of dkdv is forced on a CPU tensor"):
        hopper_choice("dkdv", q, 64, 64)
    monkeypatch.setattr(tuned, "arch_of", lambda x: "sm_90a")
    found = hopper_choice("dq", q, 64, 64)
    assert found is not None and found.config() == BACKWARD["dq"].config()
    assert hopper_choice("dkdv", q, 64, 64) is None and hopper_choice("dq", q.half(), 64, 64) is None
    assert hopper_choice("dq", q[..., :64], 64, 64) is None and hopper_choice("dq", q, 128, 64) is None
    with using(SPECIALIZED):
        assert hopper_choice("dkdv", q, 64, 64) is SPECIALIZED


def test_what_was_measured_is_chosen_for_its_shape_alone(table: Path) -> None:
    default = chosen(*SHAPE)
    write_table([ROW | HOPPER.config() | {"ms": 1.0}], "h200/tune.json", table)
    write_table([ROW | {"D": 64} | default.config()], "h200/later.json", table)
    found = chosen(*SHAPE)
    assert found.kernel == "hopper" and found.blocks == HOPPER.blocks and found.source == "h200/tune.json"
    assert chosen("sm_90a", BF16, 64, 64, 64).source == "h200/later.json"
    for other in (("sm_100a", *SHAPE[1:]), (None, *SHAPE[1:]), ("sm_90a", torch.float16, 128, 64, 64)):
        assert chosen(*other).kernel == "triton" and chosen(*other).source is None
    write_table([ROW | default.config()], "h200/again.json", table)
    assert chosen(*SHAPE).kernel == "triton" and chosen(*SHAPE).source == "h200/again.json"
    assert len(json.loads(table.read_text())) == 2


def test_nothing_is_chosen_that_was_not_measured(table: Path) -> None:
    table.write_text(json.dumps([ROW | HOPPER.config() | {"source": None}]))
    with pytest.raises(ValueError, match="a row without a source"):
        chosen(*SHAPE)


def test_rows_that_cannot_be_written(table: Path) -> None:
    with pytest.raises(ValueError, match="source is empty"):
        write_table([ROW | HOPPER.config()], "", table)
    with pytest.raises(ValueError, match="lacks slots, num_warps"):
        write_table([{x: y for x, y in (ROW | HOPPER.config()).items() if x not in ("slots", "num_warps")}], "a", table)
    with pytest.raises(ValueError, match="kernel is 'cuda'"):
        write_table([ROW | HOPPER.config() | {"kernel": "cuda"}], "a", table)
    with pytest.raises(ValueError, match="op is 'backward'"):
        write_table([ROW | HOPPER.config() | {"op": "backward"}], "a", table)
    with pytest.raises(ValueError, match="'hopper_pairs' computes forward, not dq"):
        write_table([ROW | PAIRS.config() | {"op": "dq"}], "a", table)
    with pytest.raises(ValueError, match="'hopper_specialized' computes dq or dkdv, not forward"):
        write_table([ROW | SPECIALIZED.config() | {"op": "forward"}], "a", table)
    with pytest.raises(ValueError, match="the plain kernel of dq finds its own blocks"):
        write_table([ROW | HOPPER.config() | {"op": "dq", "kernel": "triton"}], "a", table)
    with pytest.raises(ValueError, match="give positive numbers"):
        write_table([ROW | HOPPER.config() | {"keys": 0}], "a", table)
    assert table.read_text() == "[]"


def test_a_forced_choice_ends_with_its_block(table: Path) -> None:
    inner = Choice(kernel="triton", rows=64, keys=32, num_warps=4, num_stages=2)
    with pytest.raises(RuntimeError), using(HOPPER):
        assert chosen(*SHAPE) is HOPPER and tuned.forced()
        with using(inner):
            assert chosen(*SHAPE) is inner
        assert chosen(*SHAPE) is HOPPER
        raise RuntimeError
    assert chosen(*SHAPE).kernel == "triton" and not tuned.forced()


def test_a_choice_may_be_forced_on_some_tiles_alone(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = (BF16, 128, 64, 64)
    q = torch.zeros(1, 1, 64, 128, dtype=BF16)
    with using(HOPPER, only), using(BACKWARD["dq"], only):
        assert chosen(*SHAPE) is HOPPER and chosen(*SHAPE, "dq") is BACKWARD["dq"]
        for other in ((BF16, 128, 32, 64), (BF16, 128, 64, 128), (BF16, 64, 64, 64), (torch.float16, 128, 64, 64)):
            assert [chosen("sm_90a", *other, op).kernel for op in OPS] == ["triton"] * 3
            assert not tuned.forced("forward", other)
        assert tuned.forced("forward", only) and tuned.forced() and not tuned.forced("dkdv")
        assert not tuned.finds_rows(q, 64, 64) and tuned.finds_rows(q, 32, 64) and tuned.finds_rows(q.half(), 64, 64)
    assert not tuned.forced() and tuned.finds_rows(q, 64, 64)


def test_a_call_without_a_backward_does_not_ask_its_kernels(table: Path) -> None:
    q = torch.zeros(1, 1, 64, 128, dtype=BF16)
    with using(BACKWARD["dq"]):
        assert tuned.finds_rows(q, 64, 64, False) and not tuned.finds_rows(q, 64, 64, True)
        with tuned.unforced(), using(SPECIALIZED):
            assert chosen(*SHAPE, "dq").kernel == "triton" and chosen(*SHAPE, "dkdv") is SPECIALIZED
        with pytest.raises(RuntimeError), tuned.unforced():
            assert tuned.finds_rows(q, 64, 64) and not tuned.forced("dq")
            raise RuntimeError
        assert chosen(*SHAPE, "dq") is BACKWARD["dq"] and not tuned.forced("dkdv")
    with using(HOPPER):
        assert not tuned.finds_rows(q, 64, 64, False)


def test_the_table_is_asked_for_the_ops_that_run(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "arch_of", lambda x: "sm_90a")
    q = torch.zeros(1, 1, 64, 128, dtype=BF16)
    write_table([ROW | BACKWARD["dkdv"].config()], "h200/tune.json", table)
    assert tuned.finds_rows(q, 64, 64, False) and not tuned.finds_rows(q, 64, 64)
    write_table([ROW | HOPPER.config()], "h200/tune.json", table)
    assert not tuned.finds_rows(q, 64, 64, False)


def test_other_tiles_run_while_a_choice_is_forced_that_does_not_divide_them() -> None:
    problem = build(Case(query_rows=32, slots=64, D=64, dtype=torch.float16))
    choice = Choice(kernel="triton", rows=64, keys=64, num_warps=4, num_stages=3)
    with using(choice, (torch.float16, 64, 64, 64)):
        out, _ = template.forward(*problem.tensors, **problem.keywords)
    assert bool(out.isfinite().all())
    with (
        using(choice),
        pytest.raises(ValueError, match="blocks of 64 rows and 64 slots are forced on tiles of 32 rows"),
    ):
        template.forward(*problem.tensors, **problem.keywords)


def test_the_forward_takes_blocks_that_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, blocks = template.launch, []

    def recording(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        blocks.append((meta["ROWS"], meta["KEYS"]))
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(template, "launch", recording)
    problem = build(Case(query_rows=64, slots=64, D=64, dtype=torch.float16, partial=True))
    expected = template.forward(*problem.tensors, **problem.keywords)
    with using(Choice(kernel="triton", rows=16, keys=32, num_warps=4, num_stages=2)):
        found = template.forward(*problem.tensors, **problem.keywords)
    assert blocks[-1] == (16, 32) != blocks[0] and len(blocks) == 2
    torch.testing.assert_close(found[0], expected[0], atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(found[1], expected[1])
    with (
        using(Choice(kernel="triton", rows=128, keys=32, num_warps=4, num_stages=2)),
        pytest.raises(ValueError, match="blocks of 128 rows and 32 slots are forced on tiles of 64 rows"),
    ):
        template.forward(*problem.tensors, **problem.keywords)


def test_on_the_cpu_the_hopper_kernel_is_refused() -> None:
    problem = build(Case(query_rows=64, slots=64, D=64, dtype=BF16))
    assert arch_of(problem.q) is None
    for choice in (HOPPER, PAIRS):
        with using(choice), pytest.raises(ValueError, match="forced on a CPU tensor: it needs a GPU of sm_90a"):
            template.forward(*problem.tensors, **problem.keywords)


@pytest.mark.parametrize(("choice", "module"), [(HOPPER, hopper_forward), (PAIRS, hopper_pairs)])
def test_the_forward_goes_to_the_hopper_kernel(
    choice: Choice, module: Any, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "arch_of", lambda x: "sm_90a")
    launched = []

    def launch(*args: Any, **meta: Any) -> None:
        launched.append(meta)
        simulate(*args, **meta)

    monkeypatch.setattr(module, "launch", launch)
    problem = build(Case(query_rows=64, slots=64, D=64, dtype=torch.float16, partial=True, gated=True, kv_first=1))
    expected = template.forward(*problem.tensors, **problem.keywords)
    assert not launched
    write_table([ROW | {"dtype": "fp16", "D": 64} | choice.config()], "h200/tune.json", table)
    found = template.forward(*problem.tensors, **problem.keywords)
    assert len(launched) == 1 and launched[0]["ROWS"] == 64 and launched[0]["STAGES"] == choice.num_stages
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=4e-3, rtol=4e-3)
    turned = problem.keywords | {"scale": -0.125}  # a scale that the kernel refuses
    plain = template.forward(*problem.tensors, **turned)
    assert len(launched) == 1 and bool(plain[0].isfinite().all())
    with using(choice), pytest.raises(ValueError, match="which therefore is positive"):
        template.forward(*problem.tensors, **turned)


def test_a_call_pairs_tiles_that_are_neighbours_in_time(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "arch_of", lambda x: "sm_90a")
    monkeypatch.setattr(hopper_pairs, "launch", simulate)
    asked = []

    def lists(*args: Any) -> Any:
        asked.append(args[-1])
        return pair_lists.pair_lists(*args)

    monkeypatch.setattr(hopper_pairs, "pair_lists", lists)
    write_table([ROW | {"dtype": "fp16", "D": 64} | PAIRS.config()], "h200/tune.json", table)
    layout = fs.TileLayout(grid=(8, 6, 12), tile=(4, 4, 4))
    q, k, v = (torch.randn(1, 1, layout.seq_len, 64, dtype=torch.float16) for _ in range(3))
    builder = fs.VSA(top_k=3)
    found = fs.sparse_attention(q, k, v, layout, builder, backend="triton")
    assert asked == [6] and layout.tiles == (2, 2, 3)
    expected = fs.sparse_attention(q, k, v, layout, builder, backend="gather")
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)
