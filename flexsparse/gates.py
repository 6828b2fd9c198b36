"""VSA's gates: a zero-initialised linear map of an attention's input hidden states (arXiv 2505.13389, section 2.2).

Zero weight and bias, so that a wrapped pretrained model begins as pure fine attention.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAME = "to_gate_compress"
Q_NAMES = ("to_q", "q_proj", "query", "wq", "q")
K_NAMES = ("to_k", "k_proj", "key", "wk", "k")
FUSED_NAMES = ("to_qkv", "qkv", "qkv_proj", "in_proj", "wqkv", "c_attn")


def _linear(module: nn.Module, names: Sequence[str]) -> nn.Linear | None:
    for name in names:
        child = getattr(module, name, None)
        child = getattr(child, "base_layer", child)  # peft wraps linear layers
        if isinstance(child, nn.Linear):
            return child
    return None


def gate_sizes(module: nn.Module) -> tuple[int, int, Tensor] | None:
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


def add_gates(model: nn.Module, which: bool | Sequence[str]) -> list[str]:
    """Add `to_gate_compress` to attention modules; returns their names.

    Args:
        model: changed in place.
        which: True for every module recognised as self-attention, or name patterns (``"blocks.*.attn1"``).

    Raises:
        ValueError: a pattern without a match, a chosen module without projections to read sizes from, no module at all.
    """
    named = [(name, module) for name, module in model.named_modules() if name]
    if which is True:
        chosen = [(name, module) for name, module in named if gate_sizes(module) is not None]
        if not chosen:
            raise ValueError(
                f"gates is True, but no module of {type(model).__name__} has the projections of self-attention "
                f"({', '.join(Q_NAMES[:2])}, ... or {', '.join(FUSED_NAMES[:2])}, ...): give gates=[name patterns]"
            )
    else:
        patterns = list(which) if not isinstance(which, bool) else []
        for pattern in patterns:
            if not any(fnmatch.fnmatch(name, pattern) for name, _ in named):
                raise ValueError(f"gates has {pattern!r}, which matches no module of {type(model).__name__}")
        chosen = [(name, module) for name, module in named if any(fnmatch.fnmatch(name, p) for p in patterns)]
    for name, module in chosen:
        sizes = gate_sizes(module)
        if sizes is None:
            raise ValueError(f"gates names {name}, which has no q, k or qkv projection to read a gate's sizes from")
        inputs, outputs, like = sizes
        gate = nn.Linear(inputs, outputs, dtype=like.dtype, device=like.device)
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        module.add_module(NAME, gate)
    return [name for name, _ in chosen]


def gate_modules(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every gate of a model, by the name of its attention module."""
    for name, module in model.named_modules():
        gate = module._modules.get(NAME)
        if isinstance(gate, nn.Linear):
            yield name, gate


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of every gate, for an optimizer group of their own."""
    return [parameter for _, gate in gate_modules(model) for parameter in gate.parameters()]


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("saving and loading gates needs safetensors: pip install 'flexsparse[gates]'") from None
    return safetensors


def save_gates(model: nn.Module, path: str | Path) -> None:
    """Write every gate to a safetensors file, with the builder's description in the metadata.

    Raises:
        ValueError: the model has no gates.
    """
    tensors = {
        f"{name}.{NAME}.{key}": value.detach().contiguous()
        for name, gate in gate_modules(model)
        for key, value in gate.state_dict().items()
    }
    if not tensors:
        raise ValueError(f"{type(model).__name__} has no gates: wrap it with gates=True before saving them")
    state = model.__dict__.get("_flexsparse")
    metadata = {
        "format": "flexsparse-gates",
        "builder": json.dumps(repr(state.backend.builder) if state else ""),
    }
    _safetensors().torch.save_file(tensors, str(path), metadata=metadata)


def load_gates(model: nn.Module, path: str | Path, strict: bool = True) -> list[str]:
    """Read gates from a safetensors file, ours or a checkpoint with FastVideo's ``blocks.N.to_gate_compress`` keys.

    Args:
        model: wrapped with gates.
        path: the file; other tensors in it are ignored.
        strict: whether every gate of the model must be in the file, and the other way round.

    Returns:
        Names of the gates that were loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys or shapes that do not fit; nothing is loaded then.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path is {path}: there is no such file; give a safetensors file with gates")
    found: dict[str, Tensor] = {}
    with _safetensors().safe_open(str(path), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if f"{NAME}." in key:
                found[key] = file.get_tensor(key)
    gates = dict(gate_modules(model))
    planned: list[tuple[Tensor, Tensor]] = []
    missing, used = [], set()
    for name, gate in gates.items():
        block = name.rpartition(".")[0]  # FastVideo keeps the gate beside the attention module
        for kind, parameter in gate.named_parameters():
            options = [f"{name}.{NAME}.{kind}", f"{block}.{NAME}.{kind}"]
            key = next((k for k in found if any(k == o or k.endswith("." + o) for o in options)), None)
            if key is None:
                missing.append(options[0])
            elif found[key].shape != parameter.shape:
                raise ValueError(
                    f"{key} in {path} is {tuple(found[key].shape)}, the model's gate {tuple(parameter.shape)}"
                )
            else:
                used.add(key)
                planned.append((parameter, found[key]))
    extra = sorted(set(found) - used)
    if not planned or (strict and (missing or extra)):
        raise ValueError(
            f"{path} and the model do not fit: missing in the file {missing or 'none'}, unknown to the model "
            f"{extra or 'none'}; wrap with gates=True first, or load with strict=False"
        )
    with torch.no_grad():
        for target, value in planned:
            target.copy_(value)
    return sorted({key.rpartition(".")[0] for key in used})
