"""Ops that treat every token alike: where their inputs have the tokens, if the output has them at a given dimension.

Such an op computes the same numbers whatever order the tokens are in, as long as all its inputs agree. What is not known
here mixes tokens, as far as `keep_tiles` is concerned.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import types
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from flexsparse.compile_passes import nested
from flexsparse.compile_passes.graphs import value_of

Wants = dict[Node, int | None]
"""The dimension of an input's tokens; None for an input that must stand in its own order. Others may be either way."""

SDPA = torch._C._nn.scaled_dot_product_attention

# with tensors of any shapes that broadcast
_ELEMENTWISE = """abs add addcdiv addcmul bfloat16 clamp clamp_max clamp_min clone contiguous cos detach div double elu eq erf
exp exp2 expm1 float ge gelu gt half hardswish le leaky_relu lerp log log1p logical_and logical_not logical_or lt masked_fill
maximum minimum mish mul ne neg nan_to_num pow relu rsqrt rsub sigmoid sign silu sin softplus sqrt square sub tanh true_divide
truediv where""".split()  # noqa: SIM905
_FORM = ["to", "type_as"]  # of other arguments only dtype and device count
_LIKE = ["empty_like", "zeros_like", "ones_like"]
_RESHAPES = ["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"]
_REDUCTIONS = ["mean", "sum", "amax", "amin", "std", "var"]
_PIECES = ["chunk", "split", "tensor_split", "unbind"]
_OTHERS = """layer_norm rms_norm linear matmul bmm softmax normalize dropout transpose swapaxes permute movedim expand
view_as_complex view_as_real cat concat stack getitem setitem""".split()  # noqa: SIM905
_NAMES = {*_ELEMENTWISE, *_FORM, *_LIKE, *_RESHAPES, *_REDUCTIONS, *_PIECES, *_OTHERS}
_FUNCTIONS = {
    getattr(space, name): name for name in sorted(_NAMES) for space in (operator, torch, F) if hasattr(space, name)
}
_FUNCTIONS[SDPA] = "sdpa"


def name_of(node: Node) -> str | None:
    """What an op is called here, as a function, operator or method; None where it is not known."""
    if node.op == "call_method":
        return str(node.target) if node.target in _NAMES else None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target) if _hashable(node.target) else None
    return None


def _hashable(x: Any) -> bool:
    return getattr(type(x), "__hash__", None) is not None


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's tensor; of the first one where it has several."""
    value = value_of(node)
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument that may be given either way."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def tensors_of(node: Node) -> list[Node]:
    """Inputs that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]


def written_by(node: Node) -> list[Node]:
    """Tensors that a node writes to, or may write to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return tensors_of(node) if _may_write(node) else []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    module = getattr(node.target, "__module__", None)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return tensors_of(node)
    if module == "_operator":
        in_place = name == "setitem" or (name.startswith("i") and hasattr(operator, name[1:]))
    else:
        in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i") or name == "__setitem__")
    at = _place_of_inplace(node.target) if node.op == "call_function" and _hashable(node.target) else None
    in_place |= at is not None and bool(argument(node, at, "inplace", False))
    found: list[Node] = []
    if in_place and not node.args:
        found += tensors_of(node)
    elif in_place:
        first = node.args[0]
        found += [n for n in (first if isinstance(first, list | tuple) else [first]) if isinstance(n, Node)]
    out = node.kwargs.get("out")
    return found + [n for n in (out if isinstance(out, list | tuple) else [out]) if isinstance(n, Node)]


@functools.lru_cache(None)
def _place_of_inplace(function: Any) -> int | None:
    """Where a function takes ``inplace``."""
    if not isinstance(function, types.FunctionType):
        return None
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def _may_write(node: Node) -> bool:
    """Whether a higher-order operator runs a Triton kernel, or a graph that writes to what it is given."""
    if node.target.name() == "triton_kernel_wrapper_mutation":  # type: ignore[union-attr]
        return True
    owner = node.graph.owning_module
    for sub, _ in () if owner is None else nested.graphs_of(owner, node):
        given = {x for each in sub.graph.nodes if each.op == "placeholder" for x in memory_of(each)}
        if any(not given.isdisjoint(memory_of(x)) for each in sub.graph.nodes for x in written_by(each)):
            return True
    return False


