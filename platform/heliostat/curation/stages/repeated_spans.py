"""Removes spans of words that another document has too, wherever they begin: one occurrence of each stays in the whole set.

(Lee et al. 2021, Deduplicating Training Data Makes Language Models Better, arXiv 2107.06499, remove spans of 50 tokens by a
suffix array, which must be in memory as a whole. Here windows of words are chosen by content, as winnowing does, Schleimer et
al. 2003, and compared by hashes on disk: linear, and in bounded memory.) A span of `words` words that another document has as
well is always found, in pieces of half of it; shorter ones sometimes, none of less than half. All of it goes but less than half
of `words` at either end. What stays is in the document whose id has the least hash, and there the first. Words are compared as
`minhash` compares them, spans of numbers alone as they are written. Where a span was, a line ends. Put it last of what compares
documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from heliostat.curation import comparable
from heliostat.curation.repeating import Cut, RepeatingStage

BLOCK = 1 << 16  # windows that are compared together


class RepeatedSpans(RepeatingStage):
    words: int = Field(100, ge=10)
    """The words of a span that is always found."""

    def signing(self) -> WordWindows:
        return WordWindows((self.words + 1) // 2)

    def cut(self, text: str, lost: set[int]) -> Cut:
        places = comparable.edges(text)
        kept, at, removed, gone = list[str](), 0, 0, spans(lost, self.signing().size)
        for first, stop in gone:
            kept.append(text[at : places[first, 0]].rstrip())
            at = int(places[stop, 0]) if stop < len(places) else len(text)
            removed += stop - first
        left = "\n".join(part for part in [*kept, text[at:]] if part)
        detail = f"{removed:,} of {len(places):,} words, in {len(gone):,} spans"
        return Cut(left, removed / len(places), detail, {"spans_removed": len(gone), "words_removed": removed})


@dataclass(frozen=True)
class WordWindows:
    """Defines the windows: `size` words each."""

    size: int

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (number of its first word, hash) of the windows that are chosen; none of a text of fewer than two sizes."""
        found, _ = comparable.words([text]).ngrams(self.size)
        places = least(found, self.size)
        return list(zip(places.tolist(), found[places].tolist(), strict=True))


def least(found: np.ndarray, size: int) -> np.ndarray:
    """Returns the places of the least hash of every `size` in a row, each once."""
    places = [np.zeros(0, np.int64)]
    for start in range(0, len(found) - size + 1, BLOCK):
        part = found[start : start + BLOCK + size - 1]
        rows = np.lib.stride_tricks.sliding_window_view(part, size)
        places.append(np.unique(rows.argmin(axis=1) + np.arange(len(rows))) + start)
    return np.unique(np.concatenate(places))


def spans(lost: set[int], size: int) -> list[tuple[int, int]]:
    """Joins windows that overlap or touch: (first word, word behind the last) of each span."""
    found: list[tuple[int, int]] = []
    for place in sorted(lost):
        if found and place <= found[-1][1]:
            found[-1] = (found[-1][0], place + size)
        else:
            found.append((place, place + size))
    return found
