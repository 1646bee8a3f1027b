"""Hashes windows of words, and chooses some of them by content: whoever shares a long enough span shares a chosen window.

(Winnowing: Schleimer, Wilkerson and Aiken 2003. Of every `size` windows in a row, the one of the least hash is chosen, so that a
span of two sizes, less one word, that two texts have in common holds one that both choose.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heliostat.curation.comparable import words

BLOCK = 1 << 16  # windows that are compared together


@dataclass(frozen=True)
class WordWindows:
    """Defines the windows: `size` words each."""

    size: int

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (number of its first word, hash) of the windows that are chosen; none of a text of fewer than two sizes."""
        found, _ = words([text]).ngrams(self.size)
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
