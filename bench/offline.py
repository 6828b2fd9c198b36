"""Compiles template kernels for GPUs that need not be there and reads what ptxas says about them.

Everything that imports Triton happens in worker processes: they are started without TRITON_INTERPRET, whose value
Triton reads as it decorates a kernel, and a compiler that dies does not take the report with it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from flexsparse.compile_passes.templates.launch import Compilation

TEMPLATES = Path(__file__).resolve().parents[1] / "compile_passes" / "templates"
PACKAGE = "flexsparse.compile_passes.templates"


@dataclass(frozen=True, kw_only=True)
class Arch:
    """What an SM of one architecture has (CUDA C++ Programming Guide, technical specifications per compute capability).

    Attributes:
        capability: compute capability, ten times.
        shared_bytes: shared memory that one program can have.
        threads: threads that an SM holds at once.
    """

    capability: int
    shared_bytes: int
    threads: int


ARCHS = {
    "sm_80": Arch(capability=80, shared_bytes=166912, threads=2048),
    "sm_86": Arch(capability=86, shared_bytes=101376, threads=1536),
    "sm_89": Arch(capability=89, shared_bytes=101376, threads=1536),
    "sm_90a": Arch(capability=90, shared_bytes=232448, threads=2048),
    "sm_100a": Arch(capability=100, shared_bytes=232448, threads=2048),
    "sm_120a": Arch(capability=120, shared_bytes=101376, threads=1536),
}
"""As Triton names them: A100, RTX 30, RTX 40 and L40S, H100 and H200, B200, RTX 50."""

# of one SM of each of these; a thread's registers are counted in eights
SM_REGISTERS = 65536
RESERVED_BYTES = 1024  # of shared memory, for every program

ERROR_LENGTH = 400


class Row(TypedDict):
    """One kernel in one configuration for one architecture; `bench/README.md` says what each field means."""

    kernel: str
    config: dict[str, Any]
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int
    wgmma: int
    serialized: bool
    auto: bool
    triton: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A compilation that a worker finds again, since kernels themselves do not travel between processes.

    Attributes:
        module: where `compilations` is.
        long_tail: its argument.
        index: which of its results.
        kernel: the kernel's name.
        config: what tells this configuration from others of the kernel.
        arch: one of `ARCHS`.
    """

    module: str
    long_tail: bool
    index: int
    kernel: str
    config: dict[str, Any]
    arch: str

    @property
    def name(self) -> str:
        """``kernel D=64 dtype=bf16 (sm_90a)``."""
        return describe(self.kernel, self.config, self.arch)


def describe(kernel: str, config: dict[str, Any], arch: str) -> str:
    """A configuration in one line."""
    return " ".join([kernel, *(f"{key}={value}" for key, value in config.items()), f"({arch})"])


def template_modules() -> list[str]:
    """Every module of compile_passes/templates; those without `compilations` have nothing to compile."""
    return [f"{PACKAGE}.{path.stem}" for path in sorted(TEMPLATES.glob("*.py")) if path.stem != "__init__"]


def one_line(error: BaseException) -> str:
    """An error's type and text, without line breaks and the middle of a long text (a kernel's source, mostly)."""
    text = " ".join(str(error).split())
    if len(text) > ERROR_LENGTH:
        text = f"{text[: ERROR_LENGTH // 2]} ... {text[-ERROR_LENGTH // 2 :]}"
    return f"{type(error).__name__}: {text}"


def ptxas_facts(log: str) -> dict[str, Any]:
    """Registers, spilled bytes (stores and loads), serialised wgmma from what ``ptxas -v`` prints.

    Raises:
        ValueError: it names no registers.
    """
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise ValueError(f"ptxas names no registers: {' '.join(log.split())[:ERROR_LENGTH] or 'it printed nothing'}")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {
        "registers": max(registers),
        "spill_bytes": sum(int(stores) + int(loads) for stores, loads in spills),
        "serialized": bool(re.search(r"wgmma\.mma_async instructions are serialized", log)),
    }


