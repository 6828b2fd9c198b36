"""Downloads the baselines' packages for another machine, and packs what they need of them.

Wheels bring much that no benchmark touches, so they are taken apart: one archive a group of packages, small enough to be
carried where there is no network.
"""

from __future__ import annotations

import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON = "3.12"
GLIBC = (17, 24, 27, 28, 31, 34, 35)  # pip matches a wheel's tags one by one
MIB = 1 << 20
# for x86 code; the window holds most of the largest library, and takes as much memory to unpack
FILTERS = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 128 * MIB},
]
ABOUT = r"[^/]*\.dist-info/(METADATA|LICENSE.*|licenses/.*)"
DSL = "4.8.1"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Packages that are packed together.

    Attributes:
        wheels: what pip is asked for.
        keep: regular expressions of the files to keep, each for a whole path.
        drop: the same for files not to keep after all.
    """

    wheels: tuple[str, ...]
    keep: tuple[str, ...] = (".*",)
    drop: tuple[str, ...] = ()


COMPILER = r".*/_mlir_libs/_cutlass_ir.*\.so"
GROUPS = {
    "fastvideo": Group(
        wheels=("fastvideo-kernel==0.3.2",),
        keep=(
            r"fastvideo_kernel/_C/.*\.so",
            r"fastvideo_kernel/triton_kernels/block_sparse_attn_triton\.py",
            r"fastvideo_kernel\.libs/libcudart-.*",
            ABOUT,
        ),
    ),
    "attention_gym": Group(wheels=("attn-gym==0.0.17",)),
    "cutlass_compiler": Group(wheels=(f"nvidia-cutlass-dsl-libs-cu13=={DSL}",), keep=(COMPILER,)),
    "cutlass": Group(
        wheels=(
            f"nvidia-cutlass-dsl=={DSL}",
            f"nvidia-cutlass-dsl-libs-base=={DSL}",
            f"nvidia-cutlass-dsl-libs-core=={DSL}",
            f"nvidia-cutlass-dsl-libs-cu13=={DSL}",
            "apache-tvm-ffi==0.1.15.post2",
        ),
        drop=(COMPILER, r".*/(iket|stubs|include)/.*", r".*\.a", r"tvm_ffi/(3rdparty|src|include)/.*"),
    ),
    "flash_attn_4": Group(wheels=("flash-attn-4==4.0.0b36", "quack-kernels==0.6.5")),
    "cudnn_frontend": Group(
        wheels=("nvidia-cudnn-frontend==1.32.0",),
        keep=(
            r"cudnn/[^/]*",
            r"cudnn/(block_sparse_attention|engines|_cutlass_helpers|frost)/.*",
            ABOUT,
        ),
    ),
}
CUTE = ("cutlass_compiler", "cutlass")
NEEDS: dict[str, tuple[str, ...]] = {
    "fastvideo_tk": ("fastvideo",),
    "fastvideo_triton": ("fastvideo",),
    "attention_gym": ("attention_gym",),
    "dense_fa4": (*CUTE, "flash_attn_4"),
    "cudnn_frontend": (*CUTE, "cudnn_frontend"),
}


def groups_of(names: Sequence[str]) -> list[str]:
    """Groups that baselines need, each once; all of them where no name is given, a group's own name is taken too.

    Raises:
        ValueError: a name that is neither.
    """
    found: list[str] = []
    for name in names or NEEDS:
        if name not in NEEDS and name not in GROUPS:
            raise ValueError(
                f"{name} needs no package or is no baseline: give some of {', '.join({**NEEDS, **GROUPS})}"
            )
        found += [group for group in NEEDS.get(name, (name,)) if group not in found]
    return found


def download(folder: Path, names: Sequence[str], python: str = PYTHON) -> dict[str, int]:
    """Archives ``folder/<group>.tar.xz`` of what baselines need; their sizes in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name in groups_of(names):
        with tempfile.TemporaryDirectory() as wheels:
            fetch(GROUPS[name].wheels, Path(wheels), python)
            sizes[name] = pack(GROUPS[name], Path(wheels), folder / f"{name}.tar.xz")
    return sizes


def fetch(wheels: Sequence[str], folder: Path, python: str) -> None:
    """Wheels for 64-bit x86 Linux, without what they depend on."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["--platform=manylinux2014_x86_64"]
    where = ["--dest", str(folder), "--python-version", python, "--implementation", "cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *where, *wheels]
    subprocess.run(command, check=True)


def wanted(group: Group, path: str) -> bool:
    """Whether a file of a group's wheels is packed."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(re.fullmatch(pattern, path) for pattern in patterns)

    return matches(group.keep) and not matches(group.drop)


def pack(group: Group, wheels: Path, archive: Path) -> int:
    """Pack the wanted files of all wheels in a folder; the archive's size in bytes."""
    with tempfile.TemporaryDirectory() as tree:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as unpacked:
                unpacked.extractall(tree, [path for path in unpacked.namelist() if wanted(group, path)])
        with lzma.open(archive, "wb", filters=FILTERS) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            for path in sorted(Path(tree).rglob("*")):
                if path.is_file():
                    tar.add(path, arcname=str(path.relative_to(tree)))
    return archive.stat().st_size


def unpack(folder: Path, target: Path) -> list[str]:
    """Unpack the archives of a folder into another one, for `use_directory`; the names of the groups.

    Raises:
        ValueError: there are none.
    """
    archives = sorted(folder.glob("*.tar.xz"))
    if not archives:
        raise ValueError(f"{folder} holds no *.tar.xz: make them with `python -m bench.baselines --download {folder}`")
    target.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        with tarfile.open(archive, "r:xz") as tar:
            tar.extractall(target, filter="data")
    return [archive.name.removesuffix(".tar.xz") for archive in archives]


def loads(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Groups sorted into as few loads of at most ``limit`` bytes as first-fit finds, the largest groups first."""
    found: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        fits = (load for load in found if sum(sizes[other] for other in load) + sizes[name] <= limit)
        load = next(fits, None)
        if load is None:
            found.append([name])
        else:
            load.append(name)
    return found


def report(sizes: dict[str, int], limit: int, write: Callable[[str], object] = print) -> None:
    """Print the sizes, what each baseline needs in all, and the loads."""
    for name, size in sizes.items():
        write(f"{name:<18} {size / MIB:6.1f} MiB")
    for baseline, groups in NEEDS.items():
        if all(group in sizes for group in groups):
            total = sum(sizes[group] for group in groups)
            fits = "fits one load" if total <= limit else "needs more than one load"
            write(f"{baseline}: {' + '.join(groups)}, {total / MIB:.1f} MiB, {fits}")
    for number, load in enumerate(loads(sizes, limit), 1):
        total = sum(sizes[name] for name in load)
        over = "" if total <= limit else ", over the limit"
        write(f"load {number}: {' '.join(load)}, {total / MIB:.1f} MiB of {limit / MIB:.0f}{over}")
