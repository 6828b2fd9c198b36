"""Windows as latents of a VAE: shapes, normalisation, and folders that cannot serve."""

import json
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
import diffusers

from bench.study import clips as module
from bench.study.clips import Clips
from bench.study.latents import Encoder
from bench.study.settings import Size
from flexsparse.training.errors import RunError

WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN_MEAN = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 1.0, 0.5, 4.0]}
IMAGE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 4],
    "norm_num_groups": 2,
    "latent_channels": 2,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
COG = {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}


def save(folder: Path, kind: str, **config) -> Path:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(diffusers, kind)(**config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("wan") / "vae", "AutoencoderKLWan", **WAN, **WAN_MEAN)


def test_a_causal_video_vae(wan):
    encoder = Encoder(wan.parent, (3, 2, 4))  # the folder of a pipeline
    assert encoder.pixels == (9, 16, 32) and encoder.channels == 4
    video = torch.rand(2, 3, 9, 16, 32) * 2 - 1
    vae = diffusers.AutoencoderKLWan.from_pretrained(wan)
    mean, std = (torch.tensor(WAN_MEAN[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        wanted = (vae.encode(video).latent_dist.mode() - mean) / std
    found = encoder(video)
    torch.testing.assert_close(found, wanted)
    assert found.shape == (2, 4, 3, 2, 4) and not found.requires_grad and torch.equal(found, encoder(video))


def test_a_vae_of_images_encodes_frame_by_frame(tmp_path):
    encoder = Encoder(save(tmp_path, "AutoencoderKL", **IMAGE), (3, 4, 6))
    assert encoder.pixels == (3, 8, 12) and encoder.channels == 2
    video = torch.rand(2, 3, 3, 8, 12) * 2 - 1
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = [
            [(vae.encode(video[b : b + 1, :, t]).latent_dist.mode()[0] - 0.25) * 0.5 for t in range(3)] for b in (0, 1)
        ]
    torch.testing.assert_close(encoder(video), torch.stack([torch.stack(frames, 1) for frames in wanted]))


def test_a_vae_whose_config_does_not_say_its_ratio(tmp_path):
    encoder = Encoder(save(tmp_path, "AutoencoderKLCogVideoX", **COG, **_cog_blocks(), scaling_factor=2.0), (3, 2, 4))
    assert encoder.pixels == (9, 16, 32) and encoder.channels == 4


def _cog_blocks():
    return {
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "temporal_compression_ratio": 4,
    }


def test_windows_are_latents(wan, monkeypatch, tmp_path):
    def decode(path, name, *, height, width, min_frames):
        assert (height, width) == (26, 51)  # 1.6 times the pixels of a window
        return torch.randint(256, (3, 40, height, width), generator=torch.Generator().manual_seed(0)).byte()

    monkeypatch.setattr(module, "read_frames", decode)
    (tmp_path / "a.mp4").touch()
    size = Size(name="latent", dim=8, depth=1, heads=1, patch=1, frames=3, height=2, width=4, batch=2)
    clips = Clips(data=tmp_path, vae=wan, size=size)
    assert clips.channels == 4 and clips.sources[0]["held_out"] == 9  # a window of pixels
    batch, held_out = clips.batch(0, 1), clips.held_out()
    assert batch.clean.shape == batch.noise.shape == (2, 4, 3, 2, 4)
    assert torch.equal(batch.clean, clips.batch(0, 1).clean) and not batch.clean.requires_grad
    assert len(held_out) == 10 and held_out[0].clean.shape == held_out[0].noise.shape == (1, 4, 3, 2, 4)
    pixels = Clips.__new__(Clips)
    pixels.__dict__.update(clips.__dict__, _encoder=None)
    torch.testing.assert_close(held_out[-1].clean, clips._encoder(pixels.held_out()[-1].clean))
    other = save(tmp_path / "other", "AutoencoderKLWan", **WAN, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert len({clips.digest, Clips(data=tmp_path, vae=other, size=size).digest}) == 2


def test_the_digest_is_of_config_and_weights_not_of_the_place(wan, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in wan.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    first = Encoder(wan, (1, 1, 1)).digest
    assert Encoder(copy, (1, 1, 1)).digest == first
    torch.manual_seed(1)
    diffusers.AutoencoderKLWan(**WAN, **WAN_MEAN).save_pretrained(copy)
    assert Encoder(copy, (1, 1, 1)).digest != first


def test_folders_that_cannot_serve(wan, tmp_path):
    with pytest.raises(RunError, match=r"--vae '.*nowhere' does not exist: pass the folder"):
        Encoder(tmp_path / "nowhere", (1, 1, 1))
    with pytest.raises(RunError, match=r"--vae .*config\.json' is a file"):
        Encoder(wan / "config.json", (1, 1, 1))
    with pytest.raises(RunError, match=r"--vae .* cannot be loaded \(FileNotFoundError"):
        Encoder(tmp_path, (1, 1, 1))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(RunError, match=r"cannot be loaded .*it is a UNet2DModel.*AutoencoderKL\*"):
        Encoder(tmp_path, (1, 1, 1))


def test_a_vae_without_all_its_weights_or_without_normalisation(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, "AutoencoderKL", **IMAGE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scaling_factor": None}))
    with pytest.raises(RunError, match=r"neither a scaling_factor nor latents_mean.*cannot be normalised"):
        Encoder(tmp_path, (1, 2, 2))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(RunError, match=r"its weights lack encoder\.conv_in\.weight"):
        Encoder(tmp_path, (1, 2, 2))


def test_a_vae_that_makes_other_latents_than_it_says(wan, tmp_path):
    for path in wan.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scale_factor_spatial": 16}))
    with pytest.raises(RunError, match=r"gives no latents \(2, 2, 2\) \(\(5, 32, 32\) pixels: latents \(2, 4, 4\)"):
        Encoder(tmp_path, (2, 2, 2))
