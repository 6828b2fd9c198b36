"""The page holds what the library computed, asks for nothing, and shows it: in a browser, by its address and by its sliders."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from flexsparse.analysis import page
from flexsparse.tile_bits import unpack_bits

Looked = tuple[Any, dict[str, Any]]


class Dom(HTMLParser):
    """What tests read of a page: elements' texts by id, attributes, resources."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.open: list[str | None] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img", "br"):
            self.open.append(dict(attrs).get("id"))

    def handle_endtag(self, tag: str) -> None:
        if self.open:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for name in self.open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data

    def tiles(self, kind: str) -> set[int]:
        """Tiles of the cells of a class."""
        cells = [attrs for _, attrs in self.elements if "data-tile" in attrs]
        return {int(a["data-tile"] or 0) for a in cells if kind in (a.get("class") or "").split()}


def embedded(html: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert text
    return json.loads(text[1])


def bits(text: str, count: int) -> np.ndarray[Any, Any]:
    rows = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, -(-count // 8))
    return np.unpackbits(rows, axis=-1, count=count, bitorder="little").astype(bool)


def test_the_page_holds_what_the_library_computed(looked: Looked) -> None:
    found, data = looked
    held = embedded(page.render(data))
    assert held == data
    assert (held["grid"], held["tile"], held["tiles"], held["text"]) == ([3, 6, 10], [2, 4, 4], [2, 2, 3], [0, 6])
    assert held["queries"] == list(range(12)) and held["rows"] == [1, 4, 7, 10]
    for layer, shown in zip(found.layers, held["layers"], strict=True):
        assert (shown["name"], shown["index"], shown["heads"]) == (layer.name, layer.index, layer.heads)
        for name in ("density", "row_density", "recall"):
            torch.testing.assert_close(torch.tensor(shown[name]), getattr(layer, name).float(), atol=6e-6, rtol=0)
        for axis, value in layer.overlap.items():
            torch.testing.assert_close(torch.tensor(shown["overlap"][axis]), value.float(), atol=6e-6, rtol=0)
        keep = unpack_bits(layer.bits, 12).numpy()
        for head in range(2):
            assert (bits(shown["lists"][head], 12) == keep[head]).all()
            assert (bits(shown["kept_queries"][head], 180)[0] == layer.kept_queries[head].numpy()).all()
            mass = np.frombuffer(base64.b64decode(shown["mass"][head]), np.uint8).reshape(4, 12) / 255
            peak = np.array(shown["peak"][head])[:, None]
            assert np.abs(mass * peak - layer.mass[head, :, :12].numpy()).max() < 1 / 255
            assert shown["computed"][head] == pytest.approx(layer.kept_queries[head].float().mean().item(), abs=1e-5)


def test_a_large_model_shows_some_query_tiles(looked: Looked) -> None:
    found, data = looked
    few = page.describe(found, data, [], most=4 * 2 * 3)  # 4 heads, 12 tiles in 2 bytes, room for 3 rows
    assert few["queries"] == [1, 2, 4, 6, 7, 10]  # 2, 6 and 10, and those that recall was computed for
    for layer, shown in zip(found.layers, few["layers"]):
        assert (bits(shown["lists"][1], 12) == unpack_bits(layer.bits, 12)[1, few["queries"]].numpy()).all()
        expected = layer.row_density[:, few["queries"]].float()
        torch.testing.assert_close(torch.tensor(shown["row_density"]), expected, atol=6e-6, rtol=0)


def test_measures_are_the_data_without_what_is_heavy(looked: Looked) -> None:
    _, data = looked
    small = page.measures(data)
    assert set(data) - set(small) == {"frames"}
    assert set(data["layers"][0]) - set(small["layers"][0]) == {"lists", "mass", "kept_queries"}
    assert small["layers"][1]["recall"] == data["layers"][1]["recall"]
    json.dumps(small, allow_nan=False)


def test_nan_becomes_null() -> None:
    assert page._numbers(torch.tensor([[float("nan"), 0.5]])) == [[None, 0.5]]


def test_the_page_asks_for_nothing_and_cannot_be_broken_out_of(looked: Looked) -> None:
    html = page.render(looked[1])
    dom = Dom(html)
    for tag, attrs in dom.elements:
        assert tag not in ("link", "iframe", "object", "base"), tag
        for name in ("src", "href", "srcset", "action", "data"):
            assert name not in attrs, (tag, attrs)
    policy = next(a["content"] for tag, a in dom.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    code = re.sub(r'(id="data">).*?(</script>)', r"\1\2", html, flags=re.DOTALL)  # base64 has // in it
    assert not re.search(r"https?:|//\w|@import|url\(", code) and "http" not in json.dumps(looked[1])
    assert html.count("</script>") == 2 and "<b>" not in html


def test_a_browser_shows_the_state_of_the_address(looked: Looked, browse: Callable[..., str]) -> None:
    found, data = looked
    html = page.render(data)
    assert "file:" not in html
    first, other = (Dom(browse(html, address)) for address in ("", "#layer=1&head=1&tile=4"))
    for dom, (layer, head, tile) in ((first, (0, 0, 0)), (other, (1, 1, 4))):
        kept = unpack_bits(found.layers[layer].bits, 12)[head, tile].nonzero()[:, 0].tolist()
        assert dom.texts["kept"] == f"{len(kept)} of 12 tiles: {' '.join(map(str, kept))}"
        assert dom.tiles("kept") == set(kept) and dom.tiles("query") == {tile}
        assert dom.texts["layer-value"] == f"{layer}: {found.layers[layer].name}"
        assert f"density of the tile {found.layers[layer].row_density[head, tile]:.3f}" in dom.texts["readout"]
    assert first.texts["kept"] != other.texts["kept"]
    assert "recall of the tile not sampled" in first.texts["readout"]
    assert f"recall of the tile {found.layers[1].recall[1, 1]:.3f}" in other.texts["readout"]
    assert first.texts["title"] == data["title"]
    assert len([tag for tag, _ in other.elements if tag == "img"]) == 3
    cells = [a for _, a in other.elements if "data-tile" in a]
    assert len(cells) == 3 * 6, "three frames of six tiles"
    last = next(a for a in cells if a["data-tile"] == "5")
    assert re.sub(r"\s", "", last["style"] or "") == "left:80%;top:66.6667%;width:20%;height:33.3333%;", (
        "cut by the border"
    )
    assert "dense" in other.texts["calls"] and found.calls[0].name in other.texts["calls"]


SCRIPT = """<script>
const move = (id, value) => {{
  const it = byId(id);
  it.value = value;
  it.dispatchEvent(new Event("input", {{bubbles: true}}));
}};
{body}
</script></body>"""


def test_the_box_for_computed_tokens_is_there_where_queries_are_pruned(
    looked: Looked, browse: Callable[..., str]
) -> None:
    _, data = looked
    whole = {**data, "layers": [{**layer, "kept_queries": None} for layer in data["layers"]]}
    body = 'byId("summary").textContent = getComputedStyle(byId("kept-box")).display;'
    for shown, expected in ((data, "grid"), (whole, "none")):
        html = page.render(shown).replace("</body>", SCRIPT.format(body=body))
        assert Dom(browse(html)).texts["summary"] == expected


def test_sliders_clicks_and_maps_change_what_is_shown(looked: Looked, browse: Callable[..., str]) -> None:
    found, data = looked
    html = page.render(data)

    def after(body: str) -> Dom:
        return Dom(browse(html.replace("</body>", SCRIPT.format(body=body))))

    def shown(dom: Dom) -> str:
        return dom.texts["kept"]

    def expected(layer: int, head: int, tile: int) -> str:
        kept = unpack_bits(found.layers[layer].bits, 12)[head, tile].nonzero()[:, 0].tolist()
        return f"{len(kept)} of 12 tiles: {' '.join(map(str, kept))}"

    assert shown(after('move("layer", 1); move("head", 1); move("tile", 9);')) == expected(1, 1, 9)
    assert shown(after("document.querySelector('[data-tile=\"7\"]').click();")) == expected(0, 0, 7)
    clicked = after('document.querySelector(\'td[data-layer="1"][data-head="1"]\').click();')
    assert shown(clicked) == expected(1, 1, 0) and clicked.texts["head-value"] == "1"
    mass = after('move("tile", 0); move("show", "mass");')
    assert shown(mass) == expected(0, 0, 1), "the nearest tile that dense attention was computed for"
    styles = {a["data-tile"]: a["style"] or "" for _, a in mass.elements if "data-tile" in a}
    strongest = found.layers[0].mass[0, 0, :12].argmax().item()
    assert "0.8)" in styles[str(strongest)].replace("0.800", "0.8")
    recall = after('move("show", "recall");')
    assert {*range(12)} - recall.tiles("unknown") == set(data["rows"])
    bad = Dom(browse(html, "#layer=99&head=x&tile=-3&show=__proto__"))
    assert (bad.texts["layer-value"][0], bad.texts["head-value"]) == ("1", "0") and shown(bad) == expected(1, 0, 0)
