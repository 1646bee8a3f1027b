"""Removes lines that aren't sentences, and drops documents with too few remaining sentences, like C4 (Raffel et al. 2020, arXiv
1910.10683, section 2.2).

A line stays if all of these are true:

- It ends with a terminal mark (. ! ? or a quote; not an ellipsis).
- It has at least three words, and no word has more than 1,000 characters.
- It doesn't mention JavaScript, terms of use, a privacy policy, or a cookie policy.

Citation marks ([1], [edit]) are removed from lines. A document is dropped if one of its lines has a curly bracket or "lorem
ipsum", or if fewer than five sentences are left. The stage makes the same decisions as datatrove's C4QualityFilter:
docs/benchmarks/curation-stages.md. The paper's filter by a list of bad words is a separate stage, `bad_words`.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import ClassVar

from pydantic import Field

from heliostat.curation.english.words import sentences
from heliostat.curation.slices import LINE_END, slices
from heliostat.curation.stage import Document, Outcome, Stage, text_of

_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_ENDS = (".", "?", "!", '"', "'")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class C4(Stage):
    changes: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("regex",)
    reasons: ClassVar[dict[str, str]] = {
        "lorem_ipsum": "a line with `lorem ipsum`",
        "curly_bracket": "a line with a curly bracket",
    }
    limits: ClassVar = {"few_sentences": ("sentences", "min_sentences", "fewer sentences in the lines that stay than {}")}

    terminal_marks: bool = True
    """Removes lines that don't end with a terminal punctuation mark."""
    min_line_words: int = Field(3, ge=0)
    """Minimum words of a line; shorter lines are removed."""
    max_word_chars: int = Field(1000, ge=1)
    """Maximum characters of a word; lines with a longer word are removed."""
    min_sentences: int = Field(5, ge=0)
    """Minimum sentences in the remaining lines; documents with fewer are dropped (`few_sentences`); 0 drops none."""
    javascript: bool = True
    """Removes lines that mention JavaScript."""
    policies: bool = True
    """Removes lines that mention terms of use, or a privacy or cookie policy."""
    citations: bool = True
    """Removes marks such as [1] and [citation needed] from lines."""
    curly_brackets: bool = True
    """Drops documents with a curly bracket (`curly_bracket`)."""
    lorem_ipsum: bool = True
    """Drops documents with `lorem ipsum` (`lorem_ipsum`)."""

    def decide(self, document: Document) -> Outcome:
        kept, sentences_kept, removed = list[str](), 0, Counter[str]()
        for line in (line for part in slices(text_of(document), LINE_END) for line in part.splitlines()):
            line = line.strip()
            why, line = self._line(line)
            if why in self.reasons:
                return Outcome(None, why, measures={"sentences": sentences_kept})
            if why:
                removed[why] += 1
                continue
            sentences_kept += sentences(line)
            kept.append(line)
        if sentences_kept >= self.min_sentences:
            document.text = "\n".join(kept).strip()
        return self.judged(document, {"sentences": sentences_kept}, dict(removed))

    def _line(self, line: str) -> tuple[str, str]:
        """Returns two strings: the reason to remove the line or to drop the document ("" if the line stays), and the line without
        citation marks."""
        if len(line) > self.max_word_chars and max(map(len, line.split())) > self.max_word_chars:
            return "lines_of_long_words", line
        short = _CITATION.sub("", line) if self.citations and "[" in line else line
        if self.terminal_marks and (not short.endswith(_ENDS) or short.endswith("...")):
            return "lines_without_terminal_mark", line
        if len(line.split(None, self.min_line_words)) < self.min_line_words:
            return "short_lines", line
        small = short.lower()
        if self.lorem_ipsum and "lorem ipsum" in small:
            return "lorem_ipsum", line
        if self.javascript and "javascript" in small:
            return "javascript_lines", line
        if self.curly_brackets and "{" in short:
            return "curly_bracket", line
        if self.policies and any(map(small.__contains__, _POLICIES)):  # faster than a pattern
            return "policy_lines", line
        return "", short
