"""What a baseline is: a function that gets a problem and gives a callable on tensors in tile order.

Shape letters: B batch, H query heads, G KV heads, P padded tokens in tile order, D head dim.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """Why a baseline cannot run a problem here, in one sentence, and how to get it where it can be got."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What every baseline gets: the inputs of our own fine stage.

    Attributes:
        q_BHPD: queries in tile order, contiguous, zero in padding slots.
        k_BGPD: keys, likewise.
        v_BGPD: values, likewise.
        layout: the grid and its tiles.
        selection: the tiles that each row keeps.
        scale: softmax scale.
    """

    q_BHPD: Tensor
    k_BGPD: Tensor
    v_BGPD: Tensor
    layout: fs.TileLayout
    selection: fs.TileSelection
    scale: float

    @property
    def gqa(self) -> bool:
        """Whether there are fewer KV heads than query heads."""
        return self.q_BHPD.shape[1] != self.k_BGPD.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attend:
    """A prepared baseline: ``attend(q, k, v)`` in tile order gives ``[B, H, P, D]`` in tile order, strides as it likes.

    Lists, workspace and compiled code are those of the problem it was prepared for; only the values of q, k, v may
    change. What padding slots of the result hold is not specified.

    Attributes:
        function: the computation; differentiable where it was prepared for training, without gradients where not.
        note: what exactly runs (kernel, options), for the row's record.
    """

    function: Function
    note: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


Prepare = Callable[[Problem, bool], Attend]


def need_cuda(problem: Problem, name: str, *capabilities: tuple[int, int]) -> None:
    """Check that the problem's tensors are on a GPU, of one of the given compute capabilities where there are any.

    Raises:
        Unavailable: they are not.
    """
    device = problem.q_BHPD.device
    if device.type != "cuda":
        raise Unavailable(f"{name} runs on CUDA alone, and the tensors are on {device}")
    found = torch.cuda.get_device_capability(device)
    if capabilities and found not in capabilities:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in capabilities)
        raise Unavailable(f"{name} is for compute capability {wanted}, and this GPU has {found[0]}.{found[1]}")


def need(problem: Problem, name: str, **allowed: tuple[Any, ...]) -> None:
    """Check ``slots``, ``D``, ``dtype``, ``gqa`` or ``scale`` of a problem against the values that a baseline can do.

    Scales are compared to a relative 1e-9: there are two ways to write a square root.

    Raises:
        Unavailable: a value is not among them; the sentence names it and them.
    """
    q = problem.q_BHPD
    found = {
        "slots": problem.layout.slots,
        "D": q.shape[-1],
        "dtype": q.dtype,
        "gqa": problem.gqa,
        "scale": problem.scale,
    }
    for key, values in allowed.items():
        near = key == "scale" and any(math.isclose(problem.scale, value) for value in values)
        if not near and found[key] not in values:
            listed = " or ".join(str(value) for value in values)
            raise Unavailable(f"{name} takes {key} {listed}, and this problem has {key} {found[key]}")


def package(module: str, name: str, download: str) -> Any:
    """A module of a package that is no dependency of ours.

    Args:
        module: full name of the module.
        name: the baseline that needs it.
        download: what `python -m bench.baselines --download` calls it.

    Raises:
        Unavailable: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a binary that does not fit fails in many ways
        raise Unavailable(f"{name} needs {module} ({one_line(error)}): {remedy(download)}") from error


def remedy(download: str) -> str:
    """How to get a baseline's packages."""
    return f"get it with `python -m bench.baselines --download DIR {download}`, unpack it, and give --baseline-dir"


def first_call(name: str, function: Function, note: str, problem: Problem, training: bool) -> Attend:
    """The prepared baseline after one call, forward and where wanted backward: what compiles or tunes itself does so here.

    Raises:
        Unavailable: the call failed.
    """
    inputs = [x.detach().requires_grad_(training) for x in (problem.q_BHPD, problem.k_BGPD, problem.v_BGPD)]
    try:
        with torch.set_grad_enabled(training):
            out = function(*inputs)
            if training:
                torch.autograd.grad(out, inputs, torch.ones_like(out))
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
    except Unavailable:
        raise
    except Exception as error:  # whatever it is, the row says it
        raise Unavailable(f"{name} ({note}) failed at its first call: {one_line(error)}") from error
    if out.shape != problem.q_BHPD.shape:
        raise Unavailable(f"{name} ({note}) gave {tuple(out.shape)} for q of {tuple(problem.q_BHPD.shape)}")
    return Attend(function=function if training else torch.no_grad()(function), note=note)


def one_line(error: BaseException) -> str:
    """An error as one line of at most 300 characters, for a sentence that quotes it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
