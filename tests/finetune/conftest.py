"""Fine-tuning needs its extra; accelerate keeps state that is global to a process, and every run here is one of its own."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

for package in ("accelerate", "av", "diffusers", "tensorboard"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate() -> Iterator[None]:
    from finetune.tiny import forget_accelerate

    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """Folder of a tiny VAE of Wan."""
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("vae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
        )
    model.save_pretrained(folder)
    return folder