def programs(registers: int, shared_bytes: int, num_warps: int, arch: str) -> int:
    """How many programs an SM holds at once; 0 where one needs more than there is."""
    by_registers = SM_REGISTERS // (-(-registers // 8) * 8 * 32 * num_warps)
    by_memory = (ARCHS[arch].shared_bytes + RESERVED_BYTES) // (shared_bytes + RESERVED_BYTES)
    return min(by_registers, by_memory, ARCHS[arch].threads // (32 * num_warps))


def compiled_kernel(task: Compilation, arch: str) -> tuple[Any, str]:
    """Compile one configuration, in a process without TRITON_INTERPRET.

    Returns:
        Triton's compiled kernel, and what ``ptxas -v`` printed.

    Raises:
        Exception: whatever Triton or ptxas raise where it does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = task.kernel.arg_names
    if set(names) != set(task.signature):
        raise ValueError(f"its signature and arguments differ in {sorted(set(names) ^ set(task.signature))}")
    source = (GluonASTSource if task.kernel.is_gluon() else ASTSource)(
        fn=task.kernel,
        signature={name: task.signature[name] for name in names},
        constexprs=task.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in task.aligned},
    )
    log = io.StringIO()
    # Triton's own run of ptxas, with the flags that a launch would use: its log, hence no binary from the cache
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", ARCHS[arch].capability, 32),
            options={"num_warps": task.num_warps, "num_stages": task.num_stages, **getattr(task, "options", {})},
        )
    return compiled, log.getvalue()


def compile_row(task: Compilation, arch: str) -> Row:
    """The row of one configuration, in a process without TRITON_INTERPRET.

    Raises:
        Exception: whatever Triton or ptxas raise where it does not compile.
    """
    import triton

    compiled, log = compiled_kernel(task, arch)
    facts = ptxas_facts(log)
    return Row(
        kernel=task.name,
        config=task.config,
        arch=arch,
        registers=facts["registers"],
        spill_bytes=facts["spill_bytes"],
        shared_bytes=compiled.metadata.shared,
        programs=programs(facts["registers"], compiled.metadata.shared, compiled.metadata.num_warps, arch),
        wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
        serialized=facts["serialized"],
        auto=task.auto,
        triton=triton.__version__,
    )


def finding(row: Row) -> list[str]:
    """What is wrong with a row, one line each: what cannot be launched, and what `auto` may choose and is slow."""
    name = describe(row["kernel"], row["config"], row["arch"])
    limit = ARCHS[row["arch"]].shared_bytes
    found = []
    if row["shared_bytes"] > limit:
        found.append(f"{name}: needs {row['shared_bytes']} bytes of shared memory, {row['arch']} has {limit}")
    if row["auto"] and row["spill_bytes"]:
        found.append(f"{name}: spills {row['spill_bytes']} bytes")
    if row["auto"] and row["serialized"]:
        found.append(f"{name}: its wgmma instructions are serialized")
    return found


def report(
    modules: Sequence[str],
    archs: Iterable[str] = ("sm_90a",),
    long_tail: bool = False,
    only: Sequence[str] = (),
    jobs: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[str]]:
    """Compile what the modules list.

    Args:
        modules: names of importable modules; those without `compilations` are passed over.
        archs: some of `ARCHS`.
        long_tail: whether to compile configurations that `auto` does not choose.
        only: words; a configuration is compiled where its line (module, kernel, configuration) holds one. All
            without words.
        jobs: worker processes.
        progress: told about every configuration.

    Returns:
        A row for each configuration that compiles, and a line for each finding.
    """
    rows: list[Row] = []
    findings: list[str] = []
    context = multiprocessing.get_context("spawn")
    with _not_interpreting(), ProcessPoolExecutor(jobs, mp_context=context) as pool:
        tasks: list[Task] = []
        listings = [(module, _submit(pool, _listed, module, long_tail, tuple(archs))) for module in modules]
        for module, listing in listings:
            try:
                found = listing.result()
            except BrokenProcessPool:
                found = "the process died, in this module or one imported next to it"
            if isinstance(found, str):
                findings.append(f"{module}: cannot be listed: {found}")
            else:
                tasks += [x for x in found if not only or any(word in f"{module} {x.name}" for word in only)]
        results = [(task, _submit(pool, _compiled, task)) for task in tasks]
        for number, (task, result) in enumerate(results, 1):
            progress(f"[{number}/{len(results)}] {task.name}")
            try:
                row = result.result()
            except BrokenProcessPool:
                row = "the compiler's process died, in this configuration or one compiled next to it"
            if isinstance(row, str):
                findings.append(f"{task.name}: does not compile: {row}")
            else:
                rows.append(row)
                findings += finding(row)
    return rows, findings


@contextlib.contextmanager
def _not_interpreting() -> Iterator[None]:
    """No TRITON_INTERPRET for processes started inside; they may import Triton before they run any code of ours."""
    value = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["TRITON_INTERPRET"] = value


def _submit(pool: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Future[Any]:
    """As ``pool.submit``; what a broken pool refuses fails like what it had taken."""
    try:
        return pool.submit(function, *args)
    except BrokenProcessPool as error:
        refused: Future[Any] = Future()
        refused.set_exception(error)
        return refused


def _listed(module: str, long_tail: bool, archs: tuple[str, ...]) -> list[Task] | str:
    try:
        loaded = importlib.import_module(module)
        found = loaded.compilations(long_tail) if hasattr(loaded, "compilations") else []
        archs = tuple(arch for arch in archs if arch in getattr(loaded, "ARCHS", archs))
    except Exception as error:  # Triton's errors do not survive the way between processes
        return one_line(error)
    return [
        Task(module=module, long_tail=long_tail, index=i, kernel=x.name, config=x.config, arch=arch)
        for i, x in enumerate(found)
        for arch in archs
    ]


def _compiled(task: Task) -> Row | str:
    try:
        return compile_row(importlib.import_module(task.module).compilations(task.long_tail)[task.index], task.arch)
    except Exception as error:
        return one_line(error)
