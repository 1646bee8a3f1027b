"""Extracts the text of PDFs, in drawing order, with PDFium (the library of Chromium).

Files that end in `.pdf` are read only if a pipeline has this stage. Words that are hyphenated at line ends are joined, and an
empty line separates pages. heliostat has no OCR: a scanned document without a text layer is dropped as `no_text`. The stage
counts pages without text. Columns on a page keep the order of the file, which is usually right. Tables lose their rows and
columns. A separate process reads each document, within the limits `max_seconds` and `max_memory`. If a document makes the library
hang or crash, or decompresses to gigabytes, only this document is dropped, with a reason. A document with a password is dropped
as `encrypted`. `pages` and `title` become columns. Other documents pass through unchanged.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from heliostat.curation.isolated import Isolated, IsolatedError
from heliostat.curation.pdf import is_pdf
from heliostat.curation.stage import Document, Outcome, Stage
from heliostat.schema import Float


class Pdf(Stage):
    changes: ClassVar[bool] = True
    makes: ClassVar[tuple[str, ...]] = ("pages", "title")
    reasons: ClassVar[dict[str, str]] = {
        "no_text": "no text on any page, as of scanned ones",
        "encrypted": "a password is needed",
        "too_many_pages": "more pages than max_pages",
        "too_large": "more text than 64 MiB",
        "timeout": "it takes longer than max_seconds",
        "memory": "it takes more memory than max_memory",
        "crashed": "the library ended its process, as where max_memory is not enough",
        "failed": "it is no PDF that can be read",
    }
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"pages": ("max_pages",)}
    version: ClassVar[int] = 2  # texts are in NFC, like texts from readers
    needs: ClassVar = ("curation", "pypdfium2")
    libraries: ClassVar[tuple[str, ...]] = ("pypdfium2",)

    max_pages: int = Field(5000, ge=1)
    """Maximum pages of a document; longer documents are dropped (`too_many_pages`)."""
    max_seconds: Float = Field(60.0, gt=0)
    """Maximum CPU seconds per document; documents that need more are dropped (`timeout`)."""
    max_memory: int = Field(2048, ge=256)
    """Maximum address space of the library's process, in MiB; documents that need more are dropped (`memory`,
    `crashed`)."""

    def loaded(self) -> Callable[[Document], Outcome]:
        self.check()
        run = Isolated("heliostat.curation.pdf:reader", {"max_pages": self.max_pages}, self.max_seconds, self.max_memory)
        return lambda document: _outcome(document, run)


def _outcome(document: Document, run: Isolated) -> Outcome:
    data = document.text
    if isinstance(data, str) or not (is_pdf(data) or document.id.lower().endswith(".pdf")):
        return Outcome(document)
    try:
        about, text = run({}, data)
    except IsolatedError as e:
        return Outcome(None, e.reason, e.detail)
    measures = {"pages": float(about["pages"])}
    counts = {f"pages_{what}": about[what] for what in ("failed", "empty") if about[what]}
    if not text:
        return Outcome(None, "no_text", f"{about['pages']:,} pages", measures, counts)
    document.text = unicodedata.normalize("NFC", text.decode())
    document.columns |= {"pages": about["pages"]} | ({"title": about["title"]} if about["title"] else {})
    return Outcome(document, measures=measures, counts=counts)
