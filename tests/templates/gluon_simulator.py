"""Runs a Gluon kernel for Hopper as Python on the CPU, program by program, and raises where it races or hangs.

A kernel's function is called with stand-ins for the modules that it uses. Whatever is asynchronous happens as late as
the kernel allows: a copy lands at the wait on its barrier, a product is computed, from what shared memory holds then,
at the wait that needs it. Until then the destination is NaN. `Hazard` is raised for what hardware would do wrongly in
silence: a buffer read before its copy was waited for, or overwritten while a copy, product or store uses it; a product
used while it is in flight; a barrier armed twice, or waited for though it never completes; writes that the
asynchronous units may not see (no fence); memory out of bounds; work in flight at the end. Partitions of a warp-specialised
kernel take turns at random (`gluon_crew`); they may also all wait for each other, and one may read a buffer whose copy another
waited for. Not modelled: layouts (the compiler checks them), threads of a partition and the barriers between them (the compiler
places them), speed.
"""

from __future__ import annotations

import functools
import itertools
import math
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexsparse.compile_passes.templates import hopper_tma

from . import gluon_values as values
from .gluon_crew import Crew
from .gluon_values import TYPES, Pointer, Value, demand, raw

LARGEST_BOX = 256


@dataclass
class Shared:
    """A view of one allocation of shared memory."""

    machine: Machine
    data: Tensor

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, i: Any) -> Shared:
        demand(0 <= int(i) < len(self.data), f"buffer {int(i)} of {len(self.data)}")
        return Shared(self.machine, self.data[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.machine, self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.data.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.machine, self.data.narrow(dim, start, length))

    def overlaps(self, other: Shared) -> bool:
        """Whether both name some of the same memory; views are contiguous up to a transposition."""
        if self.data.untyped_storage().data_ptr() != other.data.untyped_storage().data_ptr():
            return False
        a, b = self.data.storage_offset(), other.data.storage_offset()
        return a < b + other.data.numel() and b < a + self.data.numel()

    def load(self, layout: Any = None) -> Value:
        self.machine.readable(self, "a load")
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        demand(value.shape == self.shape and value.data.dtype == self.data.dtype, "a store of another shape or type")
        self.machine.writable(self, "a store")
        self.data.copy_(value.data)
        self.machine.unfenced.append(self)

    @property
    def key(self) -> tuple[int, int]:
        """What tells this barrier from others."""
        return self.data.untyped_storage().data_ptr(), self.data.storage_offset()


@dataclass
class Barrier:
    """A barrier: arrivals of a phase, the phase that runs, how many arrivals it lacks, bytes expected, and its copies.

    ``landed`` are the buffers that the copies of the last phase reached, each with the partitions that know it.
    """

    count: int
    lacks: int
    fenced: bool = False
    phase: int = 0
    expected: int = 0
    copies: list[tuple[Shared, Tensor]] = field(default_factory=list)
    landed: list[tuple[Shared, set[int]]] = field(default_factory=list)

    @property
    def arrived(self) -> int:
        """Bytes on their way."""
        return sum(data.numel() * data.element_size() for _, data in self.copies)

    def complete(self) -> bool:
        """End the phase where nothing is missing."""
        if self.lacks or self.arrived != self.expected:
            return False
        for buffer, data in self.copies:
            buffer.data.copy_(data)
        self.landed = [(buffer, set()) for buffer, _ in self.copies]
        self.copies, self.expected, self.lacks, self.phase = [], 0, self.count, self.phase + 1
        return True

    def missing(self) -> str:
        """Why the phase does not end."""
        if self.lacks == self.count:
            return "a wait for a phase that nothing arms never ends"
        if self.lacks:
            return f"{self.lacks} of {self.count} arrivals are missing: the wait never ends"
        return f"{self.arrived} bytes are copied, {self.expected} expected: the wait never ends"


@dataclass
class Product:
    """A matrix product in flight."""

    a: Value | Shared
    b: Shared
    acc: Any
    use_acc: bool
    result: Value | None = None

    @property
    def buffers(self) -> list[Shared]:
        return [x for x in (self.a, self.b) if isinstance(x, Shared)]


class Descriptor:
    """A `TensorDescriptor` in a kernel's hands."""

    def __init__(self, given: TensorDescriptor) -> None:
        self.given, self.layout, self.dtype = given, given.layout, given.base.dtype
        self.array = given.base.as_strided(given.shape, given.strides)
        demand(max(given.block_shape) <= LARGEST_BOX, f"a box of {given.block_shape}")
        steps = [n * given.base.element_size() for n in given.strides[:-1]]
        demand(all(n > 0 and n % 16 == 0 for n in steps), f"strides of {steps} bytes")
        nbytes = math.prod(given.block_shape) * given.base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=nbytes, shape=given.block_shape)

    def box(self, coordinates: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the array that a box covers, and that part's place in the box."""
        start = [int(raw(c)) for c in coordinates]
        low = [max(s, 0) for s in start]
        high = [
            max(min(s + n, size), lo) for s, n, size, lo in zip(start, self.given.block_shape, self.given.shape, low)
        ]
        outside = tuple(slice(lo, hi) for lo, hi in zip(low, high))
        return outside, tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, start))


