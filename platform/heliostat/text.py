"""Makes untrusted text safe for a terminal: file names, samples, captions, messages of a library or a server."""

from __future__ import annotations

import difflib
import re

# C0 and C1 control characters and DEL; separators of lines and paragraphs; marks, embeddings, overrides and isolates of direction
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 300


def printable(text: str, lines: bool = False) -> str:
    """Escapes everything in the text that moves a terminal's cursor, colors it, or reverses its direction.

    `lines`: keeps line breaks and tabs.
    """
    return UNSAFE.sub(lambda match: match[0] if lines and match[0] in "\n\t" else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def plural(count: float, noun: str) -> str:
    """Formats a count with its noun: `1 node`, `2 nodes`."""
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def brief(text: object, longest: int = LONGEST) -> str:
    """Cuts a text to its first line, printable, with at most `longest` characters: the part of a library's message for an
    error."""
    said = str(text).strip() or (type(text).__name__ if isinstance(text, BaseException) else "")
    line = said.splitlines()[0].strip() if said else ""
    shown = printable(line[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[: longest - 4]} ..."


def nearest(word: str, choices: list[str]) -> str:
    """Suggests the nearest choice as `; did you mean 'x'?`.

    Lists all choices if none is near, and returns nothing if there are none, or more than 30.
    """
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(sorted(choices))}" if 0 < len(choices) <= 30 else ""
