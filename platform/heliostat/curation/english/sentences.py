"""Counts sentences as spaCy's sentencizer does: one begins at the first word behind a terminal that is not punctuation itself."""

from __future__ import annotations

import unicodedata

import regex

from heliostat.curation.english.tokens import tokens
from heliostat.curation.english.words import TERMINALS

MOST_PARTS, LONG_PART = 1 << 19, 64  # that are remembered, and the characters of one that is not
_PLAIN = (0, False, 1, False)  # a word
_OTHER_SPACE = regex.compile(r"[^\S ]")
_parts: dict[str, tuple[int, bool, int, bool]] = {"": _PLAIN}  # between two spaces: what is no word, yet begins a sentence


def count(text: str) -> int:
    """Counts the sentences of a text; 0 if there is nothing in it but white space."""
    parts = regex.split(r" |([^\S ]\s*)", text) if _OTHER_SPACE.search(text) else text.split(" ")
    if not text or text.isspace():
        return 0
    if len(_parts) > MOST_PARTS:
        _parts.clear()
        _parts[""] = _PLAIN
    found, ended = 1, False
    for part in parts:
        if part is None:
            continue
        effect = _parts.get(part)
        if effect is None:
            effect = _effect(part)
            if len(part) <= LONG_PART:
                _parts[part] = effect
        if ended:
            found += effect[2]
            ended = effect[3]
        else:
            found += effect[0]
            ended = effect[1]
    return found


def _effect(part: str) -> tuple[int, bool, int, bool]:
    """Computes how many sentences begin in a part, and whether it ends one: if none has ended before it, and if one has."""
    if part.isalnum() or part.isspace():
        return _PLAIN
    words = tokens(part)
    begun, ended = _run(words, False)
    begun_behind, ended_behind = _run(words, True)
    return begun, ended, begun_behind, ended_behind


def _run(words: tuple[str, ...], ended: bool) -> tuple[int, bool]:
    begun = 0
    for word in words:
        if word in TERMINALS:
            ended = True
        elif ended and not is_punctuation(word):
            begun, ended = begun + 1, False
    return begun, ended


def is_punctuation(word: str) -> bool:
    """Checks whether all characters of a word are punctuation, as Unicode has it."""
    return all(unicodedata.category(c)[0] == "P" for c in word)
