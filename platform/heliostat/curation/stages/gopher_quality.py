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

from heliostat.curation.english.words import Spoken, facts, shared
from heliostat.curation.slices import LINE_END, slices
from heliostat.curation.stage import Stage, Work, by_texts
from heliostat.schema import Float

ELLIPSES = ("...", "…")


class GopherQuality(Stage):
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
        return by_texts(self.judge_all)

    def judge_all(self, texts: list[str]) -> list[tuple[str, dict[str, float]]]:
        return list(map(self._judge, texts, shared.of_all(texts)))

    def _judge(self, text: str, words: Spoken) -> tuple[str, dict[str, float]]:
        count = len(words)
        if not count:
            return "empty", {"words": 0}
        lengths = words.length[~words.symbol]
        counted = words.alphabetic if self.marks_are_words else words.alphabetic[~words.symbol]
        m = {
            "words": len(lengths),
            "word_length": float(lengths.mean()) if len(lengths) else 0.0,
            "hashes": text.count("#") / count,
            "ellipses": sum(map(text.count, ELLIPSES)) / count,
            **_line_shares(text),
            "alphabetic_words": float(counted.mean()) if len(counted) else 0.0,
            "stop_words": sum(bool((words.hash == hash).any()) for hash in _hashes(tuple(self.stop_words))),
        }
        return self.failed(m), m


@lru_cache(maxsize=8)
def _hashes(words: tuple[str, ...]) -> list[np.uint64]:
    """Returns the hash of each different word."""
    return list(facts([*{*words}])["hash"])


def _line_shares(text: str) -> dict[str, float]:
    """Returns the shares of lines that begin with a bullet, and that end with an ellipsis."""
    total = bullets = ellipses = 0
    if any(mark in text for mark in ("-", "•", *ELLIPSES)):
        for part in slices(text, LINE_END):
            lines = part.splitlines()
            total += len(lines)
            firsts = [line.lstrip()[:1] for line in lines]
            bullets += firsts.count("-") + firsts.count("•")
            if any(mark in part for mark in ELLIPSES):
                ellipses += sum(line.rstrip().endswith(ELLIPSES) for line in lines)
    return {"bullet_lines": bullets / max(1, total), "ellipsis_lines": ellipses / max(1, total)}