def memory_of(node: Node) -> set[int]:
    """The memory that a node's tensors lie in: example values share it as tensors do, whichever op made a view."""
    tensors = [x for x in tree_leaves(value_of(node)) if isinstance(x, Tensor) and torch._C._has_storage(x)]
    return {x.untyped_storage()._cdata for x in tensors}


def reads_form_only(node: Node, of: Node) -> bool:
    """Whether a node reads nothing of a tensor but sizes, dtype and device."""
    name = name_of(node)
    if node.op == "call_method" and node.target in ("size", "dim", "numel", "stride", "is_contiguous"):
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return name in _LIKE or (name in _FORM and node.args[0] is not of)


def wants(node: Node, dim: int) -> Wants | None:
    """Where inputs have their tokens, if the output has them at ``dim``; None where the op mixes tokens or is not known.

    For an op with several outputs, ``dim`` is that of each.
    """
    name = name_of(node)
    if name is None or (written_by(node) and name != "setitem"):
        return None
    if name in _ELEMENTWISE:
        return _aligned(tensors_of(node), dim, len(shape_of(node)))
    if name in _LIKE:
        return {}
    rule = _RULES.get(name)
    return None if rule is None else rule(node, dim)


def _aligned(inputs: list[Node], dim: int, rank: int) -> Wants:
    """Inputs that broadcast to ``rank`` dimensions."""
    found: Wants = {}
    for x in inputs:
        shape = shape_of(x)
        at = dim - (rank - len(shape))
        if at >= 0 and shape[at] != 1:
            found[x] = at
    return found


def _first(node: Node) -> Any:
    return argument(node, 0, "input")


def _form(node: Node, dim: int) -> Wants | None:
    return {node.args[0]: dim}  # type: ignore[dict-item]


def _normalisation(node: Node, dim: int) -> Wants | None:
    sizes = argument(node, 1, "normalized_shape")
    if not isinstance(sizes, list | tuple) or dim >= len(shape_of(node)) - len(sizes):
        return None
    return _rest_in_order(node, {_first(node): dim})


def _rest_in_order(node: Node, found: Wants) -> Wants:
    return {**dict.fromkeys(tensors_of(node)), **found}


def _linear(node: Node, dim: int) -> Wants | None:
    return None if dim == len(shape_of(node)) - 1 else _rest_in_order(node, {_first(node): dim})


def _matmul(node: Node, dim: int) -> Wants | None:
    rank = len(shape_of(node))
    left, right = node.args[0], argument(node, 1, "other")
    if not isinstance(left, Node) or not isinstance(right, Node) or len(shape_of(left)) != rank != 1:
        return None
    return {left: dim, right: None} if dim == rank - 2 and left is not right else None


def _sdpa(node: Node, dim: int) -> Wants | None:
    """Attention treats queries alike where its mask does; its keys and values stand in an order of their own."""
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
    per_query = mask is not None and len(shape_of(mask)) > 1 and shape_of(mask)[-2] != 1
    if dim != len(shape_of(node)) - 2 or causal or per_query or query in (key, value):
        return None
    if argument(node, 4, "dropout_p", 0.0):
        return None
    return _rest_in_order(node, {query: dim})


def _dropout(node: Node, dim: int) -> Wants | None:
    off = argument(node, 1, "p", 0.5) == 0 or argument(node, 2, "training", True) is False
    return {_first(node): dim} if off else None  # which tokens it drops depends on their order


def _over_one_dim(node: Node, dim: int) -> Wants | None:
    other = argument(node, 1, "dim") if name_of(node) == "softmax" else argument(node, 2, "dim", 1)
    if not isinstance(other, int) or other % len(shape_of(node)) == dim:
        return None
    return {_first(node): dim}


def _reduction(node: Node, dim: int) -> Wants | None:
    x = _first(node)
    rank = len(shape_of(x))
    dims = argument(node, 1, "dim")
    if not isinstance(dims, int | list | tuple) or isinstance(dims, bool):
        return None
    reduced = {d % rank for d in (dims if isinstance(dims, list | tuple) else (dims,))}
    if len(shape_of(node)) == rank:
        return None if dim in reduced else {x: dim}
    left = [d for d in range(rank) if d not in reduced]
    return {x: left[dim]} if len(left) == len(shape_of(node)) else None


def _reshape(node: Node, dim: int) -> Wants | None:
    """Row-major order stays: the tokens' dimension is one that has as many elements before it, and as many itself."""
    x = _first(node)
    before, after = shape_of(x), shape_of(node)
    if any(not isinstance(size, int) for size in (*before, *after)):
        return None
    for at, size in enumerate(before):
        if size == after[dim] and math.prod(before[:at]) == math.prod(after[:dim]):
            return {x: at}
    return None