class Machine:
    """One program: shared memory, barriers, and what is in flight."""

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...], num_warps: int, seed: int) -> None:
        self.program, self.grid, self.num_warps = program, grid, num_warps
        self.crew = Crew(seed)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.products: dict[int, list[Product]] = defaultdict(list)  # by partition
        self.stores: dict[int, list[tuple[Descriptor, list[Any], Shared]]] = defaultdict(list)  # likewise
        self.unfenced: list[Shared] = []
        self.keep: list[Tensor] = []  # allocations stay: addresses name barriers

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        kind = TYPES.get(dtype, dtype)
        data = torch.full(shape, math.nan if kind.is_floating_point else 0, dtype=kind)
        self.keep.append(data)
        return Shared(self, data)

    def landing(self) -> Iterator[Shared]:
        for barrier in self.barriers.values():
            yield from (buffer for buffer, _ in barrier.copies)

    def readable(self, buffer: Shared, who: str) -> None:
        demand(not any(buffer.overlaps(x) for x in self.landing()), f"{who} reads a buffer that a copy has not reached")
        for barrier in self.barriers.values():
            unknown = [x for x, knows in barrier.landed if self.crew.current not in knows]
            demand(not any(buffer.overlaps(x) for x in unknown), f"{who} reads a buffer without a wait for its copy")

    def seen(self, buffer: Shared, who: str) -> None:
        """As `readable`, for units that see stores only past a fence."""
        self.readable(buffer, who)
        demand(not any(buffer.overlaps(x) for x in self.unfenced), f"{who} reads what was stored without a fence since")

    def writable(self, buffer: Shared, who: str) -> None:
        demand(not any(buffer.overlaps(x) for x in self.landing()), f"{who} writes where a copy is under way")
        used = [x for products in self.products.values() for product in products for x in product.buffers]
        used += [x for stores in self.stores.values() for _, _, x in stores]
        demand(not any(buffer.overlaps(x) for x in used), f"{who} overwrites what is still being read")

    # barriers and copies
    def init(self, barrier: Shared, count: int) -> None:
        self.barriers[barrier.key] = Barrier(count, count)

    def fence(self) -> None:
        self.unfenced.clear()
        for barrier in self.barriers.values():
            barrier.fenced = True

    def barrier(self, at: Shared) -> Barrier:
        demand(at.key in self.barriers, "a barrier that was not initialised")
        demand(self.barriers[at.key].fenced, "no fence between the barrier's initialisation and its use")
        return self.barriers[at.key]

    def arrive(self, at: Shared, count: int = 1, pred: Any = True) -> None:
        if pred:
            self.crew.pause()
            barrier = self.barrier(at)
            demand(barrier.lacks >= count, "a barrier is armed again before its phase was waited for")
            barrier.lacks -= count
            if not barrier.copies:  # else it ends as late as it may
                barrier.complete()
            self.crew.wake()

    def expect(self, at: Shared, nbytes: int, pred: Any = True) -> None:
        if pred:
            self.barrier(at).expected += nbytes
            self.arrive(at)

    def copy_in(self, array: Descriptor, coordinates: list[Any], at: Shared, buffer: Shared, pred: Any = True) -> None:
        if not pred:
            return
        self.crew.pause()
        demand(buffer.shape == array.given.block_shape and buffer.data.dtype == array.dtype, "a buffer unlike its box")
        self.writable(buffer, "a copy")
        demand(not any(buffer.overlaps(x) for x in self.unfenced), "a copy overwrites a store without a fence")
        data = torch.zeros(buffer.shape, dtype=buffer.data.dtype)  # what is out of range arrives as zero
        outside, inside = array.box(coordinates)
        data[inside] = array.array[outside]
        buffer.data.fill_(math.nan if buffer.data.is_floating_point() else torch.iinfo(buffer.data.dtype).min)
        self.barrier(at).copies.append((buffer, data))
        self.crew.wake()

    def wait(self, at: Shared, phase: Any, pred: Any = True) -> None:
        if not pred:
            return
        barrier = self.barrier(at)

        def over() -> bool:  # hardware tells phases apart by parity alone
            return barrier.phase % 2 != int(phase) or barrier.complete()

        self.crew.until(over, barrier.missing)
        for _, knows in barrier.landed:
            knows.add(self.crew.current)
        self.crew.wake()

    def copy_out(self, array: Descriptor, coordinates: list[Any], buffer: Shared) -> None:
        demand(min(int(raw(c)) for c in coordinates) >= 0, "a box that is written starts before its array")
        self.seen(buffer, "a store's copy")
        self.stores[self.crew.current].append((array, coordinates, buffer))

    def store_wait(self, pending: int) -> None:
        stores = self.stores[self.crew.current]
        while len(stores) > pending:
            array, coordinates, buffer = stores.pop(0)
            outside, inside = array.box(coordinates)
            array.array[outside] = buffer.data[inside]

    # products
    def multiply(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        product = Product(a, b, acc, bool(use_acc))
        for buffer in product.buffers:
            self.seen(buffer, "a product")
        demand([a.shape[0], b.shape[1]] == acc.shape and a.shape[1] == b.shape[0], "a product of other shapes")
        self.products[self.crew.current].append(product)
        return product if is_async else self.wait_products(0, [product])

    def wait_products(self, outstanding: int, deps: list[Any]) -> Any:
        self.crew.pause()
        products = self.products[self.crew.current]
        while len(products) > outstanding:
            product = products.pop(0)
            result = product.a.data.float() @ product.b.data.float()
            product.result = Value(result + raw(product.acc) if product.use_acc else result)
        for x in deps:
            demand(not isinstance(x, Product) or x.result is not None, "a wait leaves in flight what it hands out")
        found = tuple(x.result if isinstance(x, Product) else x for x in deps)
        return found[0] if len(found) == 1 else found

    def specialize(self, functions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        demand(len(functions) == len(warps) + 1 == len(registers) + 1, "a partition without warps or registers")
        self.crew.run([functools.partial(function, *args) for function, args in functions])

    def finish(self) -> None:
        demand(not any(self.products.values()), "a product is in flight at the end")
        demand(not any(self.stores.values()), "a store is in flight at the end")
        demand(not any(self.landing()), "a copy is in flight at the end")
        demand(not any(barrier.expected for barrier in self.barriers.values()), "a barrier is armed at the end")


def _language(machine: Machine) -> types.SimpleNamespace:
    def scalar(i: int) -> Value:
        return Value(torch.tensor(i, dtype=torch.int32))

    names = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout")
    layouts = dict.fromkeys(names, lambda *a, **k: None)
    return types.SimpleNamespace(
        **layouts,
        float32=gl.float32,
        float16=gl.float16,
        bfloat16=gl.bfloat16,
        int32=gl.int32,
        int64=gl.int64,
        program_id=lambda axis: scalar(machine.program[axis]),
        num_programs=lambda axis: scalar(machine.grid[axis]),
        num_warps=lambda: machine.num_warps,
        static_range=range,
        arange=lambda start, end, layout=None: Value(torch.arange(start, end, dtype=torch.int32)),
        full=values.full,
        zeros=lambda shape, dtype, layout=None: values.full(shape, 0, dtype),
        where=values.where,
        maximum=lambda a, b: Value(torch.fmax(torch.as_tensor(raw(a)), torch.as_tensor(raw(b)))),
        minimum=lambda a, b: Value(torch.fmin(torch.as_tensor(raw(a)), torch.as_tensor(raw(b)))),
        max=lambda x, axis: Value(raw(x).nan_to_num(-math.inf, math.inf, -math.inf).amax(axis)),  # passes over NaN
        sum=lambda x, axis: Value(raw(x).sum(axis)),
        exp2=lambda x: Value(raw(x).exp2()),
        log2=lambda x: Value(raw(x).log2()),
        convert_layout=lambda x, layout: Value(raw(x)),
        load=values.load,
        store=values.store,
        allocate_shared_memory=machine.allocate,
        warp_specialize=machine.specialize,
    )


def simulate(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, maxnreg: int = 255, seed: int = 0, **meta: Any
) -> None:
    """Run every program of a launch, in order; arrays and descriptors are on the CPU. The seed decides whose turn it is.

    Raises:
        Hazard: see above.
    """

    def operand(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return Descriptor(x)
        if isinstance(x, Tensor):
            return Pointer(
                x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,)), 0
            )
        if x is None:
            return None
        return Value(torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else torch.int32))

    given = dict(zip(kernel.arg_names, [operand(x) for x in args])) | meta
    for number, program in enumerate(itertools.product(*(range(n) for n in grid))):
        machine = Machine(program, grid, num_warps, seed + number)
        _python(kernel, machine)(**given)
        machine.finish()


