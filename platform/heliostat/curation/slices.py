"""Splits texts into slices at white space or line ends, so that only the results for one slice are in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

SLICE = 1 << 18  # approximate characters of a slice
SPACE, LINE_END = re.compile(r"\s"), re.compile(r"\n")


def slices(text: str, ends: re.Pattern[str] = SPACE) -> Iterator[str]:
    """Yields slices of a text of about SLICE characters. Each slice ends with the character that `ends` matched. A text without
    such a character is a single slice."""
    at = 0
    while at < len(text):
        end = ends.search(text, at + SLICE) if len(text) - at > SLICE else None
        stop = end.end() if end else len(text)
        yield text[at:stop]
        at = stop


def split(text: str, mark: str = "\n") -> Iterator[str]:
    """Yields the items of `text.split(mark)`, without making the list."""
    at = 0
    while (end := text.find(mark, at)) >= 0:
        yield text[at:end]
        at = end + len(mark)
    yield text[at:]
