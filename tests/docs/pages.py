"""The documentation's pages, their fenced blocks and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: what stands after the fence.
        text: its lines.
        line: of the page on which the text begins, from 1.
    """

    language: str
    text: str
    line: int


def blocks(text: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in the given languages."""
    found = [
        Block(match["language"], match["text"], text.count("\n", 0, match.start("text")) + 1)
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def read(page: str) -> str:
    """A page's source."""
    return (DOCS / page).read_text(encoding="utf-8")


def rows(text: str, first: str) -> Iterator[dict[str, str]]:
    """The rows of the table whose first column is called so, as a dict each."""
    lines = iter(text.splitlines())
    header = next((line for line in lines if line.startswith(f"| {first} |")), "")
    names = _cells(header)
    next(lines, None)
    for line in lines:
        if not line.startswith("|"):
            return
        yield dict(zip(names, _cells(line), strict=True))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
