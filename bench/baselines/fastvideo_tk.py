"""FastVideo's block-sparse attention in ThunderKittens, from the `fastvideo-kernel` package: the handwritten kernel.

The compiled extension is loaded by itself, without the package around it. Signatures, as the extension (0.3.2) and the
package's own calls give them; bfloat16, contiguous, 64 slots, D of 64 or 128, scale D ** -0.5:

    block_sparse_fwd(q, k, v, q2k, q2k_counts, sizes) -> [out, lse [B, H, P, 1]]
    block_sparse_bwd(q, k, v, out, lse, grad, k2q, k2q_counts, sizes) -> [dq, dk, dv], float32

The wheel brings a copy of NVIDIA's driver library (96 MB), and the extension asks for it by that copy's name. The copy belongs
to one driver version and is left behind: a link of that name to the driver's own library takes its place.

Shape letters: B batch, H heads, P padded tokens in tile order, D head dim.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines.fastvideo_triton import need_fastvideo, root_of
from bench.baselines.lists import Lists, lists_of
from bench.baselines.protocol import Attend, Problem, Unavailable, first_call, need_cuda, one_line, remedy
from bench.header import version

MODULE = "fastvideo_kernel_ops"


class BlockSparse(torch.autograd.Function):
    """Attention over lists; ``ops`` is the extension, or anything with its two functions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ops: Any, lists: Lists) -> Tensor:
        """``[B, H, P, D]``."""
        out: Tensor
        out, lse = ops.block_sparse_fwd(q, k, v, lists.q2k, lists.q2k_counts, lists.sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ops, ctx.lists = ops, lists
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of q, k and v in float32; autograd casts them."""
        lists: Lists = ctx.lists
        found = ctx.ops.block_sparse_bwd(
            *ctx.saved_tensors, grads[0].contiguous(), lists.k2q, lists.k2q_counts, lists.sizes
        )
        return (*found, None, None)


def prepare(problem: Problem, training: bool) -> Attend:
    """FastVideo's ThunderKittens kernels on Hopper."""
    name = "fastvideo_tk"
    need_cuda(problem, name, (9, 0))
    need_fastvideo(problem, name)
    ops = load_ops(root_of(name))
    lists = lists_of(problem, name, columns=training)
    note = f"fastvideo-kernel {version('fastvideo-kernel')}, {MODULE}"
    return first_call(name, lambda q, k, v: BlockSparse.apply(q, k, v, ops, lists), note, problem, training)


@functools.cache
def load_ops(root: Path) -> Any:
    """The compiled extension below ``root/fastvideo_kernel/_C``.

    Raises:
        Unavailable: it is not there, or does not load here.
    """
    found = sorted((root / "fastvideo_kernel" / "_C").glob(f"{MODULE}.*.so"))
    if not found:
        raise Unavailable(f"fastvideo_tk finds no {MODULE} in {root}/fastvideo_kernel/_C: {remedy('fastvideo')}")
    try:
        return load_extension(found[0], root / "fastvideo_kernel.libs", driver_library)
    except Exception as error:
        raise Unavailable(f"fastvideo_tk cannot load {found[0].name} here: {one_line(error)}") from error


def load_extension(path: Path, libraries: Path, driver: Any) -> Any:
    """An extension whose libraries were renamed by the tool that packed them (`name-<hash>.so...`).

    It looks for them in ``../../fastvideo_kernel.libs`` from the folder it was opened in. That place is a temporary tree of
    links: to the libraries that are there, and to the driver's own for what was its copy. What is loaded stays when the tree
    goes.

    Args:
        driver: gives the path of the driver's library, asked only where it is wanted.
    """
    with tempfile.TemporaryDirectory() as folder:
        code, libs = Path(folder, "fastvideo_kernel", "_C"), Path(folder, libraries.name)
        code.mkdir(parents=True)
        libs.mkdir()
        for name in {match.decode() for match in re.findall(rb"libcuda-[0-9a-f]+\.so[.0-9]*", path.read_bytes())}:
            (libs / name).symlink_to(driver())
        for library in libraries.iterdir() if libraries.is_dir() else ():
            if not (libs / library.name).exists():
                (libs / library.name).symlink_to(library.resolve())
        (code / path.name).symlink_to(path.resolve())
        spec = importlib.util.spec_from_file_location(MODULE, code / path.name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def driver_library() -> Path:
    """Where NVIDIA's driver library was loaded from: the same file, so that the loader takes it for the one that is there."""
    ctypes.CDLL("libcuda.so.1")
    maps = Path("/proc/self/maps").read_text()
    found = re.search(r"\S*/libcuda\.so\S*", maps)
    if found is None:
        raise OSError("libcuda.so.1 is loaded from no file")
    return Path(found[0])
