"""Drops documents that are too short or too long, by characters, UTF-8 bytes, words, or lines.

Words are separated by white space. No limit is set by default, so set at least one limit. CCNet keeps 300 to 1,000,000 characters
(Wenzek et al. 2019, arXiv 1911.00359). The stage `gopher_quality` has Gopher's limits of 50 to 100,000 words.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from heliostat.curation.slices import slices
from heliostat.curation.stage import Stage, Work, by_text

UNITS = ("chars", "bytes", "words", "lines")


class Length(Stage):
    reasons: ClassVar[dict[str, str]] = {"short": "less than a least length", "long": "more than a largest length"}
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {unit: (f"min_{unit}", f"max_{unit}") for unit in UNITS}

    min_chars: int | None = Field(None, ge=0)
    """Minimum characters of a document; shorter documents are dropped (`short`)."""
    max_chars: int | None = Field(None, ge=0)
    """Maximum characters of a document; longer documents are dropped (`long`)."""
    min_bytes: int | None = Field(None, ge=0)
    """Minimum bytes of a document in UTF-8; shorter documents are dropped (`short`)."""
    max_bytes: int | None = Field(None, ge=0)
    """Maximum bytes of a document in UTF-8; longer documents are dropped (`long`)."""
    min_words: int | None = Field(None, ge=0)
    """Minimum words of a document; shorter documents are dropped (`short`)."""
    max_words: int | None = Field(None, ge=0)
    """Maximum words of a document; longer documents are dropped (`long`)."""
    min_lines: int | None = Field(None, ge=0)
    """Minimum lines of a document; shorter documents are dropped (`short`)."""
    max_lines: int | None = Field(None, ge=0)
    """Maximum lines of a document; longer documents are dropped (`long`)."""

    @model_validator(mode="after")
    def _limited(self) -> Length:
        if not self.model_fields_set:
            raise ValueError("no limit is set. Set at least one limit, such as min_words: 50")
        return self

    def open(self) -> Work:
        return by_text(self.judge)

    def judge(self, text: str) -> tuple[str, dict[str, float]]:
        sizes = {
            "chars": lambda: len(text),
            "bytes": lambda: len(text.encode("utf-8", "surrogatepass")),
            "words": lambda: sum(len(part.split()) for part in slices(text)),
            "lines": lambda: text.count("\n") + (not text.endswith("\n")),
        }
        measures, reason = dict[str, float](), ""
        for unit, (low, high) in self.thresholds.items():
            least, most = getattr(self, low), getattr(self, high)
            if least is None and most is None:
                continue
            size = measures[unit] = sizes[unit]()
            if least is not None and size < least:
                reason = reason or "short"
            if most is not None and size > most:
                reason = reason or "long"
        return reason, measures
