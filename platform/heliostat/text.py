"""Text from outside, made fit for a terminal or a log line."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escapes control characters, line breaks, lone surrogates and what turns the direction of writing, as `\\x1b`."""
    return UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)
