"""Normalizes the text of a document, or returns the reason to drop the document. Invalid data never raises an error."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from heliostat.curation import readers
from heliostat.curation.readers import Limits
from heliostat.curation.stage import Document, Dropped
from heliostat.tasks.care import CRASHED, MEANING, UNREAD, UNREAD_MEANING

__all__ = ["REASONS", "Document", "Dropped", "TextRules", "clean"]
REASONS = {
    **readers.REASONS,
    "too_short": "fewer than min_chars characters",
    "too_long": "more than max_chars characters",
    CRASHED: MEANING,
    UNREAD: UNREAD_MEANING,
}
Form = Literal["none", "NFC", "NFKC"]


@dataclass(frozen=True)
class TextRules(Limits):
    """Defines the requirements for a document's text, such as the minimum number of characters, in addition to the size limits of
    reading."""

    max_file_bytes: int = 1 << 40
    columns: tuple[str, ...] = ()
    normalise: Form = "NFC"
    min_chars: int = 1
    max_chars: int | None = None


def clean(id: str, raw: bytes | str, rules: TextRules, columns: dict[str, Any] | None = None) -> Document | Dropped:
    """Normalizes a document's text to a Unicode normal form, without a byte-order mark. Doesn't change line ends. Returns the
    document, or a `Dropped` with the reason."""
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        text.encode()  # JSON can contain lone surrogates, which UTF-8 can't encode
    except UnicodeError:
        return Dropped(id, "not_utf8")
    if "\0" in text:
        return Dropped(id, "binary")
    if rules.normalise != "none":
        text = unicodedata.normalize(rules.normalise, text)
    if not text.strip():
        return Dropped(id, "empty")
    if len(text) < rules.min_chars:
        return Dropped(id, "too_short")
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return Dropped(id, "too_long")
    return Document(id, text, columns or {})
