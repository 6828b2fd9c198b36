"""VSA's gates: linear maps of an attention's input hidden states (arXiv 2505.13389, section 2.2).

The coarse output's begins with zero weight and bias, the fine output's (optional) with zero weight and bias 1, so that a
wrapped pretrained model begins as pure fine attention.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

NAME = "to_gate_compress"
FINE = "to_gate_fine"
ADDED = "_flexsparse_gates"
"""Where an attention module keeps the names of the gates that `add_gates` gave it: only those are computed, and taken away."""
Q_NAMES = ("to_q", "q_proj", "query", "to_query", "wq", "q")
K_NAMES = ("to_k", "k_proj", "key", "to_key", "wk", "k")
FUSED_NAMES = ("to_qkv", "qkv", "qkv_proj", "in_proj", "wqkv", "c_attn")


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""In which a gate may be computed."""
Sizes = tuple[int, int, Tensor]
"""Input channels, H * D, and a weight for dtype and device."""


class Gate(nn.Linear):
    """A linear map with a weight of zero and a bias of ``start``, also where a trainer makes its memory later (`to_empty`).

    Args:
        inputs: channels that it reads.
        outputs: channels that it writes.
        start: its bias.
        like: a tensor with its dtype and device.
    """

    def __init__(self, inputs: int, outputs: int, start: float, like: Tensor) -> None:
        self.start = start  # read when the parameters are made
        super().__init__(inputs, outputs, dtype=like.dtype, device=like.device)

    def reset_parameters(self) -> None:
        """As at the start: a wrapped pretrained model begins as pure fine attention."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)


def _linear(module: nn.Module, names: Sequence[str]) -> nn.Linear | None:
    for name in names:
        child = getattr(module, name, None)
        child = getattr(child, "base_layer", child)  # peft wraps linear layers
        if isinstance(child, nn.Linear):
            return child
    return None


def gate_sizes(module: nn.Module) -> Sizes | None:
    """(input channels, H * D, a weight for dtype and device) of a self-attention module's gate; None for another module.

    Self-attention is recognised by its projections: fused qkv, or q and k that read the same number of channels, and no
    attribute that calls it cross-attention.
    """
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim, module.out_proj.weight
    fused = _linear(module, FUSED_NAMES)
    q, k = _linear(module, Q_NAMES), _linear(module, K_NAMES)
    if q is not None and k is not None:
        if getattr(module, "is_cross_attention", False) or q.in_features != k.in_features:
            return None
        return q.in_features, q.out_features, q.weight
    if fused is not None and fused.out_features % 3 == 0:
        return fused.in_features, fused.out_features // 3, fused.weight
    return None


def gate_names(model: nn.Module, which: bool | Sequence[str]) -> list[str]:
    """Names of the attention modules that `add_gates` would add a gate to; raises as it does."""
    named = [(name, module) for name, module in model.named_modules() if name]
    if which is True:
        chosen = [name for name, module in named if gate_sizes(module) is not None]
        if not chosen:
            raise ValueError(
                f"gates is True, but no module of {type(model).__name__} has the projections of self-attention "
                f"({', '.join(Q_NAMES[:2])}, ... or {', '.join(FUSED_NAMES[:2])}, ...): give gates=[name patterns]"
            )
        return chosen
    if isinstance(which, str | bool):
        which = [which] if isinstance(which, str) else []
    if not isinstance(which, Iterable) or not all(isinstance(pattern, str) for pattern in which):
        raise TypeError(f"gates is {which!r}: give True, or name patterns of attention modules ('blocks.*.attn1')")
    patterns = list(which)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(name, pattern) for name, _ in named):
            raise ValueError(f"gates has {pattern!r}, which matches no module of {type(model).__name__}")
    return [name for name, _ in named if any(fnmatch.fnmatch(name, p) for p in patterns)]


def add_gates(model: nn.Module, which: bool | Sequence[str], fine: bool = False) -> list[str]:
    """Add `to_gate_compress` to attention modules; returns their names.

    Args:
        model: changed in place.
        which: True for every module recognised as self-attention, or name patterns (``"blocks.*.attn1"``).
        fine: whether they get a gate on the fine output too, `to_gate_fine`.

    Raises:
        ValueError: a pattern without a match, a chosen module without projections to read sizes from or with ones that are
            stored in a dtype that nothing is computed in, no module at all, a module that has one of this name.
    """
    names = gate_names(model, which)
    for name in names:
        for kind in (NAME, FINE)[: 2 if fine else 1]:
            if hasattr(model.get_submodule(name), kind):
                raise ValueError(
                    f"gates: {name} has a {kind} of its own, which its own code may use and a new one would replace: leave it "
                    f"out of gates=, or save its weights, delete it (del model.{name}.{kind}), wrap, and set them again"
                )
    sizes = {name: gate_sizes(model.get_submodule(name)) for name in names}
    for name, found in sizes.items():  # before anything is added
        if found is None:
            raise ValueError(f"gates names {name}, which has no q, k or qkv projection to read a gate's sizes from")
        if found[2].dtype not in DTYPES:
            raise ValueError(
                f"gates are on, but {name} stores its projections as {found[2].dtype}, which no gate can be computed in: wrap "
                "before weights are stored so (enable_layerwise_casting, quantisation)"
            )
    for name in names:
        module, (inputs, outputs, like) = model.get_submodule(name), cast(Sizes, sizes[name])
        module.__dict__[ADDED] = (NAME, FINE)[: 2 if fine else 1]
        for kind, start in ((NAME, 0.0), (FINE, 1.0))[: 2 if fine else 1]:
            module.add_module(kind, Gate(inputs, outputs, start, like))
    return names


def gate_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Linear]]:
    """Every gate of a model: the name of its attention module, its own, and itself.

    Raises:
        ValueError: something else has taken the place of a gate of ours (an adapter).
    """
    for name, module in model.named_modules():
        for kind in (NAME, FINE):
            gate = _trained(module._modules.get(kind))
            if isinstance(gate, nn.Linear):
                yield name, kind, gate
            elif kind in module.__dict__.get(ADDED, ()):
                raise ValueError(
                    f"the gate {name}.{kind} was replaced by {type(gate).__name__}: merge that adapter, or leave gates out of "
                    "its target_modules; to train gates with an adapter, name them in modules_to_save"
                )


def _trained(gate: Any) -> Any:
    """The gate that is computed: under peft's ``modules_to_save`` the active adapter's copy, and not the frozen one."""
    copies = getattr(gate, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return gate
    active = [name for name in gate.active_adapters if name in copies]
    return copies[active[0]] if len(active) == 1 and not gate.disable_adapters else gate.original_module


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of every gate, for an optimizer group of their own."""
    return [parameter for *_, gate in gate_modules(model) for parameter in gate.parameters()]
