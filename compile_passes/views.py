"""Views of a graph: what a chain of them does to a tensor, found by running it.

Graphs are of aten nodes as traced before autograd. Views are not matched by spelling: `Chain.lays` runs them on a tensor
without memory, whose strides then tell where each element comes from, or, where a view copies, on a tensor of positions; for
the sizes of the trace and for others (`same_everywhere`).
"""

from __future__ import annotations

import contextvars
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from flexsparse.compile_passes.graphs import value_of

aten = torch.ops.aten
VIEWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.permute.default, aten.transpose.int, aten.movedim.int, aten.swapaxes.default, aten.alias.default),
    *(aten.t.default, aten.mT.default, aten.adjoint.default, aten.repeat_interleave.self_int),
    *(aten.numpy_T.default, aten.expand_as.default),
}
COPIES = {aten.clone.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh_copy.default}
CASTS = {
    *(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default),
    torch.ops.prims.convert_element_type.default,  # what Inductor decomposes them into, before the joint graph is seen
}
NAME_NO_SIZE = {
    *(aten.unsqueeze.default, aten.permute.default, aten.transpose.int, aten.movedim.int, aten.swapaxes.default),
    *(aten.t.default, aten.mT.default, aten.adjoint.default, aten.repeat_interleave.self_int, aten.alias.default),
}
"""Views that treat a size like any other."""


