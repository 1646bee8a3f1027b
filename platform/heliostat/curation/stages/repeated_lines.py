"""Removes lines, or paragraphs, that several documents share: one occurrence of each stays in the dataset.

This removes menus, licenses, and notices, which filters on single documents can't find. The first occurrence in the document
whose id has the smallest hash stays, so the result doesn't depend on how the input is split. An empty document is dropped. Put
this stage after `minhash`; otherwise near-duplicates keep the lines that differ.

CCNet (Wenzek et al. 2019, arXiv 1911.00359) compares paragraphs, which are lines there, without case, punctuation, and the
values of digits. This stage compares words like `minhash` (`heliostat.curation.comparable`), including accents and Asian scripts,
and lines with only numbers as written. Raffel et al. 2019, arXiv 1910.10683, do the same for spans of three sentences of C4.

Parts are compared by 64-bit hashes: among 10^10 different ones, about three collide. A task holds the different parts in a share
of all hashes.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from heliostat.curation.comparable import words
from heliostat.curation.repeated import BETWEEN, ComparedParts, Cut, RepeatingStage, Unit


class RepeatedLines(RepeatingStage):
    libraries: ClassVar[tuple[str, ...]] = ("regex",)

    unit: Unit = "line"
    """Unit to compare: every `line`, or every `paragraph`, which ends at an empty line."""
    min_words: int = Field(3, ge=1)
    """Minimum words of a line or paragraph; shorter ones always stay."""
    normalise: bool = True
    """Compares words like `minhash`: without case, accents, punctuation, and the values of numbers."""

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
