"""The page: self-contained, escaped; and its pictures."""

import re
from html.parser import HTMLParser

import torch

from flexsparse.demo import figures, page, report
from flexsparse.demo.settings import Settings
from flexsparse.demo.train import Curves

HOSTILE = "<script>alert('x')</script><img src=http://example.org/x onerror=\"y\">.mp4"
SETTINGS = Settings(steps=4, frames=8, height=32, width=40, tile=(4, 2, 2), heads=2)


def _pictures() -> dict[str, bytes]:
    curves = {
        name: Curves(loss=[1.0, 0.5, 0.7, 0.4], held_out=[{"step": 2, "mean": 0.6}, {"step": 4, "mean": 0.5}])
        for name in ("dense", "vsa", "bsa")
    }
    video = torch.rand(3, 8, 32, 40) * 2 - 1
    keep = {name: torch.rand(2, 12, 12) < 0.3 for name in ("vsa", "bsa")}
    places = figures.query_places(SETTINGS)
    pictures = {
        "curves": figures.loss_curves(curves),
        "frames": figures.frame_table({"a": video, "b": video}),
    }
    heat = {f"heat {i}": figures.heat_map(video, keep, place, SETTINGS) for i, place in enumerate(places)}
    return pictures | heat


def _metrics() -> dict:
    numbers = {"density": 0.1, "attention_flops": 10**9, "attention_flops_ratio": 0.1, "held_out_loss": 0.5}
    numbers["calls"] = [{"name": HOSTILE, "sparse": True, "backend": "gather", "reason": HOSTILE}]
    sparse = numbers | {"error_to_oracle": 4e-7, "distance_to_dense": 0.3}
    sparse |= {"step": {"seconds": 0.1, "ratio": 0.5}, "attention_time": {"seconds": 0.02, "ratio": 0.25}}
    return {
        "header": {
            "name": HOSTILE,
            "date": "today",
            "clip": HOSTILE,
            "attribution": HOSTILE,
            "clip_frames": 20,
            "held_out_frames": 8,
            "versions": {"flexsparse": HOSTILE},
        },
        "settings": SETTINGS.as_dict(),
        "grid": list(SETTINGS.grid),
        "tokens": SETTINGS.tokens,
        "parameters": 1000,
        "layer": 1,
        "held_out_times": [0.5],
        "shown_time": 0.5,
        "query_tiles": [list(place) for place in figures.query_places(SETTINGS)],
        "methods": {"dense": numbers, "vsa": sparse, "bsa": sparse},
    }


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_page_is_self_contained_and_hostile_names_are_text():
    html = report.render(_metrics(), _pictures())
    tags = _Tags(html).tags
    names = {tag for tag, _ in tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "video", "base", "form", "a"}
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset")]
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert not re.search(r"url\(|@import", html)
    assert html.count("&lt;script&gt;") >= 4
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in tags
    ]


def test_page_says_what_it_is_and_shows_every_number():
    html = report.render(_metrics(), _pictures())
    assert "makes no claim about the quality" in html
    for text in ("4.0e-07", "0.25 x dense", "0.50 x dense", "0.100", "held-out", f"{SETTINGS.tokens:,}"):
        assert text in html
    assert html.count("<img ") == 2 + len(figures.query_places(SETTINGS))


def test_building_blocks_escape():
    for text in (
        page.heading(HOSTILE),
        page.paragraph(HOSTILE),
        page.table([HOSTILE], [[HOSTILE]]),
        page.details([(HOSTILE, HOSTILE)]),
        page.picture(b"", HOSTILE),
        page.page(HOSTILE, []),
    ):
        assert "<script" not in text and 'onerror="' not in text


def test_pictures_are_png():
    assert all(data.startswith(b"\x89PNG") for data in _pictures().values())


def test_smoothing_is_a_weighted_mean_from_the_first_value_on():
    assert all(abs(value - 3) < 1e-12 for value in figures.smoothed([3.0, 3.0, 3.0]))
    values = figures.smoothed([0.0, 1.0], weight=0.5)
    assert values[0] == 0 and abs(values[1] - 2 / 3) < 1e-12


def test_query_tiles_lie_in_the_grid_of_tiles():
    for frames, height, width in [(2, 8, 8), (16, 120, 216), (5, 40, 24)]:
        settings = Settings(frames=frames, height=height, width=width)
        for place in figures.query_places(settings):
            assert all(0 <= p < n for p, n in zip(place, figures.tile_places(settings)))
