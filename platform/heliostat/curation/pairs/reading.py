"""Reads pairs of texts from files, in a Ray task: extracts pairs from code and pages, or reads pairs from records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from heliostat.curation import readers
from heliostat.curation.encodings import decode
from heliostat.curation.pairs import extracting
from heliostat.curation.pieces import FilePart
from heliostat.curation.stage import Document, Dropped
from heliostat.curation.text import documents, sources
from heliostat.curation.text.tasks import TextSource

QUERY, KIND = "query", "kind"  # columns of a pair, in addition to its text
DOCSTRING, SECTION, RECORD = "docstring", "section", "record"  # kinds
REASONS = {
    "unparsed": "code that this version of Python can't parse, or a page that can't be parsed",
    "no_pairs": "neither functions with docstrings nor titles",
    "no_query": "a record without a string in its query column",
    "short_query": "a query of fewer than min_query_words words",
    "short_text": "a text of fewer than min_text_words words",
    "same": "a query that is equal to its text",
}


@dataclass(frozen=True)
class Least:
    """Holds the minimum number of words for the query and for the text of a pair."""

    query: int
    text: int


@dataclass(frozen=True)
class PairSource(TextSource):
    """Reads the pairs of an input. Each pair is a document, with the query as a column."""

    by_text: ClassVar[bool] = False  # a stage may change the query

    query_column: str
    least: Least

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        path = part.path or sources.root(self.input).name
        suffix, number = readers.suffix_of(path) or "", readers.numbered(path)
        for item in super().read(part):
            if isinstance(item, Dropped):
                yield item
            elif isinstance(item.text, str) and number != "":
                yield self._record(item)
            else:
                yield from self._paired(item, suffix)

    def finish(self, document: Document) -> Document | Dropped:
        return self._fit(document)

    def _record(self, item: Document) -> Document | Dropped:
        query = item.columns.get(self.query_column)
        return self._pair(item.id, RECORD, query, item.text) if isinstance(query, str) else Dropped(item.id, "no_query")

    def _paired(self, item: Document, suffix: str) -> Iterator[Document | Dropped]:
        """Yields the pairs of one document, or a `Dropped` with the reason if the document has no pairs."""
        kind = DOCSTRING if suffix == ".py" else SECTION
        try:
            pairs = list(_find(item.text, suffix))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            yield Dropped(item.id, "unparsed", f"{type(e).__name__}: {e}"[:200])
            return
        if not pairs:
            yield Dropped(item.id, "no_pairs")
        for pair in pairs:
            yield self._pair(f"{item.id}#{pair.line}", kind, pair.query, pair.text)

    def _pair(self, id: str, kind: str, query: str, text: str | bytes) -> Document | Dropped:
        question = documents.clean(id, query, documents.TextRules(normalise=self.rules.normalise))
        answer = documents.clean(id, text, self.rules)
        if isinstance(question, Dropped):
            return Dropped(id, "short_query" if question.reason == "empty" else question.reason, "of the query")
        if isinstance(answer, Dropped):
            return Dropped(id, "short_text") if answer.reason == "empty" else answer
        return self._fit(Document(id, answer.text, {QUERY: question.text, KIND: kind}))

    def _fit(self, pair: Document) -> Document | Dropped:
        """Returns the pair, or a `Dropped` with the reason: the query or the text has too few words, or both are equal."""
        assert isinstance(pair.text, str)
        if len(pair.columns[QUERY].split()) < self.least.query:
            return Dropped(pair.id, "short_query")
        if len(pair.text.split()) < self.least.text:
            return Dropped(pair.id, "short_text")
        return Dropped(pair.id, "same") if pair.columns[QUERY].strip() == pair.text.strip() else pair


def _find(text: str | bytes, suffix: str) -> Iterator[extracting.Pair]:
    """Finds the pairs in an HTML page (bytes), or in a Python or Markdown file (a string); `suffix` selects the parser."""
    if isinstance(text, bytes):
        return extracting.html(decode(text, None)[0])
    return {".py": extracting.docstrings, ".md": extracting.markdown}.get(suffix, lambda _: iter(()))(text)
