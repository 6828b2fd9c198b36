"""Stock FlexAttention on the same tiles, with the options that make it work where its defaults do not.

On Hopper the default forward takes 128 query rows at once, which do not divide tiles of 64 slots: `fwd_BLOCK_M` settles that.
The default backward takes 128 keys at once, and is looked at before any kernel option is: with tiles of 64 slots nothing is
left to choose from, unless `max_autotune` adds candidates. So for training on 64 slots every option autotunes.

Shape letters: B batch, H query heads, P padded tokens in tile order.
"""

from __future__ import annotations

import functools
import math
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.baselines.protocol import Attend, Function, Problem, Unavailable, first_call, need, need_cuda


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to compile FlexAttention.

    Attributes:
        name: for the record.
        kernel: ``kernel_options``.
        max_autotune: whether Inductor tries its list of configurations, within what ``kernel`` fixes.
    """

    name: str
    kernel: dict[str, Any] = field(default_factory=dict)
    max_autotune: bool = False


def options(slots: int, training: bool) -> list[Option]:
    """What is worth trying on tiles of 64 or 128 slots; autotuning the default backward takes minutes and is left out."""
    if slots == 64:
        rows = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}
        autotuned = Option(name="64x64, autotuned", kernel=rows, max_autotune=True)
        if training:
            return [autotuned]
        return [
            autotuned,
            Option(name="64x64, autotuned, TMA", kernel={**rows, "fwd_USE_TMA": True}, max_autotune=True),
            Option(name="64x64, 4 warps, 2 stages", kernel={**rows, "fwd_num_warps": 4, "fwd_num_stages": 2}),
        ]
    plain = [Option(name="defaults"), Option(name="TMA", kernel={"fwd_USE_TMA": True})]
    return plain if training else [*plain, Option(name="autotuned", max_autotune=True)]


def flex_64(problem: Problem, training: bool) -> Attend:
    """FlexAttention on tiles of 64 slots, by the fastest of `options`."""
    return stock(problem, training, "flex_64", 64)


def flex_128(problem: Problem, training: bool) -> Attend:
    """FlexAttention on tiles of 128 slots, by the fastest of `options`."""
    return stock(problem, training, "flex_128", 128)


def stock(problem: Problem, training: bool, name: str, slots: int) -> Attend:
    """FlexAttention under the selection's own block mask."""
    need_cuda(problem, name)
    need(problem, name, slots=(slots,))
    return fastest(problem, training, name, problem.selection.to_block_mask())


def fastest(problem: Problem, training: bool, name: str, mask: BlockMask) -> Attend:
    """FlexAttention under a mask by the option that ran fastest; the note tells which, and how the others did.

    The options are timed on the first problem of a kind (slots, D, dtype, training) in this process; later problems of that
    kind take the one that won.

    Raises:
        Unavailable: none works.
    """
    slots, q = problem.layout.slots, problem.q_BHPD
    kind = (name, slots, q.shape[-1], q.dtype, training)
    won = _won().get(kind)
    if won is not None:
        note = f"{won.name}; the fastest on the first problem of this kind"
        return first_call(name, compiled(problem, mask, won), note, problem, training)
    times: dict[str, float] = {}
    ready: dict[str, tuple[Option, Attend]] = {}
    failures = []
    for option in options(slots, training):
        try:
            attend = first_call(name, compiled(problem, mask, option), option.name, problem, training)
        except Unavailable as error:
            failures.append(str(error)[:300])
            continue
        times[option.name], ready[option.name] = _milliseconds(attend, problem, training), (option, attend)
    if not ready:
        raise Unavailable(f"{name} has no option that works here: {' | '.join(failures)}")
    best = min(times, key=times.__getitem__)
    _won()[kind], attend = ready[best]
    tried = ", ".join(f"{option} {ms:.3f} ms" for option, ms in times.items())
    return replace(attend, note="; ".join([best, f"tried: {tried}", *failures]))


@functools.cache
def _won() -> dict[tuple[Any, ...], Option]:
    """The option that won, for each kind of problem."""
    return {}


def _milliseconds(attend: Attend, problem: Problem, training: bool) -> float:
    """One call by the least of three times for four: forward, or forward and backward."""
    inputs = [x.detach().requires_grad_(training) for x in (problem.q_BHPD, problem.k_BGPD, problem.v_BGPD)]
    least = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(4):
            out = attend(*inputs)
            if training:
                torch.autograd.grad(out, inputs, out)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        least = min(least, (time.perf_counter() - start) * 250)
    return least


def compiled(problem: Problem, mask: BlockMask, option: Option) -> Function:
    """``attend(q, k, v)``: FlexAttention compiled for this problem.

    It must not run uncompiled, where it ignores the lists: one graph or an error, and a code object of its own, as Dynamo
    gives up on one that was compiled too often.
    """
    scale, gqa = problem.scale, problem.gqa
    kernel: Any = dict(option.kernel) or None

    def flex_case(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, kernel_options=kernel)

    fresh: Callable[..., Any] = types.FunctionType(
        flex_case.__code__.replace(co_name=f"flex_{problem.layout.slots}"),
        flex_case.__globals__,
        closure=flex_case.__closure__,
    )
    run = torch.compile(fresh, fullgraph=True, dynamic=False, options={"max_autotune": option.max_autotune})
    return lambda q, k, v: run(q, k, v, mask)
