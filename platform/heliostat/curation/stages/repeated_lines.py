"""Removes lines or paragraphs that several documents share. One occurrence of each line or paragraph stays in the dataset.

The stage removes menus, licenses, and notices, which filters of single documents can't find. The occurrence that stays is the
first one in the document whose id has the smallest hash. So the result doesn't depend on how the input is split. A document
without any text left is dropped. Put this stage after `minhash`. Otherwise, near-duplicates lose their common lines, and only the
lines that differ stay.

CCNet (Wenzek et al. 2019, arXiv 1911.00359) compares single lines, which the paper calls paragraphs, and ignores case,
punctuation, and the values of digits. This stage compares words as in `minhash` (`heliostat.curation.comparable`), which ignores
accents too, and supports Asian scripts. Lines with only numbers are compared as written. For C4, Raffel et al. (2019, arXiv
1910.10683) removed repeated spans of three sentences.

The stage compares lines or paragraphs by 64-bit hashes. Among 10^10 different hashed texts, about three pairs collide. Each task
has only the distinct hashes of one range of hashes in memory.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from heliostat.curation.comparable import words
from heliostat.curation.repeated import BETWEEN, ComparedParts, Cut, RepeatingStage, Unit


class RepeatedLines(RepeatingStage):
    libraries: ClassVar[tuple[str, ...]] = ("regex",)

    unit: Unit = "line"
    """Unit to compare: `line`, or `paragraph` (which ends at an empty line)."""
    min_words: int = Field(3, ge=1)
    """Minimum words of a line or paragraph to compare; shorter lines and paragraphs always stay."""
    normalise: bool = True
    """Compares words as in `minhash`: ignores case, accents, punctuation, and the values of numbers."""

    def signing(self) -> ComparedParts:
        return ComparedParts(self.unit, self.min_words, self.normalise)

    def cut(self, text: str, lost: set[int]) -> Cut:
        between = BETWEEN[self.unit]
        parts = text.split(between)
        counts = words(parts).counts
        left = between.join(part for place, part in enumerate(parts) if place not in lost)
        detail = f"{len(lost):,} of {len(parts):,} {self.unit}s"
        removed = counts[sorted(lost)].sum() / counts.sum()
        return Cut(left, float(removed), detail, {f"{self.unit}s_removed": len(lost)})
