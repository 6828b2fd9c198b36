"""How video transformers of diffusers are called in training: a table, by class. Each call is the one of its pipeline.

Letters: B batch, C channels, T frames, H and W rows and columns of latents, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flexsparse.analysis.inputs import kandinsky_scale
from flexsparse.finetune.cosmos import cosmos
from flexsparse.finetune.inputs import Batch, Family, FirstFrame, with_first_frame
from flexsparse.training.errors import RunError

_SECONDS, _SIDE = 8 / 25, 32  # of one LTX latent: frames of its VAE at 25 frames a second, pixels
_GUIDANCE = 6.0  # what HunyuanVideo's distilled guidance is used with
_IMAGE_TOKENS = 729  # HunyuanVideo-1.5's, all zeros for text to video


def _cogvideox_scheduler(config: Any) -> Mapping[str, Any]:
    """What diffusers' `scripts/convert_cogvideox_to_diffusers.py` stores. The 5B models, which have rotary positions, were
    published with an SNR that is not shifted."""
    return {
        "_class_name": "CogVideoXDDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "snr_shift_scale": 1.0 if config["use_rotary_positional_embeddings"] else 3.0,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
    }


def _allegro_scheduler(config: Any) -> Mapping[str, Any]:
    """The defaults of `DDPMScheduler`, with which `train.py` of rhymes-ai/Allegro trains, spelled out."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }


