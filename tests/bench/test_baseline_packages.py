"""Packages of the baselines: how they are fetched, packed, unpacked and loaded."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import baselines
from bench.baselines import (
    BASELINES,
    __main__,
    fastvideo_tk,
    gather,
)

SOURCE = """
#include <Python.h>
int answer(void);
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastvideo_kernel_ops", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_fastvideo_kernel_ops(void) {
    PyObject *made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "answer", answer());
    return made;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_extension_finds_the_drivers_library_by_its_copys_name(tmp_path: Path) -> None:
    def build(source: str, out: Path, *flags: str) -> None:
        (tmp_path / "source.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-o", str(out)]
        done = subprocess.run([*command, str(tmp_path / "source.c"), *flags], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no extension can be built here: {done.stderr[-200:]}")

    root, driver, copy = tmp_path / "site", tmp_path / "libcuda.so.580.1", "libcuda-0a1b2c3d.so.580.2"
    code, libs = root / "fastvideo_kernel" / "_C", root / "fastvideo_kernel.libs"
    code.mkdir(parents=True)
    libs.mkdir()
    build("int answer(void) { return 42; }", driver, "-Wl,-soname,libcuda.so.1")
    build("int answer(void) { return 13; }", libs / copy, f"-Wl,-soname,{copy}")
    extension = code / "fastvideo_kernel_ops.x.so"
    where = "-Wl,--disable-new-dtags,-rpath,$ORIGIN/../../fastvideo_kernel.libs"
    build(SOURCE, extension, str(libs / copy), where)
    module = fastvideo_tk.load_extension(extension, libs, lambda: driver)
    assert module.answer == 42, "the wheel's own copy was loaded"
    assert [path.name for path in libs.iterdir()] == [copy]


def fake_fetch(wheels: Any, folder: Path, python: str) -> None:
    for wheel in wheels:
        name = wheel.partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}-1.dist-info/METADATA", "Name: x")
            archive.writestr("fastvideo_kernel/_C/fastvideo_kernel_ops.cpython-312-x86_64-linux-gnu.so", "code" * 999)
            archive.writestr("fastvideo_kernel.libs/libcuda-266916da.so.580.173.02", "driver")
            archive.writestr("fastvideo_kernel.libs/libcudart-96c42e41.so.13.0.96", "runtime")
            archive.writestr("fastvideo_kernel/ops.py", "raise ImportError")


def test_download_packs_what_is_needed_and_unpack_brings_it_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gather, "fetch", fake_fetch)
    assert __main__.main(["--download", str(tmp_path / "packed"), "fastvideo_tk", "fastvideo_triton"]) == 0
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["fastvideo.tar.xz"]
    assert "fastvideo_tk: fastvideo, 0.0 MiB, fits one load" in capsys.readouterr().out
    target = tmp_path / "site"
    assert __main__.main(["--unpack", str(tmp_path / "packed"), "--baseline-dir", str(target)]) == 0
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {
        "fastvideo_kernel-1.dist-info/METADATA",
        "fastvideo_kernel/_C/fastvideo_kernel_ops.cpython-312-x86_64-linux-gnu.so",
        "fastvideo_kernel.libs/libcudart-96c42e41.so.13.0.96",
    }
    assert (target / "fastvideo_kernel.libs/libcudart-96c42e41.so.13.0.96").read_text() == "runtime"


def test_what_is_packed_of_large_wheels() -> None:
    def kept(group: str, path: str) -> bool:
        return gather.wanted(gather.GROUPS[group], path)

    compiler = (
        "nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.cu13.cpython-312-x86_64-linux-gnu.so"
    )
    assert kept("cutlass_compiler", compiler) and not kept("cutlass", compiler)
    runtime = "nvidia_cutlass_dsl/cu13/lib/libcute_dsl_runtime.so"
    assert kept("cutlass", runtime) and not kept("cutlass_compiler", runtime)
    assert kept("cutlass", "nvidia_cutlass_dsl_packages.pth") and kept("cutlass", "tvm_ffi/lib/libtvm_ffi.so")
    assert not kept("cutlass", "tvm_ffi/3rdparty/x.c")
    assert kept("cudnn_frontend", "cudnn/__init__.py") and kept("cudnn_frontend", "cudnn/engines/base.py")
    assert not kept("cudnn_frontend", "cudnn/sdpa/fwd/api_dsl.py")
    assert kept("cudnn_frontend", "nvidia_cudnn_frontend-1.32.0.dist-info/licenses/LICENSE")


def test_groups_and_loads() -> None:
    assert set(gather.NEEDS) < set(BASELINES) and {g for gs in gather.NEEDS.values() for g in gs} == set(gather.GROUPS)
    assert set(gather.groups_of([])) == set(gather.GROUPS)
    assert gather.groups_of(["fastvideo_tk", "fastvideo_triton", "fastvideo"]) == ["fastvideo"]
    with pytest.raises(ValueError, match="dense_cudnn needs no package"):
        gather.groups_of(["dense_cudnn"])
    assert gather.loads({"a": 2, "b": 50, "c": 9, "d": 12}, 60) == [["b", "c"], ["d", "a"]]
    lines: list[str] = []
    sizes = {"cutlass_compiler": 61 << 20, "cutlass": 1 << 20, "flash_attn_4": 1 << 20}
    gather.report(sizes, 60 << 20, lines.append)
    assert lines[3] == "dense_fa4: cutlass_compiler + cutlass + flash_attn_4, 63.0 MiB, needs more than one load"
    assert lines[4] == "load 1: cutlass_compiler, 61.0 MiB of 60, over the limit"
    assert lines[5] == "load 2: cutlass flash_attn_4, 2.0 MiB of 60" and len(lines) == 6


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "of_a_baseline.py").write_text("here = True")
    (tmp_path / "packages.pth").write_text("more\n")
    assert __main__.main(["--check", "--baseline-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(BASELINES)
    assert lines[list(BASELINES).index("flex_128")].startswith("flex_128: 128 slots: ")
    if not torch.cuda.is_available():
        assert all("runs on CUDA alone" in line for line in lines)
    assert importlib.util.find_spec("of_a_baseline") is not None, "a .pth file was not followed"
    monkeypatch.setitem(BASELINES, "flex_64", lambda p, training: baselines.Attend(function=torch.add, note="fine"))
    assert __main__.main(["--check"]) == 0
    assert "\nflex_64: 64 slots: available, fine\n" in capsys.readouterr().out
    for wrong, said in (
        (["--check", "--baseline-dir", str(tmp_path / "none")], "is no folder"),
        (["--unpack", str(tmp_path)], "--unpack needs --baseline-dir"),
        (["--unpack", str(tmp_path), "--baseline-dir", str(tmp_path)], r"holds no *.tar.xz"),
        (["--download", str(tmp_path), "flex_64"], "flex_64 needs no package"),
    ):
        assert __main__.main(wrong) == 2
        assert said in capsys.readouterr().err
