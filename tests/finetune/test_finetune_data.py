"""Clips, samples and how models are called: order, windows, latents, text, a VAE."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from models.zoo import ZOO
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.tiny import settings, tuned, write_video
from flexsparse.finetune.clips import digest, find_clips
from flexsparse.finetune.families import FAMILIES, WAN, family_of
from flexsparse.finetune.inputs import collate, takes_of
from flexsparse.finetune.model import Encoder, check_channels, describe_model, load_model
from flexsparse.finetune.samples import Samples
from flexsparse.training.errors import RunError


def _latents(folder, count=3, shape=(4, 2, 8, 8), **others):
    folder.mkdir(exist_ok=True)
    for index in range(count):
        tensors = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(index)), **others}
        save_file(tensors, str(folder / f"{index}.safetensors"))
    return folder


def _samples(folder, **others) -> Samples:
    told = settings(data=str(folder), **others)
    return Samples(told, find_clips(told))


def test_every_clip_once_in_an_epoch_in_another_order_each_time(tmp_path):
    samples = _samples(_latents(tmp_path, 6))
    firsts = [float(samples.sample(number).clean.flatten()[0]) for number in range(15)]
    epochs = [firsts[start : start + 5] for start in (0, 5, 10)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1 and len(set(firsts)) == 5
    assert len({tuple(epoch) for epoch in epochs}) > 1
    held_out = samples.held_out()
    assert len(held_out) == 1 and float(held_out[0].clean.flatten()[0]) not in firsts


def test_a_sample_depends_on_its_number_alone(tmp_path):
    data = write_video(tmp_path / "a.mp4", frames=20).parent
    one, other = _samples(data), _samples(data)
    for number in (7, 0, 3):
        a, b = one.sample(number), other.sample(number)
        assert torch.equal(a.clean, b.clean) and a.number == b.number == number
        assert torch.equal(torch.randn(9, generator=a.random), torch.randn(9, generator=b.random))
    assert not torch.equal(one.sample(1).clean, one.sample(2).clean)
    ahead = [sample.clean for sample, _ in zip(one.ahead(iter(range(4))), range(4))]
    assert all(torch.equal(clean, other.sample(number).clean) for number, clean in enumerate(ahead))


def test_a_single_video_holds_out_its_end(tmp_path):
    data = write_video(tmp_path / "a.mp4", frames=20).parent
    samples = _samples(data)
    assert samples.train == find_clips(settings(data=str(data)))
    assert samples._of_one == 4 and samples._held_out[0].video.shape[1] == 20
    assert samples.sample(0).clean.shape == samples.held_out()[0].clean.shape == (3, 4, 32, 32)
    assert -1 <= samples.sample(0).clean.min() < samples.sample(0).clean.max() <= 1
    used = samples._held_out[0].video.float() / 127.5 - 1
    assert torch.equal(samples.held_out()[0].clean, used[:, -4:, 2:34, 2:34]), "the centre of the last frames"


def test_training_never_sees_the_held_out_frames(tmp_path):
    samples = _samples(write_video(tmp_path / "a.mp4", frames=12).parent)
    samples._held_out[0].video[:, -4:] = 255  # the clip is kept in memory once
    seen = [samples.sample(number).clean for number in range(40)]
    assert max(float(clean[:, -1].mean()) for clean in seen) < 0.9
    assert float(samples.held_out()[0].clean.min()) == 1


def test_latents_with_text_train(tmp_path):
    folder = _latents(tmp_path / "latents", text=torch.randn(3, 16), pooled=torch.randn(8))
    torch.save({"latents": torch.randn(1, 4, 2, 8, 8)}, folder / "x.pt")
    torch.save(torch.randn(2, 16), folder / "x.text.pt")
    samples = _samples(folder)
    assert [clip.name for clip in find_clips(settings(data=str(folder)))][-1] == "x.pt"
    assert samples.reader.read(find_clips(settings(data=str(folder)))[-1]).given["text"].shape == (2, 16)
    assert samples.channels == 4 and samples.text_dim == 16
    result = tuned(tmp_path / "run", data=str(folder), steps=3, sparsity=0.25)
    assert len(result.curves.loss) == 3 and not result.bad


def test_latents_that_do_not_fit_are_skipped_with_a_reason(tmp_path):
    folder = _latents(tmp_path, 2)
    save_file({"latents": torch.randn(4, 2, 8, 16)}, str(folder / "wide.safetensors"))
    save_file({"latents": torch.full((4, 2, 8, 8), float("nan"))}, str(folder / "nan.safetensors"))
    save_file({"z": torch.randn(4, 2, 8, 8)}, str(folder / "named.safetensors"))
    (folder / "cut.safetensors").write_bytes((folder / "0.safetensors").read_bytes()[:-9])
    (folder / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch /tmp/evil'\ntR.")
    told = settings(data=str(folder), held_out=0)
    samples = Samples(told, find_clips(told))
    for clip in samples.train:
        samples.reader.read(clip)
    reasons = samples.reader.bad
    assert sorted(reasons) == ["cut.safetensors", "evil.pt", "named.safetensors", "nan.safetensors", "wide.safetensors"]
    assert "(4, 2, 8, 16), the first clip's (4, 2, 8, 8)" in reasons["wide.safetensors"]
    assert (
        "not finite" in reasons["nan.safetensors"] and "no tensor 'latents' (it has z)" in reasons["named.safetensors"]
    )
    assert {float(samples.sample(n).clean.sum()) for n in range(14)} == {
        float(samples.sample(n).clean.sum()) for n in (0, 1, 2, 3, 4, 5, 6)
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no clip: put videos \(\.mp4"),
        (["a.mp4", "b.pt"], r"mixes videos \(a\.mp4\) and latents \(b\.pt\)"),
    ],
)
def test_folders_that_cannot_serve(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "a.text.pt").touch()
    with pytest.raises(RunError, match=message):
        find_clips(settings(data=str(tmp_path)))
    with pytest.raises(RunError, match=r"--data '.*nowhere' does not exist"):
        find_clips(settings(data=str(tmp_path / "nowhere")))


def test_clips_of_any_name(tmp_path):
    """The file of a clip's text would have a name that is too long; a video that ends in .text is no text."""
    long = "n" * 240
    for name in (f"{long}.mp4", "notes.text.mp4", "notes.mp4", "notes.text.pt"):
        (tmp_path / name).touch()
    clips = find_clips(settings(data=str(tmp_path)))
    assert [clip.name for clip in clips] == [f"{long}.mp4", "notes.mp4", "notes.text.mp4"]
    assert [clip.text and clip.text.name for clip in clips] == [None, "notes.text.pt", None]
    assert len(digest(clips)) == 64


