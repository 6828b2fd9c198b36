"""The model that is trained: read or made, adapted, made sparse; and the VAE that encodes its clips.

Letters: B batch, C channels, T frames, H and W rows and columns.
"""

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.finetune.objectives import model_folder
from flexsparse.finetune.settings import COMPILE, TINY, Options, Schedules, Settings
from flexsparse.training.errors import RunError
from flexsparse.training.weights import check_complete

_HEADS, _HEAD_DIM, _TEXT = 2, 32, 64


def load_model(settings: Settings, *, channels: int, text_dim: int | None, pixels: bool) -> nn.Module:
    """The transformer, float32, on the CPU.

    Args:
        settings: of the run.
        channels: of the clips, or of the VAE's latents.
        text_dim: channels of the clips' text embeddings; None without.
        pixels: whether clips are trained as pixels.

    Raises:
        RunError: not a folder of a diffusers model.
    """
    return _tiny(settings, channels, text_dim, pixels) if settings.model == TINY else _from_folder(settings.model)


def _tiny(settings: Settings, channels: int, text_dim: int | None, pixels: bool) -> nn.Module:
    from diffusers import WanTransformer3DModel

    side = 4 if pixels else 2
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(settings.seed)
        model: Any = WanTransformer3DModel(
            patch_size=(1, side, side),
            num_attention_heads=_HEADS,
            attention_head_dim=_HEAD_DIM,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_dim or _TEXT,
            freq_dim=64,
            ffn_dim=4 * _HEADS * _HEAD_DIM,
            num_layers=2,
            rope_max_seq_len=1024,
        )
    return model


def describe_model(given: str) -> tuple[type[nn.Module], Mapping[str, Any]]:
    """A model's class and its whole configuration, defaults included, without its weights.

    Args:
        given: folder of a model, or of a pipeline.

    Raises:
        RunError: not a folder of a diffusers model.
    """
    import diffusers

    try:
        said = json.loads((model_folder(given) / "config.json").read_text())
        kind = getattr(diffusers, said["_class_name"])
        parameters = inspect.signature(kind.__init__).parameters
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"--model {given!r} is no folder of a diffusers transformer ({' '.join(str(error).split())}): pass a folder with "
            "the config.json that save_pretrained writes, or 'tiny'"
        ) from error
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return kind, {**defaults, **said}


def _from_folder(given: str) -> nn.Module:
    kind: Any = describe_model(given)[0]
    try:
        with _quiet():
            model: nn.Module = kind.from_pretrained(model_folder(given), torch_dtype=torch.float32)
            check_complete("model", given, model)
            return model
    except RunError:
        raise
    except Exception as error:  # whatever a folder of another kind, or a broken file, throws
        raise RunError(
            f"--model {given!r} cannot be read ({' '.join(str(error).split())[:300]}): check the folder"
        ) from error


def check_channels(settings: Settings, takes: int, channels: int, *, pixels: bool) -> None:
    """Raise for clips, or a VAE, of other channels than the model's latents.

    Args:
        settings: of the run.
        takes: channels of the model's latents.
        channels: of the clips, or of the VAE's latents.
        pixels: whether clips are trained as pixels.
    """
    if takes != channels:
        what = "videos as pixels have" if pixels else "the latents have"
        remedy = "pass --vae, or a folder of latents" if pixels else "pass latents of the model's own VAE"
        raise RunError(f"--model {settings.model!r} takes {takes} channels, {what} {channels}: {remedy}")