def _python(kernel: Any, machine: Machine) -> Callable[..., Any]:
    """The kernel's function with stand-ins for what it calls."""
    names = types.SimpleNamespace
    stand_ins = {
        id(gl): _language(machine),
        id(hopper.mbarrier): names(
            init=machine.init,
            expect=machine.expect,
            arrive=machine.arrive,
            wait=machine.wait,
            MBarrierLayout=lambda: None,
        ),
        id(hopper.tma): names(store_wait=machine.store_wait),
        id(hopper_tma.copy_in): machine.copy_in,
        id(hopper_tma.copy_out): machine.copy_out,
        id(hopper.fence_async_shared): machine.fence,
        id(hopper.warpgroup_mma): machine.multiply,
        id(hopper.warpgroup_mma_wait): machine.wait_products,
    }
    scopes: dict[int, dict[str, Any]] = {}

    def scope_of(given: dict[str, Any]) -> dict[str, Any]:
        """A module's names; its functions may call those of others."""
        if id(given) in scopes:
            return scopes[id(given)]
        scope = scopes[id(given)] = {}
        for name, value in given.items():
            if isinstance(value, gluon._runtime.GluonJITFunction):
                scope[name] = types.FunctionType(value.fn.__code__, scope_of(value.fn.__globals__), name)
            elif isinstance(value, gl.constexpr):
                scope[name] = value.value
            else:
                scope[name] = stand_ins.get(id(value), value)
        return scope

    return types.FunctionType(kernel.fn.__code__, scope_of(kernel.fn.__globals__), kernel.__name__)