def test_too_few_clips_to_hold_some_out(tmp_path):
    with pytest.raises(RunError, match=r"--held-out 1 leaves nothing to train of 1 clips"):
        _samples(_latents(tmp_path, 1))
    save_file({"latents": torch.zeros(4, 2, 8, 12)}, str(tmp_path / "wide.safetensors"))
    with pytest.raises(RunError, match=r"\(1 cannot be used; wide\.safetensors: .*the first clip's"):
        _samples(tmp_path)
    (tmp_path / "wide.safetensors").unlink()
    assert len(_samples(tmp_path, held_out=0).held_out()) == 0


def test_digest_sees_names_sizes_and_text(tmp_path):
    folder = _latents(tmp_path, 2)
    told = settings(data=str(folder))
    first = digest(find_clips(told))
    assert digest(find_clips(told)) == first
    torch.save(torch.zeros(1, 4), folder / "0.text.pt")
    assert digest(find_clips(told)) != first


def test_digest_sees_latents_that_were_made_anew(tmp_path):
    """They are as large as they were."""
    told = settings(data=str(_latents(tmp_path, 2, (4, 2, 64, 64))))
    first = digest(find_clips(told))
    path = tmp_path / "0.safetensors"
    size = path.stat().st_size
    assert size > 100_000
    save_file({"latents": torch.zeros(4, 2, 64, 64)}, str(path))
    assert path.stat().st_size == size and digest(find_clips(told)) != first


