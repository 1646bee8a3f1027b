"""Removes spans of words that several documents share, wherever they begin: one occurrence of each stays in the dataset.

The stage always finds a shared span of `words` words or more, sometimes a shorter one, and never one of less than half of
`words`. It removes the span, except for less than half of `words` at either end, and ends the line there. The first occurrence in
the document whose id has the smallest hash stays. Words are compared like in `minhash`, and spans of only numbers as written. Put
this stage after all others that compare documents.

Lee et al. 2021, Deduplicating Training Data Makes Language Models Better, arXiv 2107.06499, remove spans of 50 tokens with a
suffix array, which must be in memory as a whole. This stage chooses windows of half of `words` by content (winnowing, Schleimer
et al. 2003), and compares their hashes on disk. So it takes linear time and bounded memory.
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