def is_op(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of the ops."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def shape_of(node: Node) -> tuple[Any, ...]:
    """Sizes of a node's value, symbolic ones included."""
    return tuple(value_of(node).shape)


_stretch: contextvars.ContextVar[int] = contextvars.ContextVar("stretch", default=1)
MOST_INDICES = 1 << 27


def concrete(argument: Any) -> Any:
    """An argument with numbers for nodes and symbolic sizes: as traced, or with every symbol a multiple of that."""
    if isinstance(argument, Node):
        argument = value_of(argument)
    if isinstance(argument, list | tuple):
        return type(argument)(concrete(item) for item in argument)
    if not isinstance(argument, torch.SymInt):
        return argument
    factor = _stretch.get()
    if factor == 1:
        return argument.node.hint
    shape_env, expression = argument.node.shape_env, argument.node.expr
    hint = getattr(shape_env, "optimization_hint", None) or shape_env.size_hint  # its name before torch 2.13
    return int(expression.xreplace({s: factor * int(hint(s)) for s in expression.free_symbols}))


def same_everywhere(check: Callable[[], bool]) -> bool:
    """Whether a check of layouts holds for the sizes of the trace and, where there are symbols, for others as well.

    Sizes that happen to be equal must not pass for one another.
    """
    if not check():
        return False
    token = _stretch.set(2)
    try:
        return check()
    finally:
        _stretch.reset(token)


def indices(sizes: Any) -> Tensor:
    """Tensor of the given sizes (as `concrete` sees them) whose entries are their own positions.

    Raises:
        TooLarge: it would take too much memory to look.
    """
    numbers = torch.Size([int(concrete(size)) for size in sizes])
    if numbers.numel() > MOST_INDICES:
        raise TooLarge(f"a tensor of sizes {tuple(numbers)} is too large to follow its views")
    return torch.arange(numbers.numel(), dtype=torch.int32, device="cpu").view(numbers)


class TooLarge(ValueError):
    """A layout that cannot be verified in reasonable memory."""


def keeps_precision(node: Node) -> bool:
    """Whether a cast loses nothing that matters: it ends in at least float32, or does not change a float."""
    after, before = value_of(node).dtype, value_of(node.args[0]).dtype
    return after == before or (after.is_floating_point and torch.finfo(after).bits >= 32)


@dataclass
class Chain:
    """Nodes from ``root`` to the end of a chain of views, casts and positive factors.

    Attributes:
        root: what stands above the chain.
        nodes: the chain, from the root down.
        factor: product of the factors.
    """

    root: Node
    nodes: list[Node] = field(default_factory=list)
    factor: float = 1.0

    def layout(self, start: Tensor) -> Tensor:
        """What the chain's views make of a tensor of the root's shape."""
        x = start
        for node in self.nodes:
            if node.target in COPIES:
                x = x.contiguous()  # which a view after it may need
            if node.target not in VIEWS:
                continue
            rest = [concrete(argument) for argument in node.args[1:]]
            if node.target is aten.expand_as.default:
                rest = [torch.empty([int(concrete(size)) for size in shape_of(node)], device="meta")]
            x = node.target(x, *rest, **{key: concrete(value) for key, value in node.kwargs.items()})
        return x

    def lays(self, sizes: Sequence[Any], wanted: Callable[[Tensor], Tensor] = lambda start: start) -> bool:
        """Whether the chain's views order the root's elements as ``wanted`` orders those of a tensor of ``sizes``.

        Raises:
            TooLarge: a view copies, and it would take too much memory to look.
        """

        def check() -> bool:
            by_strides = self._lays(torch.empty([int(concrete(size)) for size in sizes], device="meta"), wanted)
            found = self._lays(indices(self._few(sizes)), wanted) if by_strides is None else by_strides
            return bool(found)

        return same_everywhere(check)

    def _few(self, sizes: Sequence[Any]) -> Sequence[Any]:
        """Sizes that tell as much of the chain as these: smaller ones, where no view names a size."""
        views = [node for node in self.nodes if node.target in VIEWS]
        named = any(node.target not in NAME_NO_SIZE or "output_size" in node.kwargs for node in views)
        if named or len(sizes) != len(shape_of(self.root)):
            return sizes
        return [min(int(concrete(size)), 2 + i) for i, size in enumerate(sizes)]

    def _lays(self, start: Tensor, wanted: Callable[[Tensor], Tensor]) -> bool | None:
        """`lays` at the sizes of one tensor; None where only its elements could tell."""
        root = shape_of(self.root)
        laid = self.layout(start if start.dim() == len(root) else start.view([int(concrete(size)) for size in root]))
        aim = wanted(start)
        if laid.numel() != aim.numel():
            return False
        if not start.is_meta:
            return torch.equal(laid.reshape(aim.shape), aim)
        if any(x.untyped_storage()._cdata != start.untyped_storage()._cdata for x in (laid, aim)):
            return None  # a copy: its strides say nothing of where the elements were
        try:
            laid = laid.view(aim.shape)
        except RuntimeError:  # elements in the order of `aim` could be seen so
            return False
        places = zip(aim.shape, laid.stride(), aim.stride())
        return laid.storage_offset() == aim.storage_offset() and all(n == 1 or a == b for n, a, b in places)


def positive_number(argument: Any) -> float | None:
    """A positive factor that is known now."""
    if isinstance(argument, int | float) and not isinstance(argument, bool) and argument > 0:
        return float(argument)
    return None


def is_whole(node: Any) -> bool:
    """Whether a node is a slice that takes everything, as ``x[:, None]`` makes of a symbolic size."""
    return is_op(node, aten.slice.Tensor) and tuple(node.args[2:]) in ((), (0,), (0, sys.maxsize), (0, sys.maxsize, 1))


def drop_whole_slices(graph: Graph) -> None:
    """Let nobody read a slice that takes everything.

    Inductor makes ``x[:, :, i]`` of an ``index_select``, of which only a symbolic size leaves slices.
    """
    for node in list(graph.nodes):
        if is_whole(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def climb(node: Node, factors: bool = True) -> Chain:
    """Up from a node through views, casts to at least float32, copies, and (where allowed) positive factors."""
    chain, factor = [], 1.0
    while True:
        if is_op(node, *VIEWS, *COPIES) or (is_op(node, *CASTS) and keeps_precision(node)) or is_whole(node):
            chain.append(node)
            node = node.args[0]
            continue
        if factors and is_op(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            first, second = node.args
            swapped = is_op(node, aten.mul.Tensor, aten.mul.Scalar) and not isinstance(first, Node)
            tensor, number = (second, first) if swapped else (first, second)
            value = positive_number(number)
            if value is not None and isinstance(tensor, Node):
                divides = is_op(node, aten.div.Tensor, aten.div.Scalar)
                factor *= 1 / value if divides else value
                chain.append(node)
                node = tensor
                continue
        return Chain(node, chain[::-1], factor)


def in_order(chain: Chain) -> bool:
    """Whether a chain leaves the elements in their order."""
    if not any(node.target in VIEWS for node in chain.nodes):
        return True

    return chain.lays(shape_of(chain.root))


def broadcasts_to(x: Tensor, wanted: Tensor) -> bool:
    try:
        return torch.equal(x.expand(wanted.shape), wanted)
    except RuntimeError:
        return False


def same(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two arguments are the same node, or the same pure computation of the same nodes."""
    if a is b:
        return True
    if isinstance(a, Node) and isinstance(b, Node):
        if a.op == b.op == "get_attr" and a.graph is b.graph:
            return bool(a.target == b.target)
        pure = a.op == b.op == "call_function" and a.target is b.target and depth > 0
        pure = pure and (isinstance(a.target, torch._ops.OpOverload) or a.target is operator.getitem)
        return pure and same(list(a.args), list(b.args), depth - 1) and same(a.kwargs, b.kwargs, depth - 1)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, depth) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], depth) for key in a)
    return type(a) is type(b) and not isinstance(a, Node) and bool(a == b)


def users(node: Node) -> Iterator[Node]:
    """Nodes that read a node, through casts and copies."""
    for user in node.users:
        if is_op(user, *COPIES) or (is_op(user, *CASTS) and keeps_precision(user)):
            yield from users(user)
        else:
            yield user
