"""The compiler report: its rows, what it calls an error, and that every configuration `auto` may choose passes it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import kernels, offline
from bench.offline import Row

ROOT = Path(__file__).resolve().parents[2]
MOST_ROWS = 140

TYPES: dict[str, Any] = {
    **dict.fromkeys(("kernel", "arch", "triton"), str),
    **dict.fromkeys(("registers", "spill_bytes", "shared_bytes", "programs", "wgmma"), int),
    **dict.fromkeys(("serialized", "auto"), bool),
    "config": dict,
}

KERNELS = """
import triton
import triton.language as tl

from flexsparse.compile_passes.templates.launch import Compilation


@triton.jit
def attend(a, b, c, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr):
    rows, columns, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, D)
    q = tl.load(a + rows[:, None] * D + d[None, :])
    acc = tl.zeros((ROWS, D), tl.float32)
    top = tl.zeros((ROWS,), tl.float32)
    for i in range(n):
        k = tl.load(b + i * COLUMNS * D + columns[:, None] * D + d[None, :])
        s = tl.dot(q, k.T)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        acc = tl.dot(p.to(k.dtype), k, acc * tl.exp2(top - higher)[:, None])
        top = higher
    tl.store(c + rows[:, None] * D + d[None, :], acc)


def attention(ROWS, COLUMNS, auto=True, **fields):
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "D": 128}
    arguments = {
        "kernel": attend,
        "config": constants,
        "signature": {"a": "*bf16", "b": "*bf16", "c": "*fp32", "n": "i32"} | dict.fromkeys(constants, "constexpr"),
        "constants": constants,
        "aligned": ("a", "b", "c"),
        "auto": auto,
    }
    return Compilation(**arguments | fields)
"""


def module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, text: str) -> str:
    """A module that worker processes can import, its kernels compiled into a cache of its own."""
    (folder / f"{name}.py").write_text(KERNELS + text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    return name


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as it is typed, where the environment asks for the interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "bench.kernels", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def well_formed(row: dict[str, Any]) -> None:
    assert set(row) == set(TYPES)
    for name, kind in TYPES.items():
        assert isinstance(row[name], kind), (name, row[name])
    assert row["arch"] in offline.ARCHS and 16 <= row["registers"] <= 255
    assert row["spill_bytes"] >= 0 and row["shared_bytes"] >= 0 and row["wgmma"] >= 0


def test_json_rows_of_one_kernel(tmp_path: Path) -> None:
    done = command(tmp_path, "--offline", "--json", "--arch", "sm_80", "sm_100", "--only", "gather_tokens dtype=fp16")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = json.loads(done.stdout)
    for row in rows:
        well_formed(row)
        assert row["kernel"] == "gather_tokens" and row["config"]["dtype"] == "fp16" and row["auto"]
        assert row["spill_bytes"] == row["wgmma"] == 0 and not row["serialized"]
    assert [row["arch"] for row in rows] == ["sm_80", "sm_100a"] * (len(rows) // 2) and rows


def compiled_for_hopper(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of what `auto` may choose, without spills."""
    done = command(folder, "--offline", "--json", "--jobs", "2", *arguments)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    for row in rows:
        well_formed(row)
        assert row["auto"] and row["arch"] == "sm_90a" and row["spill_bytes"] == 0 and not row["serialized"]
    assert rows
    assert len({(row["kernel"], str(row["config"])) for row in rows}) == len(rows), "two rows cannot be told apart"
    return rows


def test_the_largest_kernels_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    """Forward, and dk with dv, as they run by default, where they come closest to the limit: the rest is slow to compile."""
    names = ("_forward", "_dkdv")
    rows = compiled_for_hopper(tmp_path, "--only", *(f" {name} dtype=bf16 D=128 query_rows=64" for name in names))
    assert {row["kernel"] for row in rows} == set(names)


