"""Keeps Inductor from fusions that it miscompiles (on a CPU), or cannot compile (on a GPU, with symbolic sizes).

In torch up to 2.13, fusing the outer loops of a reduction and its consumer replaces the buffer between them by one row's
worth of local memory, also where vectorisation works on 16 rows at a time: 15 of them are overwritten, and the result is
wrong without a word (pytorch issue 185702; its fix, PR 185855, came with 2.14). It struck the gradient of a LayerNorm
after a patch convolution, as soon as a gate made four linear maps read the normalised tokens instead of three.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.choices import InductorChoices
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V
from torch.fx import Graph

import flexsparse
from flexsparse import compile_passes, masks


class GuardedChoices(InductorChoices):
    """Inductor's own choices, less the vertical fusions of outer loops on CPU."""

    @staticmethod
    def can_fuse_vertical(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        """Refuse what only outer loop fusion could fuse."""
        device = node1.get_device()
        if device is not None and device.type == "cpu":
            backend = scheduler.get_backend(device)
            outer = getattr(backend, "can_fuse_vertical_outer_loop", None)
            if outer is not None and outer(node1, node2):
                return False
        return InductorChoices.can_fuse_vertical(scheduler, node1, node2, shared_data_score)


def source_files() -> list[Path]:
    """This package's sources; from an editable install, its sub-packages lie elsewhere."""
    roots = [Path(root) for package in (flexsparse, compile_passes, masks) for root in package.__path__]
    return sorted({path for root in roots for path in root.rglob("*.py")})


@functools.cache
def sources_hash() -> str:
    """Hash of this package's sources."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in source_files())).hexdigest()


class CacheTag(CustomGraphPass):
    """Does nothing to a graph; its uuid enters the key under which the compiled graph is cached.

    Otherwise that key holds neither the choices above nor what the fake kernels of our ops say, which compiled code does:
    another version's code would be served, and stop at shapes that are no longer made.
    """

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner

    def __call__(self, graph: Graph) -> None:
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> Any:
        inner = self.inner.uuid() if isinstance(self.inner, CustomGraphPass) else None
        if self.inner is not None and inner is None:
            return None  # a pass without an identity: nothing may be cached
        return f"{sources_hash()}{inner or ''}"


class InOrder(CustomGraphPass):
    """Several passes in the place of one."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        parts = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in parts else "".join(map(str, parts))  # None: nothing may be cached


def compile_guarded(
    gm: torch.fx.GraphModule, example_inputs: list[Any], config: dict[str, Any], joint: CustomGraphPass | None = None
) -> Any:
    """Inductor's ``compile_fx`` under the guard, forward and backward (which is compiled later) alike.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        config: Inductor's settings for this graph.
        joint: a pass over the joint graph of forward and backward (the forward alone in inference), before any other.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    choices = GuardedChoices() if torch.__version__ < "2.14" else InductorChoices()
    key = "post_grad_custom_post_pass"
    config = {**config, key: CacheTag(config.get(key, getattr(torch._inductor.config, key)))}
    if joint is not None:
        before = config.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
        others = before if isinstance(before, list | tuple) else [] if before is None else [before]
        config["joint_custom_pre_pass"] = InOrder([joint, *others])

    if _symbolic(example_inputs):
        # mixing reductions of two orders, Inductor cannot split sizes of text and video together: `CantSplit` in gradients of
        # norms of q and k, from some millions of numbers on
        config.setdefault("triton.mix_order_reduction", False)

    def inner_compile(*args: Any, **kwargs: Any) -> Any:
        with V.set_choices_handler(choices), _symbolic_strides():
            return compile_fx_inner(*args, **kwargs)

    return compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=config)


def _symbolic(inputs: Sequence[Any]) -> bool:
    """Whether a graph's inputs have symbolic sizes, or are such."""
    sizes = (x.shape if isinstance(x, Tensor) else (x,) for x in inputs)
    return any(isinstance(size, torch.SymInt) for each in sizes for size in each)


@contextmanager
def _symbolic_strides() -> Iterator[None]:
    """What Inductor says of the strides of what forward saves stays symbolic.

    torch 2.13 puts in the first input's numbers, and backward takes those where Inductor chose other strides than were traced
    (an attention of one head, as a rank may have): it then refuses every other resolution.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None:
        yield
        return
    before, context.fakify_first_call = context.fakify_first_call, True
    try:
        yield
    finally:
        context.fakify_first_call = before


def compile_eagerly(gm: torch.fx.GraphModule, example_inputs: list[Any], joint: CustomGraphPass | None = None) -> Any:
    """As `compile_guarded`, without code generation: the graph's ops run one by one."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def run(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    def inference(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if joint is not None:
            joint(graph.graph)
        return run(graph, inputs)

    def both(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        if joint is not None:
            joint(graph.graph)
        return graph

    compiler = aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=inference,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    with config.patch(joint_custom_pass=both):
        return compiler(gm, example_inputs)
