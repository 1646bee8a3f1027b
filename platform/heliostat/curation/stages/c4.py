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

from typing import ClassVar

from pydantic import Field

from heliostat.curation.stage import Document, Outcome, Stage, text_of


class C4(Stage):
    changes: ClassVar[bool] = True
    needs: ClassVar = ("curation", "numba")
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
        from heliostat.curation.english import sentences

        applied = {
            sentences.LOREM_IPSUM: self.lorem_ipsum, sentences.JAVASCRIPT: self.javascript,
            sentences.CURLY_BRACKET: self.curly_brackets, sentences.POLICY: self.policies,
        }  # fmt: skip
        lines = sentences.selected_lines(
            text_of(document), self.max_word_chars, self.min_line_words, self.terminal_marks, self.citations,
            {rule for rule, applies in applied.items() if applies},
        )  # fmt: skip
        measures: dict[str, float] = {"sentences": lines.sentences}
        if lines.dropped:
            return Outcome(None, "lorem_ipsum" if lines.dropped == sentences.LOREM_IPSUM else "curly_bracket", measures=measures)
        if lines.sentences >= self.min_sentences:
            document.text = lines.text.strip()
        removed = {
            "lines_of_long_words": sentences.LONG_WORDS, "lines_without_terminal_mark": sentences.NO_TERMINAL_MARK,
            "short_lines": sentences.SHORT, "javascript_lines": sentences.JAVASCRIPT, "policy_lines": sentences.POLICY,
        }  # fmt: skip
        return self.judged(document, measures, {name: count for name, line in removed.items() if (count := lines.counts[line])})