def _transpose(node: Node, dim: int) -> Wants | None:
    x = _first(node)
    names = ("axis0", "axis1") if name_of(node) == "swapaxes" else ("dim0", "dim1")
    a, b = (argument(node, i + 1, name) for i, name in enumerate(names))
    if not isinstance(a, int) or not isinstance(b, int):
        return None
    a, b = a % len(shape_of(x)), b % len(shape_of(x))
    return {x: {a: b, b: a}.get(dim, dim)}


def _permute(node: Node, dim: int) -> Wants | None:
    dims: Any = node.args[1:] if node.op == "call_method" and len(node.args) > 2 else argument(node, 1, "dims")
    if not isinstance(dims, list | tuple) or any(not isinstance(d, int) for d in dims):
        return None
    return {_first(node): dims[dim] % len(dims)}


def _movedim(node: Node, dim: int) -> Wants | None:
    source, destination = argument(node, 1, "source"), argument(node, 2, "destination")
    if not isinstance(source, int) or not isinstance(destination, int):
        return None
    order = list(range(len(shape_of(node))))
    order.insert(destination % len(order), order.pop(source % len(order)))
    return {_first(node): order[dim]}


def _expand(node: Node, dim: int) -> Wants | None:
    return _aligned([_first(node)], dim, len(shape_of(node)))


def _view_as_complex(node: Node, dim: int) -> Wants | None:
    return {_first(node): dim}


def _view_as_real(node: Node, dim: int) -> Wants | None:
    return None if dim == len(shape_of(node)) - 1 else {_first(node): dim}


def _pieces(node: Node, dim: int) -> Wants | None:
    position = {"unbind": 1}.get(name_of(node) or "", 2)
    along = argument(node, position, "dim", 0)
    x = _first(node)
    if not isinstance(along, int) or not isinstance(x, Node):
        return None
    along %= len(shape_of(x))
    if name_of(node) == "unbind":
        return {x: dim + (along <= dim)}
    return None if along == dim else {x: dim}


def _joined(node: Node, dim: int) -> Wants | None:
    parts, along = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(parts, list | tuple) or not isinstance(along, int):
        return None
    along %= len(shape_of(node))
    if along == dim:
        return None
    at = dim - (along < dim) if name_of(node) == "stack" else dim
    return {part: at for part in parts if isinstance(part, Node)}


def index_dims(index: Any, shape: tuple[Any, ...]) -> list[int | None] | None:
    """For each dimension of ``x[index]`` the one of x that it takes whole; None for others. None: no basic index."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, bool) or not isinstance(item, int | slice | type(None) | EllipsisType) for item in items):
        return None
    taken = sum(isinstance(item, int | slice) for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (len(shape) - taken)
    found: list[int | None] = []
    dim = 0
    for item in items:
        if item is None:
            found.append(None)
            continue
        if isinstance(item, slice):
            whole = item.start in (None, 0) and item.step in (None, 1)
            whole = whole and (item.stop is None or (isinstance(item.stop, int) and item.stop >= shape[dim]))
            found.append(dim if whole else None)
        dim += 1
    return found


def _getitem(node: Node, dim: int) -> Wants | None:
    x, index = node.args
    if not isinstance(x, Node):
        return None
    if isinstance(value_of(x), list | tuple):
        return {x: dim}
    dims = index_dims(index, shape_of(x))
    at = None if dims is None else dims[dim]
    return None if at is None else {x: at}


def _setitem(node: Node, dim: int) -> Wants | None:
    """``x[index] = values``; ``dim`` is x's."""
    x, index, values = node.args
    dims = index_dims(index, shape_of(x))
    if not isinstance(x, Node) or dims is None or dim not in dims:
        return None
    return {x: dim, **(_aligned([values], dims.index(dim), len(dims)) if isinstance(values, Node) else {})}


_RULES: dict[str, Callable[[Node, int], Wants | None]] = {
    **dict.fromkeys(_FORM, _form),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_PIECES, _pieces),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalisation),
    **dict.fromkeys(("softmax", "normalize"), _over_one_dim),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    "linear": _linear,
    "sdpa": _sdpa,
    "dropout": _dropout,
    "permute": _permute,
    "movedim": _movedim,
    "expand": _expand,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
    "getitem": _getitem,
    "setitem": _setitem,
}
