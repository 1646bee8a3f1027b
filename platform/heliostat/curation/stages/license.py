"""Keeps documents with permissive licenses, by the SPDX expression in their column `license`, like The Stack (Kocetkov et al.
2022, arXiv 2211.15533, section 3.1).

The key `allow` sets the licenses to keep. An expression with OR needs an allowed license on one side; an expression with AND
needs allowed licenses on both sides. License exceptions (WITH) are ignored, because an exception only adds rights. A list of
expressions means AND. `NOASSERTION`, an empty column, and an invalid expression count as unknown. `NONE` marks a document without
any license.
"""

from __future__ import annotations

import re
from typing import ClassVar

from heliostat.curation.licenses import NONE, UNKNOWN
from heliostat.curation.stage import Document, Outcome, Stage

_TOKEN = re.compile(r"\s*([()]|[A-Za-z0-9.+:-]+)")
MOST, DEEP = 1000, 50  # maximum characters, and nested parentheses, of an expression
PERMISSIVE = [
    "0BSD", "AFL-3.0", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSD-3-Clause-Clear", "BSL-1.0", "CC0-1.0",
    "ECL-2.0", "ISC", "MIT", "MIT-0", "NCSA", "PostgreSQL", "UPL-1.0", "Unlicense", "WTFPL", "Zlib",
]  # fmt: skip


class License(Stage):
    libraries: ClassVar[tuple[str, ...]] = ("identify",)
    reasons: ClassVar[dict[str, str]] = {
        "not_allowed": "a licence that is not in `allow`",
        "unknown": "a licence that is not known, or no column `license`",
        "none": "no licence was found for it",
    }

    allow: list[str] = PERMISSIVE
    """SPDX ids of the licenses to keep."""
    keep_unknown: bool = False
    """Keeps documents with an unknown license (`NOASSERTION`)."""
    keep_none: bool = False
    """Keeps documents without a license (`NONE`)."""

    def decide(self, document: Document) -> Outcome:
        said = expression(document.columns.get("license"))
        if said == NONE:
            return Outcome(document, counts={"none": 1}) if self.keep_none else Outcome(None, "none")
        allowed = None if UNKNOWN in said else allows(said, {id.lower() for id in self.allow})
        if allowed is None:
            return Outcome(document, counts={"unknown": 1}) if self.keep_unknown else Outcome(None, "unknown", said[:100])
        return Outcome(document) if allowed else Outcome(None, "not_allowed", said[:100])


def expression(value: object) -> str:
    if isinstance(value, list):
        return " AND ".join(f"({part})" for part in value) or NONE
    return value.strip() if isinstance(value, str) else ""


def allows(said: str, allowed: set[str]) -> bool | None:
    """Checks whether an SPDX expression is allowed; None if the expression is invalid."""
    tokens, at = list[str](), 0
    while at < len(said) <= MOST and (match := _TOKEN.match(said, at)):
        tokens.append(match[1])
        at = match.end()
    if at < len(said) or not tokens or tokens.count("(") > DEEP:
        return None
    try:
        found_value = _either(tokens, allowed)
    except (IndexError, ValueError):
        return None
    return None if tokens else found_value


def _either(tokens: list[str], allowed: set[str]) -> bool:
    value = _both(tokens, allowed)
    while tokens and tokens[0].upper() == "OR":
        tokens.pop(0)
        value = _both(tokens, allowed) or value
    return value


def _both(tokens: list[str], allowed: set[str]) -> bool:
    value = _one(tokens, allowed)
    while tokens and tokens[0].upper() == "AND":
        tokens.pop(0)
        value = _one(tokens, allowed) and value
    return value


def _one(tokens: list[str], allowed: set[str]) -> bool:
    token = tokens.pop(0)
    if token == "(":
        value = _either(tokens, allowed)
        if tokens.pop(0) != ")":
            raise ValueError
        return value
    if token == ")" or token.upper() in ("AND", "OR", "WITH"):
        raise ValueError
    if tokens and tokens[0].upper() == "WITH":
        tokens.pop(0)
        _one(tokens, allowed)
    return token.lower() in allowed