def config_of(model: nn.Module) -> Any:
    """A diffusers model's configuration, a mapping."""
    return model.config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def prepare_model(model: nn.Module, settings: Settings, options: Options) -> Schedules:
    """Adapt and wrap a model, in place.

    With LoRA, only adapters and gates require gradients, and under bf16 the frozen linear layers are stored as such.

    Returns:
        The schedules that its builder reads.

    Raises:
        RunError: settings that do not fit the model.
    """
    if options.gradient_checkpointing:
        if not getattr(model, "_supports_gradient_checkpointing", False):
            raise RunError(f"--gradient-checkpointing: {type(model).__name__} has none: leave it out")
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if settings.lora_rank:
        _add_lora(model, settings)
    schedules = settings.schedules()
    if settings.method == "vsa":
        builder: Any = fs.VSA(sparsity=schedules.tiles or settings.sparsity)
    else:
        builder = fs.BSA(
            keep_queries=schedules.queries or settings.keep_queries, kv_density=schedules.tiles or 1 - settings.sparsity
        )
    try:
        with warnings.catch_warnings():
            if settings.gates_from is not None:  # loaded below
                warnings.filterwarnings("ignore", message=".*tensors of gates")
            fs.wrap(
                model,
                builder,
                tile=settings.tile,
                gates=settings.gates and settings.method == "vsa",
                compile=COMPILE[options.compile],
                dense_layers=settings.dense_layers,
                **options.wrap,
            )
    except ValueError as error:
        raise RunError(f"--model {settings.model!r}: {' '.join(str(error).split())}") from error
    if settings.gates_from is not None:
        try:
            fs.load_gates(model, settings.gates_from)
        except (OSError, ValueError) as error:
            raise RunError(f"--gates-from {settings.gates_from!r}: {' '.join(str(error).split())}") from error
    if settings.lora_rank and settings.bf16:
        _store_frozen_low(model)
    return schedules


def _add_lora(model: nn.Module, settings: Settings) -> None:
    from peft import LoraConfig

    rank = settings.lora_rank
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            for target in settings.lora_targets:  # peft passes over those that name nothing beside one that does
                if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
                    raise ValueError(f"no module of the model is called {target}; pass names of its linear layers")
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(settings.lora_targets))
            model.add_adapter(config)  # type: ignore[operator]  # freezes everything else
        except ValueError as error:
            raise RunError(
                f"--lora-targets {','.join(settings.lora_targets)!r}: {' '.join(str(error).split())[:300]}"
            ) from error


def _store_frozen_low(model: nn.Module) -> None:
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in kept for part in name.split(".")):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


class Encoder:
    """Encodes videos `[B, 3, T, H, W]` in [-1, 1] to normalised latents, with a Wan VAE in float32.

    Args:
        settings: of the run, with a `vae`.

    Raises:
        RunError: not a folder of such a VAE, or a window that it cannot encode.
    """

    def __init__(self, settings: Settings) -> None:
        from diffusers import AutoencoderKLWan

        given = str(settings.vae)
        folder = Path(given) / "vae" if (Path(given) / "vae").is_dir() else Path(given)
        try:
            json.loads((folder / "config.json").read_text())  # a name of no folder would be looked for on the internet
            self.vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)
        except Exception as error:  # whatever a folder of another kind, or a broken file, throws
            raise RunError(
                f"--vae {given!r} is no folder of an AutoencoderKLWan ({' '.join(str(error).split())[:200]}): pass the vae "
                "folder of a Wan pipeline"
            ) from error
        config = self.vae.config
        self.channels = int(config["z_dim"])
        every, side = int(config["scale_factor_temporal"]), int(config["scale_factor_spatial"])
        if (settings.frames - 1) % every:
            raise RunError(f"--frames {settings.frames}: --vae takes {every} * n + 1 frames: pass such a number")
        for name in ("height", "width"):
            if getattr(settings, name) % side:
                raise RunError(f"--{name} {getattr(settings, name)}: --vae takes multiples of {side}: pass one")

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """float32 `[B, 3, T, H, W]` -> float32 `[B, C, ...]`, the mode of the VAE's distribution."""
        self.vae.to(video.device)
        latents = self.vae.encode(video).latent_dist.mode()
        mean, std = (
            torch.tensor(self.vae.config[name], device=video.device).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) / std

    def first_frame(self, video: Tensor) -> Tensor:
        """Latents of a video of which only the first frame is seen, and the others are 0 (grey), as pipelines encode them."""
        seen = torch.zeros_like(video)
        seen[:, :, :1] = video[:, :, :1]
        return self(seen)
