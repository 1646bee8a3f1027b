"""Hashes windows of words, and chooses some of them by content: whoever shares a long enough span shares a chosen window.

(Winnowing: Schleimer, Wilkerson and Aiken 2003. Of every `size` windows in a row, the one of the least hash is chosen, so that a
span of two sizes, less one word, that two texts have in common holds one that both choose.) Words are compared as they are
written; what stands between them is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heliostat.curation import spill
from heliostat.curation.minhash.signatures import FACTOR, INVERSE, WORD, hashes

BLOCK = 1 << 16  # windows that are compared together


@dataclass(frozen=True)
class Windows:
    """Defines the windows: `size` words each."""

    size: int

    def hashes(self, text: str) -> list[tuple[int, int]]:
        """Lists (number of its first word, hash) of the windows that are chosen; none of a text of fewer than two sizes."""
        data = text if text.isascii() else " ".join(WORD.findall(text))
        found = rolling(hashes(data.encode("utf-8", "surrogatepass"))[1], self.size)
        places = least(found, self.size)
        return list(zip(places.tolist(), found[places].tolist(), strict=True))


def rolling(words: np.ndarray, size: int) -> np.ndarray:
    """Hashes every window of `size` words: polynomials of the words' hashes, from sums over all, whose powers are divided out."""
    if len(words) < size:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(len(words) - 1, FACTOR)]))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * powers)])
        inverse = np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(len(words) - size, INVERSE)]))
        return spill.mixed((sums[size:] - sums[:-size]) * inverse)


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