def test_clips_behind_links_count_and_those_of_runs_do_not(tmp_path):
    folder, elsewhere = tmp_path / "clips", tmp_path / "elsewhere"
    folder.mkdir()
    for place in (
        folder,
        folder / "runs" / "mine",
        folder / "runs" / "old" / "transformer",
        elsewhere,
        elsewhere / "in",
    ):
        _latents_below(place)
    (folder / "runs" / "old" / "settings.json").touch()
    (folder / "runs" / "old" / "checkpoints").mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a circle
    names = [clip.name for clip in find_clips(settings(data=str(folder)), folder / "runs" / "mine")]
    assert names == ["0.safetensors", "linked/0.safetensors", "linked/in/0.safetensors"]


def _latents_below(folder):
    folder.mkdir(parents=True, exist_ok=True)
    _latents(folder, 1)


def _config(name: str, **others: Any) -> dict[str, Any]:
    return {**ZOO[name].model().config, **others}


def test_text_is_cut_filled_up_and_masked():
    takes = takes_of(WAN, ZOO["wan"].model().config, 5, vae=False)
    clips = [{"text": torch.ones(2, 16)}, {}, {"text": torch.ones(9, 16)}]
    batch = collate(clips, torch.zeros(3, 4, 1, 4, 4), torch.full((3,), 0.5), takes)
    assert batch.text.sum((1, 2)).tolist() == [32, 0, 80] and batch.lengths.tolist() == [2, 0, 5]
    assert batch.mask.sum(1).tolist() == [2, 1, 5] and batch.timestep.tolist() == [500] * 3
    with pytest.raises(RunError, match="its text has 8 channels, the model takes 16"):
        collate([{"text": torch.ones(2, 8)}], torch.zeros(1, 4, 1, 4, 4), torch.zeros(1), takes)


def test_images_of_several_lengths_are_no_batch():
    takes = replace(takes_of(WAN, ZOO["wan"].model().config, 5, vae=False), channels={"text": 16, "image": 4})
    clips = [{"image": torch.ones(2, 4)}, {"image": torch.ones(3, 4)}]
    with pytest.raises(RunError, match="--micro-batch 2: clips have images of 2 to 3 tokens: pass --micro-batch 1"):
        collate(clips, torch.zeros(2, 4, 1, 4, 4), torch.zeros(2), takes)


def test_texts_of_several_lengths_without_a_mask_are_no_batch():
    """What the shorter ones are filled up with would be attended to, and depend on who is beside them."""
    model = ZOO["kandinsky5"].model()
    family = FAMILIES["Kandinsky5Transformer3DModel"]
    takes = takes_of(family, model.config, 5, vae=False)
    texts = [{"text": torch.ones(n, takes.channels["text"])} for n in (2, 3)]
    noisy = torch.zeros(2, model.config.out_visual_dim, 2, 4, 4)
    with pytest.raises(RunError, match=r"--micro-batch 2: clips have texts of 2 to 3 tokens.*pass --micro-batch 1"):
        family.velocity(model, model.config, collate(texts, noisy, torch.zeros(2), takes))


