"""What a chain of views does: by strides, where nothing copies, else by the places of elements, with the same answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from flexsparse.compile_passes.views import Chain, indices

aten = torch.ops.aten


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], Callable[[Tensor], Tensor]]:
    """Sizes, and a few views of a tensor of these sizes, some of which copy."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    shape, steps = list(sizes), []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(("permute", "reshape", "repeat", "unsqueeze", "squeeze")))
        dim = draw(st.integers(0, len(shape) - 1))
        if kind == "permute":
            order = draw(st.permutations(range(len(shape))))
            steps.append(lambda x, order=order: x.permute(order))
            shape = [shape[i] for i in order]
        elif kind == "reshape" and len(shape) > 1 and dim > 0:
            shape = [*shape[: dim - 1], shape[dim - 1] * shape[dim], *shape[dim + 1 :]]
            steps.append(lambda x, new=tuple(shape): x.reshape(new))
        elif kind == "repeat":
            shape = [*shape[:dim], 2 * shape[dim], *shape[dim + 1 :]]
            steps.append(lambda x, dim=dim: x.repeat_interleave(2, dim))
        elif kind == "unsqueeze":
            shape = [*shape[:dim], 1, *shape[dim:]]
            steps.append(lambda x, dim=dim: x.unsqueeze(dim))
        elif kind == "squeeze" and shape[dim] == 1 and len(shape) > 1:
            del shape[dim]
            steps.append(lambda x, dim=dim: x.squeeze(dim))

    def views(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return sizes, views


def chain_of(sizes: list[int], views: Callable[[Tensor], Tensor], pre_dispatch: bool = True) -> Chain:
    """As a pass finds it in a graph: views that copy are one node before they are dispatched, and several after."""
    x = torch.empty(sizes)
    gm = make_fx(views, pre_dispatch=pre_dispatch)(x)
    first, *nodes, _ = gm.graph.nodes
    first.meta["val"] = x
    return Chain(first, nodes)


@given(chains(), st.permutations(range(4)), st.sampled_from((1, 2)), st.booleans())
def test_strides_tell_what_positions_do(
    chain: tuple[list[int], Callable[[Tensor], Tensor]], order: list[int], repeat: int, pre_dispatch: bool
) -> None:
    sizes, views = chain

    def wanted(x: Tensor) -> Tensor:
        x = x.permute([i for i in order if i < x.dim()])
        return x.repeat_interleave(2, 0) if repeat == 2 else x

    for aim in (wanted, lambda x: x, views):
        found = chain_of(sizes, views, pre_dispatch)
        start = indices(sizes)
        laid = views(start)
        alike = laid.numel() == aim(start).numel() and torch.equal(laid.flatten(), aim(start).flatten())
        assert found.lays(sizes, aim) is alike
        by_strides = found._lays(torch.empty(sizes, device="meta"), aim)
        assert by_strides in (alike, None)


def test_views_that_copy_nothing_are_known_by_strides() -> None:
    chain = chain_of([2, 3, 4], lambda x: x.permute(0, 2, 1).unsqueeze(1).permute(0, 1, 3, 2))
    assert chain._lays(torch.empty(2, 3, 4, device="meta"), lambda x: x) is True
    assert chain._lays(torch.empty(2, 3, 4, device="meta"), lambda x: x.mT) is False


def test_a_size_that_is_named_is_kept() -> None:
    repeated = chain_of([2, 9], lambda x: x.repeat_interleave(2, 1, output_size=18))
    assert repeated.nodes[0].kwargs["output_size"] == 18
    assert repeated.lays([2, 9], lambda x: x.repeat_interleave(2, 1))
    assert not repeated.lays([2, 9], lambda x: x.repeat(1, 2))
