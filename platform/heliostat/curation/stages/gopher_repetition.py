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

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from heliostat.curation.english.words import Spoken, shared
from heliostat.curation.repetition import Repeats, duplicates
from heliostat.curation.slices import slices
from heliostat.curation.stage import Stage, Work, by_texts
from heliostat.schema import Float

Share = Annotated[Float, Field(ge=0, le=1)]
PARAGRAPHS, LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")
TOP, DUPLICATE = range(2, 5), range(5, 11)


class GopherRepetition(Stage):
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
        return by_texts(self.judge_all)

    def judge_all(self, texts: list[str]) -> list[tuple[str, dict[str, float]]]:
        """Judges lines and paragraphs first. Then judges the words of the texts that are left."""
        judged = [self._lines(text) for text in texts]
        left = [number for number, (reason, _) in enumerate(judged) if not reason]
        spoken = shared.of_all([texts[number] for number in left])
        for number, shares in zip(left, _n_grams(spoken, [len(texts[number]) for number in left]), strict=True):
            measures = judged[number][1] | shares
            judged[number] = self.failed(measures), measures
        return judged

    def _lines(self, text: str) -> tuple[str, dict[str, float]]:
        if not text:
            return "empty", {}
        size, measures = len(text), dict[str, float]()
        parts, repeated, chars = duplicates(_parts(text.strip(), PARAGRAPHS, "\n\n"))
        measures |= {"paragraphs": repeated / parts, "paragraph_chars": chars / size}
        parts, repeated, chars = duplicates(_parts(text, LINES, "\n"))
        measures |= {"lines": repeated / parts, "line_chars": chars / size}
        return self.failed(measures), measures


def _n_grams(texts: list[Spoken], sizes: list[int]) -> list[dict[str, float]]:
    """Returns the shares of each text's characters in repeated n-grams. `sizes`: the characters of each text."""
    if not texts:
        return []
    repeats = Repeats([(text.hash, text.length) for text in texts])
    columns = {f"top_{n}_grams": repeats.top_chars(n) for n in TOP} | {
        f"{n}_grams": repeats.duplicate_chars(n) for n in DUPLICATE
    }
    rows = zip(*(chars.tolist() for chars in columns.values()), strict=True)
    return [{name: chars / size for name, chars in zip(columns, row, strict=True)} for row, size in zip(rows, sizes, strict=True)]


def _parts(text: str, ends: re.Pattern[str], mark: str) -> Iterator[list[str]]:
    """Yields the items of `ends.split(text)`, in lists. Only the items of one slice are in memory.

    `mark`: the shortest line ends that match. Splitting at a string is faster than at a pattern.
    """
    last = ""
    for part in slices(text, ends):
        first, *others = part.split(mark)
        if mark + "\n" in part and mark != "\n":  # line ends that the mark left
            others = [other.lstrip("\n") for other in others]
        *items, last = first, *others
        yield [*items[:1], *filter(None, items[1:])]
    yield [last]
