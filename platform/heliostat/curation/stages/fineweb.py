"""Drops documents that look like lists, with FineWeb's custom quality filter (Penedo et al. 2024, arXiv 2406.17557, section 3.6).

A document is dropped if one of these is true:

- Fewer than 12 % of its lines end with a terminal mark.
- More than 67 % of its lines have at most 30 characters.
- More than 1 % of its characters are in duplicate lines. (The paper, and the paper's code, count the lines after deduplication
  across documents.)
- It has more than 0.3 line ends per word.

Lines of only white space don't count. The stage makes the same decisions as datatrove's FineWebQualityFilter:
docs/benchmarks/curation-stages.md.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from heliostat.curation.stage import Stage, Work, by_text
from heliostat.schema import Float


class FineWeb(Stage):
    needs: ClassVar = ("curation", "numba")
    libraries: ClassVar[tuple[str, ...]] = ("regex",)
    reasons: ClassVar[dict[str, str]] = {"empty": "no line with anything in it"}
    limits: ClassVar = {
        "few_terminal_marks": ("terminal_lines", "min_terminal_lines", "a smaller share of lines with a terminal mark than {}"),
        "short_lines": ("short_lines", "max_short_lines", "a larger share of short lines than {}"),
        "duplicate_chars": (
            "duplicate_chars", "max_duplicate_chars", "a larger share of characters in lines that were there before than {}",
        ),
        "line_ends": ("line_ends", "max_line_ends", "more line ends a word than {}"),
    }  # fmt: skip

    min_terminal_lines: Float = Field(0.12, ge=0, le=1)
    """Minimum share of lines that end with a terminal punctuation mark, of any script; documents with less are dropped
    (`few_terminal_marks`)."""
    max_short_lines: Float = Field(0.67, ge=0, le=1)
    """Maximum share of short lines (`short_line_chars`); documents with more are dropped (`short_lines`)."""
    short_line_chars: int = Field(30, ge=0)
    """Maximum characters of a line that `max_short_lines` counts as short."""
    max_duplicate_chars: Float = Field(0.01, ge=0, le=1)
    """Maximum share of characters in duplicate lines; documents with more are dropped (`duplicate_chars`)."""
    max_line_ends: Float = Field(0.3, ge=0)
    """Maximum line ends per word; documents with more are dropped (`line_ends`)."""

    def open(self) -> Work:
        Stage.check(self)
        return by_text(self.judge)

    def judge(self, text: str) -> tuple[str, dict[str, float]]:
        from heliostat.curation.english import characters, measures, words

        codes = characters.code_points(text)
        count, terminal, short, duplicate, ends = measures.filled_lines(codes, characters.kinds(), self.short_line_chars)
        if not count:
            return "empty", {}
        m = {
            "terminal_lines": terminal / count,
            "short_lines": short / count,
            "duplicate_chars": duplicate / (len(text) - ends),
            "line_ends": ends / len(words.recent.spoken(text, codes).hashes),
        }
        return self.failed(m), m
