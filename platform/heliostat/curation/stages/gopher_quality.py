"""Drops documents that don't look like prose, with Gopher's quality filter (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1).

A document is kept if all of these are true:

- It has 50 to 100,000 words, with a mean length of 3 to 10 characters.
- It has at most 0.1 hash signs per word, and at most 0.1 ellipses per word.
- At most 90 % of its lines begin with a bullet, and at most 30 % end with an ellipsis.
- At least 80 % of its words contain a letter.
- It contains at least two of eight stop words.

Words are English words, split as in spaCy: punctuation marks are separate words. Words that have only punctuation marks don't
count in the number of words, or in their mean length. The stage makes the same decisions as datatrove's GopherQualityFilter:
docs/benchmarks/curation-stages.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
from pydantic import Field

from heliostat.curation.stage import Stage, Work, by_text
from heliostat.schema import Float


class GopherQuality(Stage):
    needs: ClassVar = ("curation", "numba")
    libraries: ClassVar[tuple[str, ...]] = ("regex",)
    reasons: ClassVar[dict[str, str]] = {"empty": "no word in it"}
    limits: ClassVar = {
        "few_words": ("words", "min_words", "fewer words than {}"),
        "many_words": ("words", "max_words", "more words than {}"),
        "short_words": ("word_length", "min_word_length", "words that are shorter in the mean than {}"),
        "long_words": ("word_length", "max_word_length", "words that are longer in the mean than {}"),
        "hashes": ("hashes", "max_symbols", "more hash signs a word than {}"),
        "ellipses": ("ellipses", "max_symbols", "more ellipses a word than {}"),
        "bullets": ("bullet_lines", "max_bullet_lines", "a larger share of lines that begin with a bullet than {}"),
        "ellipsis_lines": ("ellipsis_lines", "max_ellipsis_lines", "a larger share of lines that end with an ellipsis than {}"),
        "few_letters": ("alphabetic_words", "min_alphabetic_words", "a smaller share of words with a letter than {}"),
        "few_stop_words": ("stop_words", "min_stop_words", "fewer of the stop words than {}"),
    }
    later: ClassVar[frozenset[str]] = frozenset({"marks_are_words"})

    min_words: int = Field(50, ge=0)
    """Minimum words of a document; shorter documents are dropped (`few_words`)."""
    max_words: int = Field(100_000, ge=0)
    """Maximum words of a document; longer documents are dropped (`many_words`)."""
    min_word_length: Float = Field(3.0, ge=0)
    """Minimum mean characters per word; documents with shorter words are dropped (`short_words`)."""
    max_word_length: Float = Field(10.0, ge=0)
    """Maximum mean characters per word; documents with longer words are dropped (`long_words`)."""
    max_symbols: Float = Field(0.1, ge=0)
    """Maximum hash signs, and maximum ellipses, per word; documents with more are dropped (`hashes`, `ellipses`)."""
    max_bullet_lines: Float = Field(0.9, ge=0, le=1)
    """Maximum share of lines that begin with a bullet; documents with more are dropped (`bullets`)."""
    max_ellipsis_lines: Float = Field(0.3, ge=0, le=1)
    """Maximum share of lines that end with an ellipsis; documents with more are dropped (`ellipsis_lines`)."""
    min_alphabetic_words: Float = Field(0.8, ge=0, le=1)
    """Minimum share of words with a letter; documents with less are dropped (`few_letters`)."""
    marks_are_words: bool = True
    """Counts punctuation marks as words for `min_alphabetic_words`, like datatrove. A text with many commas then has a smaller
    share of words with a letter. False: counts only words, like the paper."""
    min_stop_words: int = Field(2, ge=0)
    """Minimum number of different stop words in a document; documents with fewer are dropped (`few_stop_words`)."""
    stop_words: list[str] = ["the", "be", "to", "of", "and", "that", "have", "with"]
    """Stop words, in lower case."""

    def open(self) -> Work:
        Stage.check(self)
        return by_text(self.judge)

    def judge(self, text: str) -> tuple[str, dict[str, float]]:
        from heliostat.curation.english import characters, measures, words

        codes = characters.code_points(text)
        spoken = words.recent.spoken(text, codes)
        count = len(spoken.hashes)
        if not count:
            return "empty", {"words": 0}
        plain, chars, letters, plain_letters = measures.word_counts(spoken.lengths, spoken.facts)
        lines, bullets, ellipses = measures.marked_lines(codes, characters.kinds())
        m = {
            "words": plain,
            "word_length": chars / max(1, plain),
            "hashes": text.count("#") / count,
            "ellipses": sum(map(text.count, ("...", "…"))) / count,
            "bullet_lines": bullets / lines,
            "ellipsis_lines": ellipses / lines,
            "alphabetic_words": letters / count if self.marks_are_words else plain_letters / max(1, plain),
            "stop_words": measures.occurring(spoken.hashes, _hashes(tuple(self.stop_words))),
        }
        return self.failed(m), m


@lru_cache(maxsize=8)
def _hashes(stop_words: tuple[str, ...]) -> np.ndarray:
    """Returns the hash of each different word. A string with white space isn't a word."""
    from heliostat.curation.english import words

    return np.array(words.hashes_of({word for word in stop_words if word.split() == [word]}), np.uint64)
