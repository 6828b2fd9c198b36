"""VSA's gates: linear maps of an attention's input hidden states (arXiv 2505.13389, section 2.2).

The coarse output's begins with zero weight and bias, the fine output's (optional) with zero weight and bias 1, so that a
wrapped pretrained model begins as pure fine attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flexsparse.rules import SHELLS, matches, plain_name

NAME = "to_gate_compress"
FINE = "to_gate_fine"
ADDED = "_flexsparse_gates"
"""Where an attention module keeps the names of the gates that `add_gates` gave it: only those are computed, and taken away."""
Q_NAMES = ("to_q", "q_proj", "query", "to_query", "wq", "q")
K_NAMES = ("to_k", "k_proj", "key", "to_key", "wk", "k")
FUSED_NAMES = ("to_qkv", "qkv", "qkv_proj", "in_proj", "wqkv", "c_attn")


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""In which a gate may be computed."""
Sizes = tuple[int, int, nn.Module]
"""Input channels, H * D, and a projection whose weight says device and dtype."""


class Gate(nn.Linear):
    """A linear map with a weight of zero and a bias of ``start``, also where a trainer makes its memory later (`to_empty`).

    Args:
        inputs: channels that it reads.
        outputs: channels that it writes.
        start: its bias.
        dtype: of its weight and bias.
        device: where they are.
    """

    def __init__(self, inputs: int, outputs: int, start: float, dtype: torch.dtype, device: torch.device) -> None:
        self.start = start  # read when the parameters are made
        super().__init__(inputs, outputs, dtype=dtype, device=device)

    def reset_parameters(self) -> None:
        """As at the start: a wrapped pretrained model begins as pure fine attention."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, inputs]`` to ``[B, S, outputs]``; computed in its own dtype where no autocast says another.

        Projections whose weights are stored in few bits take hidden states of any dtype, and so must what stands beside them.
        """
        if x.dtype != self.weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            x = x.to(self.weight.dtype)
        return super().forward(x)


def _linear(module: nn.Module, names: Sequence[str]) -> nn.Linear | None:
    for name in names:
        child = module._modules.get(name)  # not by getattr, which shells around a module hand on to it
        child = getattr(child, "base_layer", child)  # peft wraps linear layers
        if isinstance(child, nn.Linear):
            return child
    return None


def gate_sizes(module: nn.Module) -> Sizes | None:
    """(input channels, H * D, a projection) of a self-attention module's gate; None for another module.

    Self-attention is recognised by its projections: fused qkv, or q and k that read the same number of channels, and no
    attribute that calls it cross-attention.
    """
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim, module.out_proj
    fused = _linear(module, FUSED_NAMES)
    q, k = _linear(module, Q_NAMES), _linear(module, K_NAMES)
    if q is not None and k is not None:
        if getattr(module, "is_cross_attention", False) or q.in_features != k.in_features:
            return None
        return q.in_features, q.out_features, q
    if fused is not None and fused.out_features % 3 == 0:
        return fused.in_features, fused.out_features // 3, fused
    return None


def gate_dtype(model: nn.Module, module: nn.Module, projection: nn.Module) -> torch.dtype | None:
    """In which dtype an attention module's gate is stored and computed; None where nothing says one.

    That of its projection. Where that is stored in what nothing is computed in (4 or 8 bits: bitsandbytes, GGUF,
    `enable_layerwise_casting`), the one that it is computed in, as far as it says so, or else that of its bias, of the rest of
    the module (norms), of most of the model's weights, in this order.
    """
    hooks = getattr(projection, "_diffusers_hook", None)
    casting = None if hooks is None else hooks.get_hook("layerwise_casting")
    named = [getattr(projection, "compute_dtype", None), getattr(casting, "compute_dtype", None)]
    stored = [getattr(projection, name, None) for name in ("weight", "bias")]
    dtypes = [None if one is None else one.dtype for one in stored]
    for dtype in (dtypes[0], *named, dtypes[1]):
        if dtype in DTYPES:
            return cast(torch.dtype, dtype)
    for part in (module, model):
        numbers = dict.fromkeys(DTYPES, 0)
        for parameter in part.parameters():
            if parameter.dtype in numbers:
                numbers[parameter.dtype] += parameter.numel()
        if any(numbers.values()):
            return max(DTYPES, key=numbers.__getitem__)
    return None


