"""Removes spans of words that several documents share, wherever they begin: one occurrence of each stays in the dataset.

(Lee et al. 2021, Deduplicating Training Data Makes Language Models Better, arXiv 2107.06499, remove spans of 50 tokens by a
suffix array, which must be in memory as a whole. Here windows of words are chosen by content, as winnowing does, Schleimer et
al. 2003, and compared by hashes on disk: linear, and in bounded memory.) A span of `words` words that another document has as
well is always found, in pieces of half of it; shorter ones sometimes, none of less than half. All of it goes but less than half
of `words` at either end. What stays is in the document whose id has the least hash, and there the first. Words are compared as
`minhash` compares them, spans of numbers alone as they are written. Where a span was, a line ends. Put it last of what compares
documents.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from heliostat.curation.comparable import edges
from heliostat.curation.repeated import Cut, RepeatingStage, WordWindows, spans


class RepeatedSpans(RepeatingStage):
    """Removes spans of words that are in another document, or earlier in the same one."""

    libraries: ClassVar[tuple[str, ...]] = ("regex", "rensa")

    words: int = Field(100, ge=10)
    """Minimum words of a span that is always found."""

    def signing(self) -> WordWindows:
        return WordWindows((self.words + 1) // 2)

    def cut(self, text: str, lost: set[int]) -> Cut:
        """Removes windows by the numbers of their first words."""
        places = edges(text)
        kept, at, removed, gone = list[str](), 0, 0, spans(lost, self.signing().size)
        for first, stop in gone:
            kept.append(text[at : places[first, 0]].rstrip())
            at = int(places[stop, 0]) if stop < len(places) else len(text)
            removed += stop - first
        left = "\n".join(part for part in [*kept, text[at:]] if part)
        detail = f"{removed:,} of {len(places):,} words, in {len(gone):,} spans"
        return Cut(left, removed / len(places), detail, {"spans_removed": len(gone), "words_removed": removed})
