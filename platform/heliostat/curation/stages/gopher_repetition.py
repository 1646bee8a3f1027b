"""Drops documents with many repeated lines, paragraphs, or n-grams, with Gopher's repetition filter (Rae et al. 2021, arXiv
2112.11446, table A1).

A document is dropped if one of these is true:

- More than 30 % of its lines, or more than 30 % of its paragraphs, are duplicates.
- Its duplicate lines, or its duplicate paragraphs, have more than 20 % of the characters.
- The most frequent n-gram of 2, 3, or 4 words has more than 20, 18, or 16 % of the characters, respectively.
- Duplicate n-grams of 5, 6, 7, 8, 9, or 10 words have more than 15, 14, 13, 12, 11, or 10 % of the characters, respectively.

Words are English words, split as in spaCy. The stage makes the same decisions as datatrove's GopherRepetitionFilter:
docs/benchmarks/curation-stages.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from heliostat.curation.stage import Stage, Work, by_text
from heliostat.schema import Float

Share = Annotated[Float, Field(ge=0, le=1)]
TOP, DUPLICATE = range(2, 5), range(5, 11)
N_GRAMS = [*(f"top_{n}_grams" for n in TOP), *(f"{n}_grams" for n in DUPLICATE)]


class GopherRepetition(Stage):
    needs: ClassVar = ("curation", "numba")
    libraries: ClassVar[tuple[str, ...]] = ("regex",)
    reasons: ClassVar[dict[str, str]] = {"empty": "no character in it"}
    limits: ClassVar = {
        "paragraphs": ("paragraphs", "max_duplicate_paragraphs", "more paragraphs that were there before than {}"),
        "paragraph_chars": ("paragraph_chars", "max_duplicate_paragraph_chars", "more characters in such paragraphs than {}"),
        "lines": ("lines", "max_duplicate_lines", "more lines that were there before than {}"),
        "line_chars": ("line_chars", "max_duplicate_line_chars", "more characters in such lines than {}"),
        **{f"top_{n}_grams": (f"top_{n}_grams", f"max_top_{n}_grams",
                              f"the most frequent {n}-gram takes more characters than {{}}") for n in TOP},
        **{f"{n}_grams": (f"{n}_grams", f"max_duplicate_{n}_grams",
                          f"more characters in {n}-grams that were there before than {{}}") for n in DUPLICATE},
    }  # fmt: skip

    max_duplicate_lines: Share = 0.3
    """Maximum share of duplicate lines; documents with more are dropped (`lines`)."""
    max_duplicate_paragraphs: Share = 0.3
    """Maximum share of duplicate paragraphs; documents with more are dropped (`paragraphs`)."""
    max_duplicate_line_chars: Share = 0.2
    """Maximum share of characters in duplicate lines; documents with more are dropped (`line_chars`)."""
    max_duplicate_paragraph_chars: Share = 0.2
    """Maximum share of characters in duplicate paragraphs; documents with more are dropped (`paragraph_chars`)."""
    max_top_2_grams: Share = 0.2
    """Maximum share of characters in the most frequent 2-gram of words; documents with more are dropped."""
    max_top_3_grams: Share = 0.18
    """Maximum share of characters in the most frequent 3-gram of words; documents with more are dropped."""
    max_top_4_grams: Share = 0.16
    """Maximum share of characters in the most frequent 4-gram of words; documents with more are dropped."""
    max_duplicate_5_grams: Share = 0.15
    """Maximum share of characters in duplicate 5-grams of words; documents with more are dropped."""
    max_duplicate_6_grams: Share = 0.14
    """Maximum share of characters in duplicate 6-grams of words; documents with more are dropped."""
    max_duplicate_7_grams: Share = 0.13
    """Maximum share of characters in duplicate 7-grams of words; documents with more are dropped."""
    max_duplicate_8_grams: Share = 0.12
    """Maximum share of characters in duplicate 8-grams of words; documents with more are dropped."""
    max_duplicate_9_grams: Share = 0.11
    """Maximum share of characters in duplicate 9-grams of words; documents with more are dropped."""
    max_duplicate_10_grams: Share = 0.10
    """Maximum share of characters in duplicate 10-grams of words; documents with more are dropped."""

    def open(self) -> Work:
        Stage.check(self)
        return by_text(self.judge)

    def judge(self, text: str) -> tuple[str, dict[str, float]]:
        """Judges lines and paragraphs first. Then judges the words of a text that is left."""
        from heliostat.curation.english import characters, repetition, words

        if not text:
            return "empty", {}
        codes, kinds, measures = characters.code_points(text), characters.kinds(), dict[str, float]()
        paragraphs = (*repetition.stripped(codes, kinds, 0, len(codes)), 2)
        for name, part in (("paragraph", paragraphs), ("line", (0, len(codes), 1))):
            parts, repeated, chars = repetition.duplicates(codes, *part)
            measures |= {f"{name}s": repeated / parts, f"{name}_chars": chars / len(text)}
        if reason := self.failed(measures):
            return reason, measures
        spoken = words.recent.spoken(text, codes)
        n_grams = repetition.n_grams(spoken.hashes, spoken.lengths, TOP[0], TOP[-1], DUPLICATE[-1])
        measures |= {name: chars / len(text) for name, chars in zip(N_GRAMS, n_grams.tolist(), strict=True)}
        return self.failed(measures), measures
