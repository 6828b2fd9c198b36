"""Models compiled for a GPU that is not there, down to the code that Inductor writes; that code runs on fake tensors.

`h100` is an H100 as far as torch asks: autograd, Dynamo and Inductor work for CUDA, memory on it is fake. `recording` keeps the
code of every graph compiled inside and all that it launches. What it allocates, views and hands to ops is checked by the fake
tensors themselves, strides by the code's own assertions; Triton kernels are not compiled and do nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
NO_STAND_IN = "this torch is built for CUDA and has a device of its own" if torch.version.cuda else None
"""Why a model cannot be compiled for the stand-in here; None where it can."""
H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    gcnArchName="",
    total_memory=80 << 30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)
MEMORY = ("as_strided", "empty_strided", "detach", "view", "alias", "device", "_unsafe_view", "permute", "t")


@dataclass(frozen=True)
class Launch:
    """A Triton kernel of Inductor's, or an op.

    Attributes:
        name: the kernel's, or the op's with namespace and without overload.
        args: as it was called.
        writes: memory that it writes, as `memory` names it.
        result: what an op returned.
        kernel: whether it is a kernel.
    """

    name: str
    args: tuple[Any, ...]
    writes: frozenset[int]
    result: Any = None
    kernel: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors(self.args)

    @property
    def reads(self) -> set[int]:
        """Memory that it may read: all that it is given and does not write."""
        return {memory(x) for x in self.tensors} - self.writes


def memory(x: Tensor) -> int:
    """Names the memory that a tensor lies in; views share it, as does what Inductor puts into memory that is free again."""
    return x.untyped_storage()._cdata


def tensors(values: Any) -> list[Tensor]:
    """All tensors in nested sequences."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


@dataclass
class Compiled:
    """One graph.

    Attributes:
        backward: whether it is a backward.
        code: the module that Inductor wrote.
        kernels: names and sources of its Triton kernels.
        launches: what it ran, in order, without views and allocations.
    """

    backward: bool
    code: str
    kernels: dict[str, str] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)

    def ops(self, name: str) -> list[Launch]:
        """The launches of one op."""
        return [launch for launch in self.launches if launch.name == name]


class Driver:
    """Triton's, of which Inductor asks what it generates code for."""

    def __init__(self) -> None:
        limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda _: limits)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_interface(self) -> Any:
        return torch.cuda


@functools.cache
def _stand_in() -> Any:
    from torch.utils.cpp_extension import include_paths, library_paths

    path = Path(tempfile.mkdtemp()) / "cuda_stand_in.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", "-o", str(path)]
    command += [str(Path(__file__).with_name("cuda_stand_in.cpp")), *(f"-I{x}" for x in include_paths())]
    subprocess.run([*command, *(f"-L{x}" for x in library_paths()), "-lc10", "-ltorch_cpu"], check=True)
    function = ctypes.CDLL(str(path)).stand_in
    function.argtypes = [ctypes.c_bool]
    return function


def _forget() -> None:
    """Nothing that was found out about devices, and nothing compiled, is known any more."""
    from torch._inductor.runtime.hints import DeviceProperties

    torch._dynamo.reset()
    DeviceProperties.create.cache_clear()
    ours = ("flexsparse", "torch._inductor", "torch.utils._triton")
    for name, module in list(sys.modules.items()):
        if name.startswith(ours) and "fx_passes" not in name:  # those register patterns, once
            for each in list(vars(module).values()):
                if isinstance(each, functools._lru_cache_wrapper):
                    each.cache_clear()


