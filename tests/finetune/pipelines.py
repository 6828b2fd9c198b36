"""What diffusers' own pipelines give to their transformers: one call of each, recorded."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 5  # text tokens that are given, of 8
PARTS = ("vae", "guider", "safety_checker")


def masked(tokens: int) -> Tensor:
    """A mask `[1, tokens]` of `LENGTH` tokens."""
    return (torch.arange(tokens) < LENGTH).long()[None]


def text(tokens: int, width: int, length: int = LENGTH) -> Tensor:
    """Random embeddings, zero after their length, as the recipe fills them up."""
    found = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(width))
    found[:, length:] = 0
    return found


class Recorder:
    """Records the arguments of a model's calls, by name; those that are None, and how it returns, are left out."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        self.outputs: list[Tensor] = []
        forward = model.forward
        signature = inspect.signature(forward)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            told = {n: v for n, v in bound.items() if v is not None and n not in ("return_dict", "attention_kwargs")}
            self.calls.append({n: v.clone() if isinstance(v, Tensor) else v for n, v in told.items()})
            found = forward(*args, **kwargs)
            self.outputs.append(found[0].detach())
            return found

        model.forward = recorded  # type: ignore[method-assign]


@dataclass
class Step:
    """A pipeline's first step: the latents before and after it, and its scheduler."""

    before: Tensor
    after: Tensor
    scheduler: Any


def pipeline_step(
    name: str, model: nn.Module, latents: Tensor, size: tuple[int, int, int], given: dict[str, Any]
) -> Step:
    """Runs a pipeline.

    Args:
        name: its class.
        model: its transformer.
        latents: noise, as the pipeline takes it.
        size: frames, rows and columns, in pixels.
        given: embeddings and settings; those named in `PARTS` are parts of the pipeline.

    Returns:
        Its first step.
    """
    import diffusers

    kind = getattr(diffusers, name)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    if name == "AllegroPipeline":
        scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    elif name == "MochiPipeline":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    elif name == "CosmosTextToWorldPipeline":
        scheduler = diffusers.EDMEulerScheduler(sigma_max=1.5)  # at 80, the published one, hardly any signal is left
    elif name == "Cosmos2VideoToWorldPipeline":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    elif name == "CogVideoXPipeline":
        scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    parts = {p.name: None for p in parameters if p.default is inspect.Parameter.empty}
    parts |= {"transformer": model, "scheduler": scheduler} | {n: given.pop(n) for n in PARTS if n in given}
    frames, height, width = size
    pipe = kind(**parts)
    steps, step = [], scheduler.step

    def recorded(prediction: Tensor, t: Tensor, before: Tensor, *args: Any, **kwargs: Any) -> Any:
        start = before.clone()  # Kandinsky 5 writes into its latents
        found = step(prediction, t, before, *args, **kwargs)
        steps.append(Step(before=start, after=found[0], scheduler=scheduler))
        return found

    scheduler.step = recorded
    pipe.set_progress_bar_config(disable=True)
    pipe(num_frames=frames, height=height, width=width, latents=latents, output_type="latent", **given)
    return steps[0]


class Vae(SimpleNamespace):
    """The numbers that a pipeline reads of its VAE."""


class SafetyChecker:
    """Cosmos pipelines have one, from a package of its own; latents and embeddings are not looked at."""

    def to(self, device: str) -> None:
        """Nothing to move."""
