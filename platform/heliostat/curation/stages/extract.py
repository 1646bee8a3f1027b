"""Extracts the text of HTML pages with resiliparse (Bevendorff et al. 2018) or trafilatura (Barbaresi 2021). By default, extracts
only the main content.

resiliparse is the default. FineWeb and RefinedWeb use trafilatura (`library: trafilatura`), which takes about twenty times as
long as resiliparse, and finds the main text more accurately. Encodings follow the HTML standard (`heliostat.curation.encodings`).
A separate process parses each page, within the limits `max_seconds` and `max_memory`. If a page makes the parser hang or crash,
only this page is dropped, with a reason. The measure `boilerplate` is the share of the page's visible text that the extracted
text doesn't contain. `title` and `encoding` become columns. Text documents pass through unchanged. So do PDFs, which the stage
`pdf` reads.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import ClassVar, Literal

from pydantic import Field

from heliostat import extras
from heliostat.curation.isolated import Isolated, IsolatedError
from heliostat.curation.pdf import is_pdf
from heliostat.curation.stage import Document, Outcome, Stage
from heliostat.schema import Float


class Extract(Stage):
    changes: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("lxml_html_clean", "pypdfium2", "resiliparse", "trafilatura")
    makes: ClassVar[tuple[str, ...]] = ("encoding", "title")
    reasons: ClassVar[dict[str, str]] = {
        "no_text": "no text is left of the page",
        "too_large": "more bytes than max_bytes",
        "undecodable": "a larger share of characters that its encoding does not have than max_undecodable",
        "timeout": "it takes longer than max_seconds",
        "memory": "it takes more memory than max_memory",
        "crashed": "the parser ended its process",
        "failed": "the parser refuses the page",
    }
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"undecodable": ("max_undecodable",)}
    version: ClassVar[int] = 3  # texts are in NFC, like texts from readers

    library: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """Library that extracts the text of a page."""
    main_content: bool = True
    """Removes navigation, headers, footers, and similar content."""
    max_bytes: int = Field(16 << 20, gt=0)
    """Maximum bytes of a page; larger pages are dropped (`too_large`)."""
    max_undecodable: Float = Field(0.05, ge=0, le=1)
    """Maximum share of characters that are invalid in the page's encoding; pages with more are dropped (`undecodable`)."""
    max_seconds: Float = Field(10.0, gt=0)
    """Maximum CPU seconds per page; pages that need more are dropped (`timeout`)."""
    max_memory: int = Field(2048, ge=256)
    """Maximum address space of the parser's process, in MiB; pages that need more are dropped (`memory`,
    `crashed`)."""

    def check(self) -> None:
        needed = {"resiliparse", self.library}
        extras.require("curation", *sorted(needed), what="stage extract")

    def loaded(self) -> Callable[[Document], Outcome]:
        self.check()
        keys: dict[str, object] = {k: getattr(self, k) for k in ("library", "main_content", "max_undecodable")}
        run = Isolated("heliostat.curation.html:extractor", keys, self.max_seconds, self.max_memory)
        return lambda document: self._outcome(document, run)

    def _outcome(self, document: Document, run: Isolated) -> Outcome:
        page = document.text
        if isinstance(page, str) or is_pdf(page):
            return Outcome(document)
        if len(page) > self.max_bytes:
            return Outcome(None, "too_large", f"{len(page):,} bytes")
        try:
            about, text = run({"content_type": document.columns.get("content_type")}, page)
        except IsolatedError as e:
            return Outcome(None, e.reason, e.detail)
        measures = {
            "boilerplate": round(1 - min(about["chars"] / about["whole"], 1.0), 4) if about["whole"] else 0.0,
            "undecodable": about["wrong"] / max(len(page), 1),
        }
        if not text:
            return Outcome(None, "no_text", measures=measures)
        document.text = unicodedata.normalize("NFC", text.decode())
        document.columns |= {"encoding": about["encoding"]} | ({"title": about["title"]} if about["title"] else {})
        return Outcome(document, measures=measures)