def test_a_second_text_may_be_empty_and_pooled_text_is_zeros_without_any():
    config = _config("hunyuan15", in_channels=9, pooled=3)
    family = replace(FAMILIES["HunyuanVideo15Transformer3DModel"], pooled="pooled")
    takes = takes_of(family, config, None, vae=False)
    assert takes.latents == 4 and takes.tokens == {"text": 1000, "text_2": 256} and not takes.condition
    clips = [{"text_2": torch.ones(2, 8)}, {"pooled": torch.ones(3)}]
    batch = collate(clips, torch.zeros(2, 4, 1, 4, 4), torch.full((2,), 0.5), takes)
    assert batch.mask_2.sum(1).tolist() == [2, 0] and batch.mask.sum(1).tolist() == [1, 1]
    assert batch.pooled.tolist() == [[0] * 3, [1] * 3] and batch.text_2.shape == (2, 256, 8)


def test_a_clip_that_does_not_bring_what_the_model_takes_is_skipped(tmp_path):
    folder = _latents(tmp_path, 2, text=torch.ones(3, 16))
    latents, condition = torch.randn(4, 2, 8, 8), torch.randn(1, 4, 2, 8, 8)
    save_file({"latents": latents, "text": torch.ones(3, 8)}, str(folder / "narrow.safetensors"))
    save_file({"latents": latents, "text": torch.ones(16)}, str(folder / "flat.safetensors"))
    save_file({"latents": latents, "condition": condition[..., :4].contiguous()}, str(folder / "cut.safetensors"))
    save_file(
        {"latents": latents, "condition": condition, "image": torch.ones(1, 3, 5)}, str(folder / "whole.safetensors")
    )
    told = settings(data=str(folder), held_out=0)
    clips = find_clips(told)

    def bad(**config) -> dict[str, str]:
        samples = Samples(told, clips, takes_of(WAN, _config("wan", **config), 4, vae=False))
        for clip in clips:
            samples.reader.read(clip)
        return samples.reader.bad

    found = bad()
    assert sorted(found) == ["cut.safetensors", "flat.safetensors", "narrow.safetensors"]
    assert found["narrow.safetensors"].startswith("its text has 8 channels, the model takes 16: encode it")
    assert found["flat.safetensors"] == "its text is (16,): give finite embeddings [L, D]"
    assert found["cut.safetensors"] == "its condition is (4, 2, 8, 4), its latents (4, 2, 8, 8)"
    found = bad(in_channels=12, image_dim=5)
    assert sorted({*(clip.name for clip in clips)} - {*found}) == ["whole.safetensors"]
    assert found["0.safetensors"].startswith(
        "it has no tensor 'condition' (its first frame encoded with zeros after it)"
    )
    with pytest.raises(RunError, match=r"none of 6 clips can be used; 0\.safetensors: it has no tensor 'image'"):
        bad(image_dim=6)


@pytest.mark.parametrize(
    ("name", "others", "vae", "message"),
    [
        ("wan", {"in_channels": 9}, False, "takes 9 channels and gives 4"),
        (
            "wan",
            {"in_channels": 12, "image_dim": 5},
            True,
            "--vae: --model takes an image's embeddings",
        ),
        (
            "easyanimate",
            {"out_channels": 8},
            False,
            "takes 4 channels and gives 8, a variance among them: pass an Easy",
        ),
        ("easyanimate", {"in_channels": 9}, False, "takes 9 channels and gives 4"),
        ("kandinsky5", {}, True, "--vae: --model takes latents of an AutoencoderKLHunyuanVideo"),
        ("cogvideox", {"in_channels": 8}, False, "takes 8 channels and gives 4"),
        ("cogvideox", {"max_text_seq_length": 9}, False, r"--text-tokens 8: .* after 9 text tokens"),
        ("cogvideox", {}, True, "--vae: --model takes latents of an AutoencoderKLCogVideoX"),
        ("hunyuan", {"image_condition_type": "token_replace"}, False, "image_condition_type 'token_replace'"),
        ("hunyuan15", {"task_type": "i2v"}, False, "task_type 'i2v'"),
        ("hunyuan15", {"use_meanflow": True}, False, "use_meanflow True"),
        ("skyreels", {"inject_sample_info": True}, False, "diffusion forcing"),
        ("wan", {"in_channels": 12, "image_dim": 5, "pos_embed_seq_len": 6}, False, "a first and a last frame"),
    ],
)
def test_configurations_that_cannot_be_trained(name, others, vae, message):
    with pytest.raises(RunError, match=message):
        config = _config(name, **others)
        takes_of(family_of(type(ZOO[name].model()), config), config, 8, vae=vae)