def gate_names(model: nn.Module, which: bool | Sequence[str]) -> list[str]:
    """Names of the attention modules that `add_gates` would add a gate to; raises as it does."""
    named = [
        (name, module)
        for name, module in model.named_modules()
        if name and not any(shell in module._modules for shell in SHELLS)  # the module inside has the projections
    ]
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
        if not any(matches(name, pattern) for name, _ in named):
            raise ValueError(f"gates has {pattern!r}, which matches no module of {type(model).__name__}")
    return [name for name, _ in named if any(matches(name, p) for p in patterns)]


def add_gates(model: nn.Module, which: bool | Sequence[str], fine: bool = False) -> list[str]:
    """Add `to_gate_compress` to attention modules; returns their names.

    Args:
        model: changed in place.
        which: True for every module recognised as self-attention, or name patterns (``"blocks.*.attn1"``).
        fine: whether they get a gate on the fine output too, `to_gate_fine`.

    Raises:
        ValueError: a pattern without a match, a chosen module without projections to read sizes from, weights of which none
            has a dtype that something is computed in, no module at all, a module that has one of this name.
    """
    names = gate_names(model, which)
    for name in names:
        for kind in (NAME, FINE)[: 2 if fine else 1]:
            if hasattr(model.get_submodule(name), kind):
                raise ValueError(
                    f"gates: {name} has a {kind} of its own, which its own code may use and a new one would replace: leave it "
                    f"out of gates=, or save its weights, delete it (del model.{name}.{kind}), wrap, and set them again"
                )
    sizes: dict[str, tuple[int, int, torch.dtype, torch.device]] = {}
    for name in names:  # before anything is added
        module = model.get_submodule(name)
        found = gate_sizes(module)
        if found is None:
            raise ValueError(f"gates names {name}, which has no q, k or qkv projection to read a gate's sizes from")
        inputs, outputs, projection = found
        weight = cast(Tensor, projection.weight)
        dtype = gate_dtype(model, module, projection)
        if dtype is None:
            raise ValueError(
                f"gates are on, but {name} stores its projections as {weight.dtype}, which no gate can be computed in, and no "
                f"weight of {type(model).__name__} says another dtype: wrap before weights are stored so"
            )
        sizes[name] = (inputs, outputs, dtype, weight.device)
    for name, (inputs, outputs, dtype, device) in sizes.items():
        module = model.get_submodule(name)
        module.__dict__[ADDED] = (NAME, FINE)[: 2 if fine else 1]
        for kind, start in ((NAME, 0.0), (FINE, 1.0))[: 2 if fine else 1]:
            module.add_module(kind, Gate(inputs, outputs, start, dtype, device))
    return names


def gate_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Linear]]:
    """Every gate of a model: the name of its attention module (`plain_name`), its own, and itself.

    Raises:
        ValueError: something else has taken the place of a gate of ours (an adapter).
    """
    for path, module in model.named_modules():
        name = plain_name(path)
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


def check_synchronised(model: nn.Module, before: int | None) -> int | None:
    """The DistributedDataParallel whose forward runs, if one does, by its id; it averages the gradients of every gate.

    Args:
        model: wrapped with gates.
        before: what an earlier forward found, which is not asked again.

    Raises:
        RuntimeError: it was made before `wrap`, and knows nothing of the gates.
    """
    shell = DistributedDataParallel._active_ddp_module
    if shell is None or id(shell) == before:
        return before
    known = {id(parameter) for parameter in shell._module_parameters}
    for name, kind, gate in gate_modules(model):
        if any(parameter.requires_grad and id(parameter) not in known for parameter in gate.parameters()):
            raise RuntimeError(
                f"the gate {name}.{kind} is no parameter of the DistributedDataParallel around the model, and every rank would "
                "train one of its own: wrap the model before DistributedDataParallel"
            )
    return id(shell)


def of_fsdp(name: str) -> tuple[type, ...]:
    """A class of `torch.distributed.fsdp`, for `isinstance`; none where nobody has imported that, which takes its time."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (getattr(fsdp, name),)


def is_flat(model: nn.Module) -> bool:
    """Whether FSDP1 (`FullyShardedDataParallel`) holds the model's weights in flat tensors of its own."""
    flat = of_fsdp("FlatParameter")
    return any(isinstance(p, flat) or getattr(p, "_fsdp_flattened", False) for p in model.parameters())


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of every gate, for an optimizer group of their own."""
    return [parameter for *_, gate in gate_modules(model) for parameter in gate.parameters()]