@pytest.mark.slow
def test_every_configuration_of_auto_compiles_for_hopper_without_spills(tmp_path: Path) -> None:
    rows = compiled_for_hopper(tmp_path)
    assert len(rows) <= MOST_ROWS
    hopper = [row for row in rows if row["kernel"] == "hopper_forward"]
    programs = {(x["config"]["D"], x["config"]["rows"], x["config"]["full"]): x["programs"] for x in hopper}
    assert programs == {(128, 64, True): 3, (128, 64, False): 3, (64, 64, False): 4, (128, 128, False): 1}


@pytest.mark.slow
def test_the_long_tail_compiles_for_hopper(tmp_path: Path) -> None:
    done = command(tmp_path, "--offline", "--json", "--long-tail", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert not all(row["auto"] for row in json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100a", "sm_120a"])
def test_what_auto_may_choose_compiles_for_other_gpus(tmp_path: Path, arch: str) -> None:
    done = command(tmp_path, "--offline", "--json", "--arch", arch, "--jobs", "2")
    # the configurations are chosen for Hopper: elsewhere they may spill, but all can be launched
    for words in ("does not compile", "cannot be listed", "bytes of shared memory"):
        assert words not in done.stderr, done.stderr
    assert {row["arch"] for row in json.loads(done.stdout)} == {arch}


@pytest.mark.slow
def test_the_widest_heads_fit_gpus_of_99_kib(tmp_path: Path) -> None:
    done = command(tmp_path, "--offline", "--json", "--long-tail", "--arch", "sm_89", "--only", "D=256")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) > 10


@pytest.mark.slow
def test_spills_and_serialised_wgmma_are_errors_where_auto_may_choose_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
def compilations(long_tail):
    good, tail = attention(64, 64), attention(128, 128, auto=False)
    return [good, attention(64, 256), attention(128, 128), *([tail] if long_tail else [])]
"""
    name = module(monkeypatch, tmp_path, "too_large", text)
    monkeypatch.setattr(offline, "template_modules", lambda: [name])
    assert kernels.main(["--offline", "--json", "--long-tail"]) == 1
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    for row in rows:
        well_formed(row)
        assert row["wgmma"] > 0
    assert [row["serialized"] for row in rows] == [False, True, True, True]
    assert [row["spill_bytes"] > 0 for row in rows] == [False, False, True, True]
    assert [row["auto"] for row in rows] == [True, True, True, False]
    lines = printed.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: attend ROWS=") for line in lines)
    assert "ROWS=64 COLUMNS=256 D=128 (sm_90a): its wgmma instructions are serialized" in lines[0]
    assert re.search(r"ROWS=128 COLUMNS=128 D=128 \(sm_90a\): spills \d+ bytes", lines[1])
    assert "ROWS=128 COLUMNS=128 D=128 (sm_90a): its wgmma instructions are serialized" in lines[2]


def test_what_does_not_compile_is_an_error_and_the_rest_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
def compilations(long_tail):
    wrong = {"a": "*bf16", "n": "i32"}
    return [attention(48, 64, auto=False), attention(64, 64), attention(32, 64, signature=wrong)]
"""
    broken = module(monkeypatch, tmp_path, "broken", text)
    unreadable = module(monkeypatch, tmp_path, "unreadable", "raise RuntimeError('two\\nlines')")
    empty = module(monkeypatch, tmp_path, "without_compilations", "")
    monkeypatch.setattr(offline, "template_modules", lambda: [unreadable, broken, empty])
    assert kernels.main(["--offline", "--json"]) == 1
    printed = capsys.readouterr()
    assert [row["config"]["ROWS"] for row in json.loads(printed.out)] == [64]
    lines = printed.err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "error: unreadable: cannot be listed: RuntimeError: two lines"
    assert "attend ROWS=48 COLUMNS=64 D=128 (sm_90a): does not compile: CompilationError" in lines[1]
    assert "power of 2" in lines[1]
    assert "ROWS=32" in lines[2] and "differ in ['COLUMNS', 'D', 'ROWS', 'b', 'c']" in lines[2]


@pytest.mark.slow
def test_a_compiler_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = """
import os

class Deadly(dict):
    def items(self):
        os._exit(3)

def compilations(long_tail):
    return [attention(64, 64), attention(64, 64, constants=Deadly(), config={})]
"""
    name = module(monkeypatch, tmp_path, "fatal", text)
    rows, findings = offline.report([name], jobs=1)
    assert (
        len(rows) + len(findings) == 2 and "attend (sm_90a): does not compile: the compiler's process" in findings[-1]
    )
    at_once = module(monkeypatch, tmp_path, "fatal_at_once", "import os\nos._exit(3)")
    rows, findings = offline.report([name, at_once], jobs=1)
    assert not rows and "fatal_at_once: cannot be listed: the process died" in "".join(findings)


PTXAS = """\
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'attend'
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    512 bytes stack frame, 1024 bytes spill stores, 768 bytes spill loads
ptxas info    : Used 122 registers, used 1 barriers
"""


def test_what_ptxas_prints_is_understood() -> None:
    assert offline.ptxas_facts(PTXAS) == {"registers": 122, "spill_bytes": 1792, "serialized": True}
    quiet = "".join(PTXAS.splitlines(keepends=True)[1:])
    assert offline.ptxas_facts(quiet)["serialized"] is False
    with pytest.raises(ValueError, match="names no registers"):
        offline.ptxas_facts("ptxas fatal")


def test_more_shared_memory_than_there_is_counts_for_auto_alone() -> None:
    row = Row(
        kernel="k",
        config={"D": 64},
        arch="sm_90a",
        registers=64,
        spill_bytes=0,
        shared_bytes=232449,
        programs=0,
        wgmma=8,
        serialized=False,
        auto=True,
        triton="9.9.9",
    )
    assert offline.finding(row) == ["k D=64 (sm_90a): needs 232449 bytes of shared memory, sm_90a has 232448"]
    assert offline.finding(row | {"auto": False}) == offline.finding(row)  # it cannot be launched, whoever chose it
    assert offline.finding(row | {"shared_bytes": 0, "auto": False, "spill_bytes": 8}) == []
    assert offline.finding(row | {"shared_bytes": 232448}) == []
    assert " ".join(kernels.table([row]).split()).endswith("auto k D=64 sm_90a 64 0 232449 0 8 no yes")


def test_programs_of_an_sm() -> None:
    def of(registers: int, shared_bytes: int = 0, num_warps: int = 4, arch: str = "sm_90a") -> int:
        return offline.programs(registers, shared_bytes, num_warps, arch)

    assert [of(n) for n in (168, 169, 128, 129, 255, 32, 16)] == [3, 2, 4, 3, 2, 16, 16]
    assert [of(32, n) for n in (65576, 76800, 76801, 115712, 232448, 232449)] == [3, 3, 2, 2, 1, 0]
    assert [of(128, num_warps=n) for n in (1, 8, 16)] == [16, 2, 1]
    assert of(32, 65576, arch="sm_80") == 2
    assert [of(32, n, arch="sm_89") for n in (0, 50176, 50177, 101376, 101377)] == [12, 2, 1, 1, 0]


def test_a_kernel_of_one_architecture_is_compiled_for_it_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = """
ARCHS = ("sm_90a",)

def compilations(long_tail):
    return [attention(64, 64)]
"""
    name = module(monkeypatch, tmp_path, "of_hopper", text)
    rows, findings = offline.report([name], ("sm_80", "sm_90a", "sm_100a"), jobs=1)
    assert not findings and [row["arch"] for row in rows] == ["sm_90a"]


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 2
    assert "give --offline" in capsys.readouterr().err
    assert kernels.parse(["--arch", "sm_90", "sm_100a"]).arch == ["sm_90a", "sm_100a"]
    with pytest.raises(SystemExit):
        kernels.parse(["--arch", "sm_12"])
    assert "give sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120a" in capsys.readouterr().err
    monkeypatch.setattr(offline, "template_modules", list)
    assert kernels.main(["--offline", "--only", "no-such-kernel"]) == 2
    assert "matches no configuration" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.main(["--offline"]) == 2
    assert "pip install 'flexsparse[triton]'" in capsys.readouterr().err