def test_a_family_for_another_configuration():
    with pytest.raises(RunError, match="no 'text_dim' in its configuration"):
        takes_of(WAN, _config("ltx"), None, vae=False)


def test_other_families_are_refused():
    with pytest.raises(RunError, match=r"a Linear, which this recipe cannot call: pass one of Wan.*family=Family"):
        family_of(nn.Linear, {})
    for name, why in (("wan-vace", "is steered by a control video"), ("ltx2", "makes audio with its video")):
        with pytest.raises(
            RunError, match=rf"which {why} .*: pass one of Wan.*family=Family|which {why},.*family=Family"
        ):
            family_of(type(ZOO[name].model()), {})


def test_a_model_of_other_channels_or_no_model(tmp_path):
    ZOO["wan"].model().save_pretrained(tmp_path / "pipe" / "transformer")
    told = settings(model=str(tmp_path / "pipe"))
    kind, config = describe_model(told.model)
    model = load_model(told, channels=4, text_dim=None, pixels=False)
    assert type(model) is kind and {name: config[name] for name in model.config if name[0] != "_"} == {
        name: value if not isinstance(value, tuple) else list(value)
        for name, value in model.config.items()
        if name[0] != "_"
    }
    with pytest.raises(RunError, match=r"takes 4 channels, videos as pixels have 3: pass --vae"):
        check_channels(told, 4, 3, pixels=True)
    (tmp_path / "config.json").write_text('{"_class_name": "Nothing"}')
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="is no folder of a diffusers transformer"):
            describe_model(str(folder))
    file = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: x for name, x in load_file(str(file)).items() if "to_q" not in name}, str(file))
    with pytest.raises(RunError, match=r"--model .* lacks \d+ weights of a WanTransformer3DModel \(.*to_q"):
        load_model(told, channels=4, text_dim=None, pixels=False)
    file.write_bytes(b"broken")
    with pytest.raises(RunError, match=r"--model .* cannot be read"):
        load_model(told, channels=4, text_dim=None, pixels=False)


def test_videos_are_encoded_by_a_vae(vae, tmp_path):
    told = settings(vae=str(vae), frames=5)
    encoder = Encoder(told)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        wanted = (encoder.vae.encode(video).latent_dist.mode() - 0.1) / 2
    torch.testing.assert_close(encoder(video), wanted)
    assert wanted.shape == (1, 4, 2, 4, 4)
    write_video(tmp_path / "clips" / "a.mp4", frames=12)
    others = {"vae": str(vae), "data": str(tmp_path / "clips"), "frames": 5, "tile": (2, 2, 2)}
    assert len(tuned(tmp_path / "run", steps=2, anneal=False, **others).curves.loss) == 2


def test_a_vae_that_cannot_serve(vae, tmp_path):
    with pytest.raises(RunError, match=r"--frames 4: --vae takes 4 \* n \+ 1 frames"):
        Encoder(settings(vae=str(vae)))
    with pytest.raises(RunError, match=r"--width 36: --vae takes multiples of 8"):
        Encoder(settings(vae=str(vae), frames=5, width=36))
    with pytest.raises(RunError, match=r"--vae .* is no folder of an AutoencoderKLWan"):
        Encoder(settings(vae=str(tmp_path)))


def test_a_window_that_no_patch_fits(tmp_path):
    with pytest.raises(RunError, match=r"--height gives the model 30, and its patches take multiples of 4"):
        tuned(tmp_path / "run", height=30)
