"""Makes stages of rules that look at a document's text, and keep it as it is or name the reason why not."""

from __future__ import annotations

from collections.abc import Callable

from heliostat.curation.stage import Document, Outcome, Work
from heliostat.errors import ConfigError

Judge = Callable[[str], tuple[str, dict[str, float]]]
"""Returns the reason to drop a text ("" to keep it), and the measures it was decided by."""


def text_of(document: Document) -> str:
    """Returns a document's text; ConfigError if it is bytes still."""
    if isinstance(document.text, bytes):
        raise ConfigError(f"stages: {document.id} is bytes, not text; put `extract` or `pdf` before stages that look at text")
    return document.text


def by_text(judge: Judge) -> Work:
    """Builds a stage's function of a judge: a document is kept untouched, or dropped."""

    def work(documents: list[Document]) -> list[Outcome]:
        out = []
        for document in documents:
            reason, measures = judge(text_of(document))
            out.append(Outcome(None if reason else document, reason, measures=measures))
        return out

    return work


def first_failed(*rules: tuple[bool, str]) -> str:
    """Returns the reason of the first rule that failed; "" if none did."""
    return next((reason for failed, reason in rules if failed), "")
