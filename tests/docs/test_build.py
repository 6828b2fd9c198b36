"""The documentation renders without a warning, every page is in it, and the pages ask no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import flexsparse as fs

from .pages import DOCS, PAGES

pytest.importorskip("sphinx", reason="the docs extra is not installed")
pytest.importorskip("furo", reason="the docs extra is not installed")

LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "link": "href",
    "object": "data",
}
ELSEWHERE = re.compile(r"^(?:https?:)?//")
IN_STYLE = re.compile(r"(?:url\(\s*|@import\s+)[\"']?(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` renders, elsewhere."""
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        str(DOCS),
        str(out),
        "-d",
        str(out / ".doctrees"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_rendered_and_linked(site: Path) -> None:
    index = (site / "index.html").read_text()
    for page in PAGES:
        html = page.replace(".md", ".html")
        assert (site / html).is_file()
        assert page == "index.md" or f'href="{html}"' in index


def test_every_public_name_has_an_entry(site: Path) -> None:
    """autodoc found each of them; a class or function comes with its docstring."""
    text = (site / "api.html").read_text()
    for name in fs.__all__:
        kind = "module-" if isinstance(getattr(fs, name), type(fs)) else ""
        assert f'id="{kind}flexsparse.{name}"' in text
    assert "Keep the " in text and "Make a video transformer" in text


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        address = given.get(LOADS.get(tag, ""))
        if address and not (tag == "link" and given.get("rel") in ("canonical", "index", "search", "next", "prev")):
            self.found.append(address)


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    seen = 0
    for path in site.rglob("*.html"):
        page = _Loads()
        text = path.read_text()
        page.feed(text)
        seen += len(page.found)
        assert not [address for address in page.found if ELSEWHERE.match(address)], path.name
        assert not IN_STYLE.search(text), path.name
    assert seen > 10
    for path in site.rglob("*.css"):
        assert not IN_STYLE.search(path.read_text()), path.name