def _wan(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    noisy = batch.noisy
    if config.in_channels > noisy.shape[1]:
        condition, mask = with_first_frame(batch)
        noisy = torch.cat([noisy, mask.repeat(1, WAN_FRAME.mask, 1, 1, 1), condition], dim=1)
    images = {} if batch.image is None else {"encoder_hidden_states_image": batch.image}
    return model(noisy, batch.timestep, batch.text, **images, return_dict=False)[0]


def _hunyuan(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    guidance = torch.full_like(batch.t, 1000 * _GUIDANCE) if config.guidance_embeds else None
    return model(
        hidden_states=batch.noisy,
        timestep=batch.timestep,
        encoder_hidden_states=batch.text,
        encoder_attention_mask=batch.mask,
        pooled_projections=batch.pooled,
        guidance=guidance,
        return_dict=False,
    )[0]


def _without_frame(config: Any, noisy: Tensor) -> Tensor:
    """Text to video, of a model that takes a first frame and its mask: both are zeros after the noisy latents."""
    zeros = noisy.new_zeros(len(noisy), config.in_channels - noisy.shape[1], *noisy.shape[2:])
    return torch.cat([noisy, zeros], dim=1)


def _hunyuan15(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Text to video: the condition, its mask and the image are zeros. Its time's embedding has the dtype of the time."""
    noisy = batch.noisy
    return model(
        hidden_states=_without_frame(config, noisy),
        timestep=batch.timestep.to(noisy.dtype),
        encoder_hidden_states=batch.text,
        encoder_attention_mask=batch.mask,
        encoder_hidden_states_2=batch.text_2,
        encoder_attention_mask_2=batch.mask_2,
        image_embeds=noisy.new_zeros(len(noisy), _IMAGE_TOKENS, config.image_embed_dim),
        return_dict=False,
    )[0]


def _unused_hunyuan15(model: Any) -> tuple[nn.Module, nn.Module]:
    """What the last block makes of the text, which nothing reads."""
    last = model.transformer_blocks[-1]
    return last.attn.to_add_out, last.ff_context


def _ltx(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    *_, frames, height, width = batch.noisy.shape
    out = model(
        hidden_states=batch.noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=batch.text,
        timestep=batch.timestep,
        encoder_attention_mask=batch.mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(_SECONDS, _SIDE, _SIDE),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).unflatten(2, (frames, height, width))


def _mochi(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Its time runs from noise to clean, and so does its velocity."""
    out = model(
        hidden_states=batch.noisy,
        encoder_hidden_states=batch.text,
        timestep=batch.steps - batch.timestep,
        encoder_attention_mask=batch.mask.bool(),
        return_dict=False,
    )[0]
    return -out


def _cogvideox(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Its input has frames before channels."""
    out = model(
        hidden_states=batch.noisy.transpose(1, 2),
        encoder_hidden_states=batch.text,
        timestep=batch.timestep,
        image_rotary_emb=_cogvideox_rotary(config, batch.noisy) if config.use_rotary_positional_embeddings else None,
        return_dict=False,
    )[0]
    return out.transpose(1, 2)


def _cogvideox_rotary(config: Any, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """Positions as the pipeline computes them: those of version 1.0 are scaled to the grid that it was trained on."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, grid = noisy.shape[2], (noisy.shape[3] // config.patch_size, noisy.shape[4] // config.patch_size)
    base = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if config.patch_size_t is None:
        how: dict[str, Any] = {"crops_coords": get_resize_crop_region_for_grid(grid, base[1], base[0])}
    else:
        how = {"crops_coords": None, "grid_type": "slice", "max_size": base}
        frames = -(-frames // config.patch_size_t)
    cos, sin = get_3d_rotary_pos_embed(
        config.attention_head_dim, grid_size=grid, temporal_size=frames, device=noisy.device, **how
    )
    return cos, sin


def _check_cogvideox(config: Any, tokens: int) -> None:
    fixed = not config.get("use_rotary_positional_embeddings") or config.get("use_learned_positional_embeddings")
    wanted = int(config["max_text_seq_length"])
    if fixed and tokens != wanted:
        raise RunError(
            f"--text-tokens {tokens}: --model's table of positions begins after {wanted} text tokens: leave it out"
        )


def _allegro(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    return model(
        hidden_states=batch.noisy,
        encoder_hidden_states=batch.text[:, None],
        timestep=batch.timestep,
        encoder_attention_mask=batch.mask,
        image_rotary_emb=_allegro_rotary(config, batch.noisy),
        return_dict=False,
    )[0]


def _allegro_rotary(config: Any, noisy: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Frequencies along each axis, and each token's position along it, in raster order `[1, S]`."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, grid = noisy.shape[2], (noisy.shape[3] // config.patch_size, noisy.shape[4] // config.patch_size)
    scales = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
    found: Any = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim,
        crops_coords=((0, 0), grid),
        grid_size=grid,
        temporal_size=frames,
        interpolation_scale=scales,
        device=noisy.device,
    )
    positions = torch.cartesian_prod(*(along.long() for along in found[3:])).T[:, None].contiguous()
    return tuple(found[:3]), tuple(positions)


def _easyanimate(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Without a mask of its text, and without T5's text: its pipeline gives one text, of one encoder."""
    return model(batch.noisy, batch.timestep, encoder_hidden_states=batch.text, return_dict=False)[0]


def _unused_easyanimate(model: Any) -> list[nn.Module]:
    """The projection of a text that is not given, and what the last block makes of the text, which nothing reads."""
    last = model.transformer_blocks[-1]
    found = (model.text_proj_t5, last.attn1.to_add_out, last.txt_ff)
    return [module for module in found if module is not None]


def _check_easyanimate(config: Any, tokens: int) -> None:
    if config["out_channels"] > config["in_channels"]:
        raise RunError(
            f"--model takes {config['in_channels']} channels and gives {config['out_channels']}, a variance among them: pass "
            "an EasyAnimate that was trained with flow matching (version 5.1)"
        )


def _kandinsky5(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Channels last. There is no mask of the text: of what was filled up, all that the batch does not need is left out.

    Text to video: where the model takes a first frame and its mask, both are zeros.

    Raises:
        RunError: texts of different lengths.
    """
    least, most = int(batch.lengths.min()), int(batch.lengths.max())
    if least != most:  # the shorter ones would be filled up, as the others happen to be long
        raise RunError(
            f"--micro-batch {len(batch.lengths)}: clips have texts of {least} to {most} tokens, and a {type(model).__name__} "
            "takes no mask of them: pass --micro-batch 1, or texts of one length"
        )
    noisy, text = batch.noisy, batch.text[:, : max(1, most)]
    patch = config.patch_size
    sizes = [size // side for size, side in zip(noisy.shape[2:], patch)]
    video = noisy.movedim(1, -1)
    if config.visual_cond:
        video = torch.cat([video, torch.zeros_like(video), torch.zeros_like(video[..., :1])], dim=-1)
    out = model(
        hidden_states=video,
        encoder_hidden_states=text,
        timestep=batch.timestep,
        pooled_projections=batch.pooled,
        visual_rope_pos=[torch.arange(size, device=noisy.device) for size in sizes],
        text_rope_pos=torch.arange(text.shape[1], device=noisy.device),
        scale_factor=kandinsky_scale(*noisy.shape[3:]),
        return_dict=True,
    ).sample
    return out.movedim(-1, 1)


def _motif(model: nn.Module, config: Any, batch: Batch) -> Tensor:
    """Text to video: no image, and the condition and its mask are zeros."""
    return model(
        hidden_states=_without_frame(config, batch.noisy),
        timestep=batch.timestep,
        encoder_hidden_states=batch.text,
        encoder_attention_mask=batch.mask.bool(),
        return_dict=False,
    )[0]


def _unused_motif(model: Any) -> list[nn.Module]:
    """What an image's embeddings would go through."""
    return [] if model.image_embed_dim is None else [model.image_embedder]


def _check_hunyuan(config: Any, tokens: int) -> None:
    if kind := config.get("image_condition_type"):
        raise RunError(
            f"--model has image_condition_type {kind!r}: its first frame is a clean image, and HunyuanVideo is trained for "
            "text to video here: pass a model of text to video"
        )


def _check_hunyuan15(config: Any, tokens: int) -> None:
    if config.get("task_type") != "t2v" or config.get("use_meanflow"):
        raise RunError(
            f"--model is HunyuanVideo-1.5 with task_type {config.get('task_type')!r} and use_meanflow "
            f"{bool(config.get('use_meanflow'))}: only text to video, undistilled, is trained: pass such a transformer"
        )


def _check_wan(config: Any, tokens: int) -> None:
    if config.get("pos_embed_seq_len") is not None:
        raise RunError(
            "--model has pos_embed_seq_len in its configuration: it is given a first and a last frame, and only a first one is "
            "trained here: pass a model of text to video, or of image to video"
        )
    if config.get("inject_sample_info"):
        raise RunError(
            "--model is SkyReels-V2 with inject_sample_info (diffusion forcing, told a frame rate): pass one without"
        )


WAN_FRAME = FirstFrame(mask=4, of="clip")
WAN = Family(text="text_dim", image="image_dim", velocity=_wan, first_frame=WAN_FRAME, check=_check_wan)
FAMILIES: Mapping[str, Family | Callable[[Mapping[str, Any]], Family]] = MappingProxyType(
    {
        "WanTransformer3DModel": WAN,
        "SkyReelsV2Transformer3DModel": WAN,
        "HunyuanVideoTransformer3DModel": Family(
            text="text_embed_dim",
            pooled="pooled_projection_dim",
            tokens=256,
            velocity=_hunyuan,
            check=_check_hunyuan,
            vae="AutoencoderKLHunyuanVideo",
        ),
        "HunyuanVideo15Transformer3DModel": Family(
            text="text_embed_dim",
            text_2="text_embed_2_dim",
            tokens=1000,
            velocity=_hunyuan15,
            first_frame=FirstFrame(mask=1),
            compile=("regional", "off"),
            unused=_unused_hunyuan15,
            vae="AutoencoderKLHunyuanVideo15",
            check=_check_hunyuan15,
        ),
        "CogVideoXTransformer3DModel": Family(
            text="text_embed_dim",
            tokens="max_text_seq_length",
            velocity=_cogvideox,
            scheduler=_cogvideox_scheduler,
            vae="AutoencoderKLCogVideoX",
            check=_check_cogvideox,
        ),
        "LTXVideoTransformer3DModel": Family(
            text="caption_channels", tokens=128, velocity=_ltx, vae="AutoencoderKLLTXVideo"
        ),
        "MochiTransformer3DModel": Family(
            text="text_embed_dim",
            tokens="max_sequence_length",
            velocity=_mochi,
            vae="AutoencoderKLMochi",
            compile=("off",),
        ),
        "AllegroTransformer3DModel": Family(
            text="caption_channels", velocity=_allegro, scheduler=_allegro_scheduler, vae="AutoencoderKLAllegro"
        ),
        "ChronoEditTransformer3DModel": WAN,
        "CosmosTransformer3DModel": cosmos,
        "EasyAnimateTransformer3DModel": Family(
            text="text_embed_dim",
            tokens=256,
            velocity=_easyanimate,
            vae="AutoencoderKLMagvit",
            unused=_unused_easyanimate,
            check=_check_easyanimate,
        ),
        "Kandinsky5Transformer3DModel": Family(
            text="in_text_dim",
            pooled="in_text_dim2",
            channels=("in_visual_dim", "out_visual_dim"),
            velocity=_kandinsky5,
            vae="AutoencoderKLHunyuanVideo",
        ),
        "MotifVideoTransformer3DModel": Family(
            text="text_embed_dim", velocity=_motif, first_frame=FirstFrame(mask=1), unused=_unused_motif
        ),
    }
)
"""By class; a function where the configuration tells which of several models it is."""


UNTRAINED: Mapping[str, str] = MappingProxyType(
    {
        "WanVACETransformer3DModel": "is steered by a control video that clips here do not bring",
        "LTX2VideoTransformer3DModel": "makes audio with its video, and clips here bring none",
        "Kandinsky6Transformer3DModel": "makes audio with its video, and clips here bring none",
        "WanAnimateTransformer3DModel": "is steered by a pose and a face that clips here do not bring",
        "AnyFlowTransformer3DModel": "learns to go from one time to another, for which there is no objective here",
        "HeliosTransformer3DModel": "continues earlier frames, which clips here do not bring",
        "HunyuanVideoFramepackTransformer3DModel": "continues earlier frames, which clips here do not bring",
    }
)
"""Why a known class is not trained."""


def family_of(kind: type[nn.Module], config: Mapping[str, Any]) -> Family:
    """How a class is called.

    Args:
        kind: the class.
        config: its configuration.

    Raises:
        RunError: it is not in the table, or of its models this one cannot be trained.
    """
    if kind.__name__ not in FAMILIES:
        why = UNTRAINED.get(kind.__name__, "this recipe cannot call")
        raise RunError(
            f"--model is a {kind.__name__}, which {why}: pass one of {', '.join(FAMILIES)}, or give "
            "finetune(..., family=Family(...)) in Python"
        )
    found = FAMILIES[kind.__name__]
    return found if isinstance(found, Family) else found(config)
