"""Removes lines that aren't text, with RefinedWeb's line-wise filter (Penedo et al. 2023, arXiv 2306.01116, appendix G.2).

The stage removes these lines:

- lines with mainly capitals, with only numbers, or with only one word
- counters ("3 likes")
- lines of at most ten words that begin with, end with, or contain a listed phrase ("sign in", "read more...", "items in cart")

A document that loses more than 5 % of its words is dropped. RefinedWeb removes only the phrase. This stage removes the complete
line, because removed lines are easier to trace.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import ClassVar

from pydantic import Field

from heliostat.curation.slices import LINE_END, slices
from heliostat.curation.stage import Document, Outcome, Stage, text_of
from heliostat.schema import Float

_COUNTER = re.compile(
    r"\W*[\d.,]+[KMkm]?\s+(?:likes?|shares?|comments?|retweets?|reposts?|quotes?|bookmarks?|upvotes?|downvotes?|downloads?|views?|followers?)\W*"
)
LONG_COUNTER = 100  # characters; every counter is shorter


_KINDS = {1: "lines_of_numbers", 2: "lines_of_one_word", 3: "lines_of_capitals"}  # of `line_kinds`


class Lines(Stage):
    changes: ClassVar[bool] = True
    reasons: ClassVar[dict[str, str]] = {"empty": "no line is left"}
    limits: ClassVar = {
        "removed_words": ("removed_words", "max_removed_words", "a larger share of words in removed lines than {}")
    }
    version: ClassVar[int] = 3  # with max_capitals below 0.5, lines with few capitals count, too
    needs: ClassVar = ("curation", "numba")

    max_capitals: Float = Field(0.5, ge=0, le=1)
    """Maximum share of capitals among the letters of a line. Lines with a larger share are removed, if they have at least
    `capital_letters` letters."""
    capital_letters: int = Field(5, ge=1)
    """Minimum letters of a line. `max_capitals` doesn't apply to lines with fewer letters."""
    numbers: bool = True
    """Removes lines of numbers and punctuation only."""
    counters: bool = True
    """Removes lines that only count something, such as `3 likes`."""
    single_words: bool = True
    """Removes lines of one word."""
    begins: list[str] = ["sign in", "sign-in", "sign up", "log in", "skip to content", "subscribe to"]
    """Removes short lines that begin with one of these phrases. Case doesn't matter."""
    ends: list[str] = ["read more...", "read more…", "read more", "show more", "load more", "learn more"]
    """Removes short lines that end with one of these phrases. Case doesn't matter."""
    holds: list[str] = ["items in cart", "all rights reserved", "accept cookies", "accept all cookies"]
    """Removes short lines that contain one of these phrases. Case doesn't matter."""
    short_words: int = Field(10, ge=0)
    """Maximum words of a short line, to which `begins`, `ends`, and `holds` apply."""
    max_removed_words: Float = Field(0.05, ge=0, le=1)
    """Maximum share of a document's words in removed lines; documents with a larger share are dropped
    (`removed_words`). 1 drops none."""

    def decide(self, document: Document) -> Outcome:
        from heliostat.curation.line_kinds import kinds_of_lines  # imports Numba

        text, kept, removed, words, lost = text_of(document), list[str](), Counter[str](), 0, 0
        phrases = [tuple(map(str.lower, some)) for some in (self.begins, self.ends, self.holds)]
        limits = self.numbers, self.single_words, self.capital_letters, self.max_capitals, self.short_words
        end_removed = False
        for part in slices(text, LINE_END):
            rows, more = kinds_of_lines(part, *limits)
            words, at = words + more, 0
            for begin, end, first, last, count, kind in rows:
                if why := _KINDS.get(kind) or self._why(part[first:last].lower(), phrases):
                    removed[why] += 1
                    lost += count
                    kept.append(part[at:begin])
                    at = end + 1
            end_removed = at > len(part)
            kept.append(part[at:])
        measures, counts = {"removed_words": lost / words if words else 0.0}, dict(removed)
        text = "".join(kept)
        if end_removed:  # the line before has no line end
            text = text.removesuffix("\n")
        if reason := self.failed(measures) or ("" if text.strip() else "empty"):
            return Outcome(None, reason, measures=measures, counts=counts)
        document.text = text
        return Outcome(document, measures=measures, counts=counts)

    def _why(self, line: str, phrases: list[tuple[str, ...]]) -> str:
        begins, ends, holds = phrases
        if self.counters and len(line) < LONG_COUNTER and _COUNTER.fullmatch(line):
            return "counters"
        if line.startswith(begins) or line.endswith(ends) or any(map(line.__contains__, holds)):
            return "boilerplate_lines"
        return ""
