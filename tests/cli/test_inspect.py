"""`flexsparse inspect` as a user meets it: a page, numbers, one-line errors."""

import base64
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("diffusers")
pytest.importorskip("av")
from models.zoo import ZOO
from typer.testing import CliRunner

import flexsparse as fs
from flexsparse.analysis import sources
from flexsparse.cli.app import app
from flexsparse.training.video import default_source, read_frames

SMALL = ("--grid", "2,4,6", "--tile", "1,2,3", "--sample", "2", "--text-tokens", "4")


def _invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def _data(html: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def _json(*arguments: str) -> dict[str, Any]:
    result = _invoke("--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _error(*arguments: str) -> str:
    result = _invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HunyuanVideo and a VAE for it, as a pipeline keeps them."""
    import diffusers

    path = tmp_path_factory.mktemp("pipeline")
    ZOO["hunyuan"].model().save_pretrained(path / "transformer")
    torch.manual_seed(0)
    vae = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    statistics = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 0.5, 3.0]}
    diffusers.AutoencoderKLWan(**vae, **statistics).save_pretrained(path / "vae")
    return path


def test_help_names_the_options():
    output = _invoke("--help").output
    for option in (
        "model",
        "video",
        "vae",
        "out",
        "json",
        "method",
        "grid",
        "tile",
        "layers",
        "heads",
        "sample",
        "gates",
    ):
        assert f"--{option}" in output
    assert "inspect" in CliRunner().invoke(app, ["--help"]).output


def test_page_of_a_tiny_model_on_the_sample_clip(tmp_path):
    from PIL import Image

    result = _invoke(*SMALL, "--out", str(tmp_path / "page.html"), "--layers", "2", "--heads", "3,0")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'page.html'}: layers: 1, heads: 2, query tiles: 8\n"
    data = _data((tmp_path / "page.html").read_text())
    assert (data["grid"], data["tile"], data["tiles"]) == ([2, 4, 6], [1, 2, 3], [2, 2, 2])
    assert [(layer["index"], layer["heads"]) for layer in data["layers"]] == [(2, [3, 0])]
    assert data["builder"] == "VSA(sparsity=0.875)" and "Blender Foundation" in data["credit"]
    assert any("random" in note for note in data["notes"]) and any("No VAE" in note for note in data["notes"])
    assert len(data["calls"]) == 6 and len(data["frames"]) == 2
    clip = read_frames(default_source().path, "clip", height=64, width=96, min_frames=1)
    for frame, shown in zip(data["frames"], (clip[:, 0], clip[:, 4])):
        kind, _, text = frame.partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(text)))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        right, wrong = ((pixels - other).abs().mean() for other in (shown, clip[:, 100]))
        assert kind == "data:image/jpeg;base64" and right < 8 and right < wrong / 2


def test_json_holds_the_measures_and_writes_no_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vsa, bsa = _json(*SMALL, "--top-k", "3"), _json(*SMALL, "--method", "bsa", "--keep-queries", "0.4")
    assert list(tmp_path.iterdir()) == []
    assert "frames" not in vsa and "lists" not in vsa["layers"][0]
    assert [layer["density"] for layer in vsa["layers"]] == [[0.375] * 4] * 3
    assert len(vsa["layers"][0]["recall"][0]) == 2 and 0 < vsa["layers"][0]["recall"][0][0] < 1
    assert vsa["layers"][0]["computed"] == [1.0] * 4 and 0.4 <= bsa["layers"][0]["computed"][0] < 0.7
    assert _json(*SMALL, "--top-k", "3") == vsa and _json(*SMALL, "--top-k", "3", "--seed", "1") != vsa


def test_a_pipelines_folder_its_vae_and_bfloat16(folder):
    data = _json(*SMALL, "--model", str(folder), "--vae", str(folder), "--top-k", "2")
    assert data["model"] == "HunyuanVideoTransformer3DModel" and data["text"] == [0, 4]
    assert any("AutoencoderKLWan" in note for note in data["notes"])
    pixels = _json(*SMALL, "--model", str(folder / "transformer"), "--top-k", "2")
    assert pixels["layers"] != data["layers"]
    low = _json(*SMALL, "--model", str(folder), "--dtype", "bfloat16", "--top-k", "8")
    assert low["layers"][0]["recall"] == [[1.0, 1.0], [1.0, 1.0]]


def test_latents_of_a_vae_are_normalised(folder):
    import diffusers

    clip = sources.load_clip(None, (2, 4, 6), (1, 1, 1), 4, str(folder))
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    frames = read_frames(default_source().path, "clip", height=32, width=48, min_frames=1)[:, :5]
    with torch.no_grad():
        raw = vae.encode(frames[None].float() / 127.5 - 1).latent_dist.mode()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in ([0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 3.0]))
    torch.testing.assert_close(clip.latents, (raw - mean) / std)
    assert clip.shown.shape == (3, 2, 32, 48) and torch.equal(clip.shown, frames[:, ::4])


@pytest.mark.filterwarnings("error:.*tensors of gates")
def test_gates_of_a_file_are_loaded(tmp_path):
    model = fs.wrap(sources.load_model("tiny", torch.float32, 0), fs.VSA(sparsity=0.5), gates=True, compile=False)
    with torch.no_grad():
        for parameter in fs.gate_parameters(model):
            parameter.fill_(0.3)
    fs.save_gates(model, tmp_path / "gates.safetensors")
    plain, gated = _json(*SMALL), _json(*SMALL, "--gates", str(tmp_path / "gates.safetensors"))
    assert plain["layers"][0] == gated["layers"][0] and plain["layers"][1] != gated["layers"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "nowhere.mp4"], "--video 'nowhere.mp4' does not exist: check the path"),
        (["--video", "notes.txt"], "--video 'notes.txt' cannot be decoded"),
        (["--grid", "80,2,2"], "and a grid of 80 needs 317: pass a longer clip, or --grid "),
        (["--model", "nowhere"], "--model 'nowhere' does not exist: pass the folder of a diffusers model, or 'tiny'"),
        (["--model", "."], "--model '.' cannot be loaded (FileNotFoundError"),
        (["--vae", "nowhere"], "--vae 'nowhere' does not exist: pass the folder of a diffusers model\n"),
        (["--gates", "notes.txt"], "--gates 'notes.txt' cannot be loaded"),
        (
            [*SMALL, "--layers", "3"],
            "layers has 3, but WanTransformer3DModel has 3 sparse calls: give numbers from 0 to 2",
        ),
        ([*SMALL, "--heads", "4"], "heads has 4, but blocks.0.attn1 has 4 heads: give numbers from 0 to 3"),
        (["--layers", "-1"], "--layers '-1' is not understood: pass whole numbers of at least 0, separated by commas"),
        (["--grid", "4,4"], "--grid '4,4' is not understood: pass 3 whole numbers of at least 1"),
        (["--tile", "4,0,4"], "--tile '4,0,4' is not understood"),
        (["--method", "flash"], "--method 'flash' is unknown: pass vsa or bsa"),
        (["--sparsity", "1"], "--sparsity 1.0 is outside [0, 1)"),
        (["--top-k", "3", "--method", "bsa"], "--top-k 3: pass at least 1, with --method vsa"),
        ([*SMALL, "--top-k", "17"], "VSA top_k is 17, but grid (2, 4, 6) has 8 tiles"),
        (["--method", "bsa", "--keep-queries", "0"], "--keep-queries 0.0 is outside (0, 1]"),
        (["--keep-queries", "0.4"], "--keep-queries is 0.4, but --method is vsa, which keeps all queries"),
        (["--time", "2"], "--time 2.0 is outside [0, 1]"),
        (["--sample", "0"], "--sample 0 is too small: pass at least 1"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown: pass float32, bfloat16, float16"),
        (["--device", "abacus"], "--device 'abacus' is unknown: pass cpu or cuda"),
        (["--seed", str(10**30)], "is negative or too large: pass a number from 0"),
        (["--model", ""], "--model '' is empty: pass a path"),
        (["--vae", "v" * 256], "--vae 'vvv"),
        (["--out", "o" * 256], "has names of more than 255 bytes: pass a shorter path"),
        (["--out", "."], "--out '.' is a folder or in one that does not exist: pass the path of a file"),
        (["--out", "a/b.html"], "--out 'a/b.html' is a folder or in one that does not exist"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no video")
    assert message in _error(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"], "nothing is written"


def test_models_that_are_no_video_transformers(tmp_path):
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    unet.save_pretrained(tmp_path / "unet")
    assert "UNet2DModel has no patch size in its configuration" in _error("--model", str(tmp_path / "unet"))
    image = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    image.save_pretrained(tmp_path / "image")
    assert "FluxTransformer2DModel" in _error(*SMALL, "--model", str(tmp_path / "image"))
    (tmp_path / "image" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    assert "cannot be loaded" in _error("--model", str(tmp_path / "image"))


@pytest.mark.parametrize(("package", "extras"), [("diffusers", "demo,diffusers"), ("av", "demo"), ("PIL", "demo")])
def test_a_missing_package_is_one_line(monkeypatch, package, extras):
    monkeypatch.setitem(sys.modules, package, None)
    expected = f"error: the package '{package}' is missing: run `pip install 'flexsparse[{extras}]'`\n"
    assert _error() == expected
