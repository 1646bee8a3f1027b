"""Drops documents that contain words from a list, like C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2).

The lists are files with one word or phrase per line; heliostat doesn't include any list. Matching ignores case, and finds only
complete words: no letter, digit, or underscore may be directly before or after a match. For languages without spaces,
`whole_words: false` matches anywhere. A document with more than `max_found` matches is dropped; repeated words count each time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from heliostat.curation.stage import Document, Outcome, Stage, text_of
from heliostat.tasks import files

_WORD = re.compile(r"\w+")


class BadWords(Stage):
    limits: ClassVar = {"bad_word": ("bad_words", "max_found", "more words of the lists than {}")}
    paths: ClassVar[tuple[str, ...]] = ("lists",)

    lists: list[str] = Field(min_length=1)
    """Files of words and phrases, one per line."""
    whole_words: bool = True
    """Matches complete words only. Set `whole_words` to false for languages without spaces between words."""
    max_found: int = Field(0, ge=0)
    """Maximum matches in a document; documents with more are dropped (`bad_word`)."""

    def check(self) -> None:
        self._entries()

    def _entries(self) -> list[str]:
        return sorted({entry.lower() for path in self.lists for entry in files.entries("lists", path)})

    def loaded(self) -> Callable[[Document], Outcome]:
        entries = self._entries()
        find = _whole_words(entries) if self.whole_words else lambda text: [e for e in entries for _ in range(text.count(e))]

        def outcome(document: Document) -> Outcome:
            matches = find(text_of(document).lower())
            judged = self.judged(document, {"bad_words": float(len(matches))})
            judged.detail = ", ".join(sorted(set(matches))[:3]) if judged.reason else ""
            return judged

        return outcome


def _whole_words(entries: list[str]) -> Callable[[str], list[str]]:
    """Returns a function that lists the entries that a text contains as complete words, once per occurrence.

    The function looks up single words in a set. It searches for a phrase only if the phrase's first word is in the text.
    """
    single = {e for e in entries if _WORD.fullmatch(e)}
    phrases = defaultdict[str, list[str]](list)
    for entry in entries:
        if entry not in single:
            first = _WORD.search(entry)
            phrases[first[0] if first else ""].append(entry)
    signs = phrases.pop("", [])

    def find(text: str) -> list[str]:
        words = _WORD.findall(text)
        seen = set(words)
        matches = [w for w in words if w in single] if not single.isdisjoint(seen) else []
        near = [p for first in seen & phrases.keys() for p in phrases[first]] + signs
        return matches + [p for p in near for _ in range(_count(text, p))]

    return find


def _count(text: str, phrase: str) -> int:
    count, at = 0, text.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        count += not _joins(text[at - 1 : at]) and not _joins(text[end : end + 1])
        at = text.find(phrase, end)
    return count


def _joins(character: str) -> bool:
    return character.isalnum() or character == "_"
