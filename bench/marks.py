"""Generated text between two marks of a page that people write."""

from __future__ import annotations


def replaced(text: str, block: str, begin: str, end: str) -> str:
    """A page with the block between its marks replaced.

    Raises:
        ValueError: the marks are not there exactly once, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must hold {begin} and, after it, {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
