"""Removes spans of words that several documents share, wherever the spans begin. One occurrence of each span stays in the
dataset.

The stage finds every shared span of at least `words` words. The stage may also find shorter spans, but none with less than half
of `words` words. At each end of a removed span, less than half of `words` words may stay. A line end replaces the span. The
occurrence that stays is the first one in the document whose id has the smallest hash. Words are compared as in `minhash`. Spans
with only numbers are compared as written. Put this stage after all other stages that compare documents.

Lee et al. (2021, Deduplicating Training Data Makes Language Models Better, arXiv 2107.06499) remove spans of 50 tokens with a
suffix array, which must fit in memory. This stage chooses windows of half of `words` words by their content (winnowing, Schleimer
et al. 2003), and compares the windows' hashes on disk. So the stage takes linear time and bounded memory.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from heliostat.curation.comparable import edges
from heliostat.curation.repeated import Cut, RepeatingStage, WordWindows, spans


class RepeatedSpans(RepeatingStage):
    """Removes spans of words that occur in another document, or earlier in the same document."""

    libraries: ClassVar[tuple[str, ...]] = ("regex", "rensa")

    words: int = Field(100, ge=10)
    """Minimum words of a shared span that the stage always finds."""

    def signing(self) -> WordWindows:
        return WordWindows((self.words + 1) // 2)

    def cut(self, text: str, lost: set[int]) -> Cut:
        """Removes windows of words from a text. `lost`: the number of each window's first word. Returns the remaining text, with
        the removed share and counts."""
        places = edges(text)
        kept, at, removed, gone = list[str](), 0, 0, spans(lost, self.signing().size)
        for first, stop in gone:
            kept.append(text[at : places[first, 0]].rstrip())
            at = int(places[stop, 0]) if stop < len(places) else len(text)
            removed += stop - first
        left = "\n".join(part for part in [*kept, text[at:]] if part)
        detail = f"{removed:,} of {len(places):,} words, in {len(gone):,} spans"
        return Cut(left, removed / len(places), detail, {"spans_removed": len(gone), "words_removed": removed})
