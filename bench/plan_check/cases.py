"""What is compared: small models with random weights, grids, builders, and how a step runs; plans and real steps of them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.planning import Settings
from flexsparse.planning.models import build, example, find

Grid = tuple[int, int, int]
SEED = 0
TEXT = 48
_WAN = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 2,
    "text_dim": 128,
    "freq_dim": 64,
    "rope_max_seq_len": 128,
    "cross_attn_norm": True,
}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "wan": ("WanTransformer3DModel", _WAN),
        "wan, heads of 128": ("WanTransformer3DModel", {**_WAN, "num_attention_heads": 2, "attention_head_dim": 128}),
        "hunyuanvideo": (
            "HunyuanVideoTransformer3DModel",
            {
                "num_attention_heads": 4,
                "attention_head_dim": 64,
                "num_layers": 1,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "patch_size": 2,
                "text_embed_dim": 128,
                "pooled_projection_dim": 64,
                "rope_axes_dim": (16, 24, 24),
            },
        ),
    }
)
"""Class of diffusers and its configuration, by name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step.

    Attributes:
        model: a name of `MODELS`.
        grid: tokens.
        builder: None for dense attention.
        gates: whether each sparse call has a gate.
        training: forward, backward and AdamW; or a forward.
        checkpointing: whether blocks are computed again.
        compile: as `flexsparse.wrap`.
        dtype: in which the model computes.
    """

    model: str = "wan"
    grid: Grid = (8, 16, 16)
    builder: fs.VSA | fs.BSA | None = None
    gates: bool = False
    training: bool = False
    checkpointing: bool = False
    compile: bool | str = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Of its row."""
        T, H, W = self.grid
        parts = [self.model, f"{T}x{H}x{W}", self.attention, "training" if self.training else "inference"]
        flags = {"gates": self.gates, "checkpointing": self.checkpointing, "compiled": bool(self.compile)}
        parts += [word for word, on in flags.items() if on]
        return ", ".join(parts + ([] if self.dtype == "float32" else [self.dtype]))

    @property
    def attention(self) -> str:
        """Dense, or the method and what it keeps."""
        if self.builder is None:
            return "dense"
        if isinstance(self.builder, fs.BSA):
            return f"BSA {self.builder.keep_queries:g}, {self.builder.kv_density:g}"
        return f"VSA {1 - float(self.builder.sparsity or 0):.3g}"  # type: ignore[arg-type]

    def fields(self) -> dict[str, Any]:
        """Of its row."""
        found = dataclasses.asdict(self)
        del found["builder"]
        return {"case": self.name, **found, "grid": list(self.grid), "attention": self.attention}

    def settings(self, folder: Path, results: Path | None = None, **more: Any) -> Settings:
        """Its plan's settings.

        Args:
            folder: where the model's configuration is written to.
            results: file of the machine; None where only bytes are wanted.
            more: further settings.
        """
        place = folder / self.model.replace(",", "").replace(" ", "-")
        place.mkdir(exist_ok=True)
        kind, config = MODELS[self.model]
        (place / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
        return Settings(
            model=str(place),
            grid=self.grid,
            builder=self.builder or fs.VSA(sparsity=0.875),  # of which the dense half is read
            gates=self.gates,
            text=TEXT,
            training=self.training,
            checkpointing=self.checkpointing,
            compiled=bool(self.compile),
            dtype=self.dtype,
            **({"gpu": "cpu", "results": results} if results else {}),
            **more,
        )


def model_of(case: Case, folder: Path) -> nn.Module:
    """A real model, wrapped unless dense; parameters and gates are random."""
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = case.settings(folder)
        model = build(find(settings.model), settings.torch_dtype)
    if case.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if case.builder is not None:
        fs.wrap(model, case.builder, tile=settings.tile, gates=case.gates, compile=case.compile)
        for gate in fs.gate_parameters(model):
            nn.init.normal_(gate, std=0.02)
    return model.requires_grad_(case.training)


def inputs_of(case: Case, model: nn.Module, grid: Grid | None = None) -> dict[str, Any]:
    """Random inputs of one call, on this grid or another."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    found = example(model, grid or case.grid, 1, dtype, TEXT)
    generator = torch.Generator().manual_seed(SEED)
    for name, x in found.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            found[name] = torch.randn(x.shape, generator=generator).to(x.dtype)
    return found


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer | None:
    """AdamW of a training step; fused, as a plan takes it."""
    return torch.optim.AdamW(model.parameters(), fused=True) if case.training else None


def step_of(
    case: Case, model: nn.Module, inputs: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """One step of a model, as a function; a backward where the case trains."""

    def step() -> None:
        with torch.set_grad_enabled(case.training):
            out = model(**inputs)[0]
        if case.training:
            out.backward(torch.ones_like(out))
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # gradients stay where they are, as their memory is planned

    return step