def _answers() -> Iterator[tuple[Any, dict[str, Any]]]:
    """What is asked of CUDA, and the answers."""
    from torch._dynamo.device_interface import CudaInterface

    state = {"get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None}
    one = {"current_device": lambda *_: 0, "get_device_properties": lambda *_: H100}
    there = {**one, "is_available": lambda: True, "device_count": lambda: 1}
    unasked = {
        name: (lambda *_: None) for name in ("synchronize", "set_device", "_lazy_init")
    }  # functions of their own:
    unasked |= {
        name: (lambda *_: 0) for name in ("_exchange_device", "_maybe_exchange_device")
    }  # Dynamo tells them apart
    named = {"get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: H100.name}
    yield torch.cuda, {**there, **state, **unasked, **named, "is_initialized": lambda: True}
    yield torch.cuda.random, state
    yield torch.version, {"cuda": "13.0"}
    yield torch._C, {"_cuda_getCurrentRawStream": lambda _: 0}
    interface = {**there, "get_compute_capability": lambda *_: 90, "get_raw_stream": lambda *_: 0}
    yield CudaInterface, {name: staticmethod(answer) for name, answer in interface.items()}
    yield CudaInterface.Worker, {name: staticmethod(answer) for name, answer in one.items()}


@contextmanager
def h100() -> Iterator[FakeTensorMode]:
    """An H100, until the end; new tensors are fake."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from triton.runtime import driver

    TorchInGraphFunctionVariable._get_handlers()  # a table by function, made once
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    full, deduce = torch.ops.aten.full.default, UniformValueConstantFolder._deduce_value

    def made(x: Tensor) -> Tensor:
        """Of the innermost mode, and not by it: torch shuts modes out where it makes a tensor of Python's numbers."""
        inner = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return FakeTensor(mode if inner is None else inner, x, CUDA)

    def empty(size: Any, **options: Any) -> Tensor:
        return made(torch.empty(size, **{**options, "device": "meta", "pin_memory": None}))

    def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
        return made(torch.empty_strided(size, stride, **{**options, "device": "meta", "pin_memory": None}))

    def deduced(folder: Any, node: torch.fx.Node) -> Any:
        """Inductor folds constants by running them where they are: here on the CPU."""
        if node.target is full and not isinstance(node.args[1], torch.fx.Node):
            return full([1], node.args[1], dtype=node.kwargs.get("dtype"))
        out = deduce(folder, node)
        return folder.unknown_value if isinstance(out, FakeTensor) else out

    config = {"force_disable_caches": True, "compile_threads": 1, "shape_padding": False}
    with (
        pytest.MonkeyPatch.context() as patch,
        torch._inductor.config.patch(config),
        _scoped_library("aten", "IMPL") as library,
    ):
        for owner, answers in _answers():
            for name, answer in answers.items():
                patch.setattr(owner, name, answer, raising=False)
        for module, name in (
            (fuse_attention, "_sfdp_init"),
            (pad_mm, "_pad_mm_init"),
            (misc_patterns, "_misc_patterns_init"),
        ):
            patch.setattr(module, name, lambda *_: None)  # traced for the device, and kept for good
        patch.setattr(UniformValueConstantFolder, "_deduce_value", deduced)
        patch.setattr(driver, "_active", Driver())
        library.impl("empty.memory_format", empty, "CUDA")
        library.impl("empty_strided", empty_strided, "CUDA")
        library.impl("copy_", lambda x, *_: x, "CUDA")
        _stand_in()(True)
        _forget()
        try:
            with mode, torch.autograd.set_multithreading_enabled(False):
                yield mode
        finally:
            _stand_in()(False)
            _forget()


class Recorder(TorchDispatchMode):
    """Notes the ops that a graph's code runs."""

    def __init__(self, graph: Compiled) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        result = func(*args, **kwargs)
        if name.partition("::")[2] not in MEMORY:
            writes = frozenset(map(memory, tensors(result)))
            self.graph.launches.append(Launch(name, (*args, *kwargs.values()), writes, result))
        return result


@contextmanager
def recording() -> Iterator[list[Compiled]]:
    """The graphs that are compiled inside, in order."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    graphs: list[Compiled] = []
    running: list[Compiled] = []
    load = GraphLowering._compile_to_module_lines

    def loaded(lowering: Any, lines: Any) -> Any:
        graph = Compiled(bool(lowering.is_backward), lines.value)
        graphs.append(graph)
        module = load(lowering, lines)
        call = module.call

        def run(args: Any) -> Any:
            running.append(graph)
            try:
                with Recorder(graph):
                    return call(args)
            finally:
                running.pop()

        module.call = run
        return module

    def triton(_: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        graphs[-1].kernels[name] = source
        names = re.search(rf"def {name}\((.*?)\)", source)[1].split(", ")  # type: ignore[index]

        def run(*args: Any, **_: Any) -> None:
            written = [x for to, x in zip(names, args) if to.startswith(("out_ptr", "in_out_ptr"))]
            running[-1].launches.append(Launch(name, args, frozenset(map(memory, written)), kernel=True))

        return SimpleNamespace(run=run)

    def empty(size: Any, stride: Any, dtype: Any) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=CUDA)

    def reinterpret(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return x.as_strided(size, stride, x.storage_offset() + offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphLowering, "_compile_to_module_lines", loaded)
        patch.setattr(AsyncCompile, "triton", triton)
        patch.setattr(torch._C._dynamo.guards, "_empty_strided_cuda", empty)
        patch.setattr(torch._C._dynamo.guards, "_reinterpret_tensor", reinterpret)
        yield graphs


def on_cuda(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor's twin on the H100, fake; floats in another dtype where one is given. A module gets such parameters."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    twin = on_cuda(parameter.detach(), dtype)
                    module._parameters[name] = nn.Parameter(twin, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = on_cuda(buffer, dtype)
    if not isinstance(x, Tensor):
        return x
    wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
    return torch.empty_strided(x.shape, x.stride(), dtype=wanted, device=CUDA)
