"""Drops generated, minified, vendored, and data-like source files, with StarCoder's filters (Li et al. 2023, arXiv 2305.06161,
section 3.1; Lozhkov et al. 2024).

The stage drops a file if one of these is true:

- It has more than 100,000 lines, more than 100 characters per line on average, or a line of more than 1,000 characters. For
  HTML, JSON, Markdown, and similar formats, the average has no limit, and a line may have up to 100,000 characters.
- Fewer than 25 % of its characters are letters or digits.
- Encoded data (base64, hexadecimal, escape sequences) makes up more than half of the file, or a single sequence of encoded data
  has more than 1,024 characters.
- The file is XML, a data file of more than 512 lines, or HTML with less than 20 % visible text.
- The file's path or its first lines show that the file is generated, minified, or vendored.

The stage stores the language of each file in the column `language`.
"""

from __future__ import annotations

import re
import string
from array import array
from typing import ClassVar

import numpy as np
from pydantic import Field

from heliostat.curation import code_languages
from heliostat.curation.runs import merged, runs, table
from heliostat.curation.slices import LINE_END, slices
from heliostat.curation.stage import Document, Outcome, Stage, first_failed, text_of
from heliostat.schema import Float

LONG_LINES = {"HTML", "JSON", "Markdown", "Roff", "SMT", "TeX", "Text", "XML"}  # formats that may have long lines
FEW_LETTERS = {"Assembly", "WebAssembly"}
DATA = {"Text", "JSON", "YAML", "Web Ontology Language", "Graphviz (DOT)"}
_ENCODED = re.compile(
    r"[a-zA-Z0-9+/\n=]{64,}|(?:\\u[0-9a-fA-F]{4}){8,}|(?:(?:0x|\\x)?[0-9a-fA-F]{2}[, \n]{1,2}){8,}|(?:\\x[0-9a-fA-F]{2}){8,}"
)
_CLASSES = [  # characters of each kind of encoded data, and the minimum length
    (table(string.ascii_letters + string.digits + "+/\n="), 64),
    (table(string.hexdigits + "x\\, \n"), 24),
    (table(string.hexdigits + "\\ux"), 32),
]
_ALPHANUMERIC, _FOREIGN = (string.ascii_letters + string.digits).encode(), re.compile(r"[^\x00-\x7f]+")
_TAG = re.compile(r"<[^<>]*>")


class Code(Stage):
    makes: ClassVar[tuple[str, ...]] = ("language",)
    reasons: ClassVar[dict[str, str]] = {
        "empty": "no character in it",
        "vendored": "a path that other people's code is put at",
        "generated": "a name, or one of the first five lines, that says a program wrote it",
        "minified": "a name that says it is minified",
        "other_language": "a language that is not in `languages`",
        "many_lines": "more lines than max_lines",
        "long_lines": "lines that are longer in the mean than max_mean_line",
        "long_line": "a line that is longer than max_line (max_text_line of HTML, JSON, Markdown and the like)",
        "few_letters": "a smaller share of letters and digits than min_alphanumeric",
        "encoded": "encoded data in a run of more than max_encoded_run characters, or more than max_encoded of them",
        "xml": "an XML declaration in the first 100 characters",
        "data": "text, JSON or YAML of more than max_data_lines lines",
        "invisible": "HTML with a smaller share, or fewer characters, of visible text than min_visible and 100",
    }
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {
        "lines": ("max_lines",),
        "mean_line": ("max_mean_line",),
        "longest_line": ("max_line",),
        "alphanumeric": ("min_alphanumeric",),
        "encoded": ("max_encoded",),
    }

    languages: list[str] = []
    """Languages to keep, by GitHub's names. Empty: all languages."""
    max_lines: int = Field(100_000, ge=1)
    """Maximum lines of a file; longer files are dropped (`many_lines`)."""
    max_mean_line: Float = Field(100.0, gt=0)
    """Maximum mean characters per line; files with more are dropped (`long_lines`)."""
    max_line: int = Field(1000, ge=1)
    """Maximum characters of one line; files with a longer line are dropped (`long_line`)."""
    max_text_line: int = Field(100_000, ge=1)
    """Maximum characters of one line in HTML, JSON, Markdown, Roff, SMT, TeX, text, and XML. `max_mean_line`
    doesn't apply to these formats."""
    min_alphanumeric: Float = Field(0.25, ge=0, le=1)
    """Minimum share of letters and digits; files with less are dropped (`few_letters`). This limit doesn't apply to assembly
    code."""
    max_encoded: Float = Field(0.5, ge=0, le=1)
    """Maximum share of characters in encoded data (base64, hexadecimal, escape sequences); files with more are dropped
    (`encoded`)."""
    max_encoded_run: int = Field(1024, ge=64)
    """Maximum characters of one sequence of encoded data; files with a longer sequence are dropped (`encoded`)."""
    max_data_lines: int = Field(512, ge=1)
    """Maximum lines of text, JSON, YAML, OWL, and DOT; longer files are dropped (`data`)."""
    min_visible: Float = Field(0.2, ge=0, le=1)
    """Minimum share of visible text in HTML; files with less are dropped (`invisible`)."""
    vendored: bool = True
    """Drops vendored files: copies of other projects' code."""
    generated: bool = True
    """Drops files that a program generated, by their names or first lines."""
    minified: bool = True
    """Drops minified files, by their names."""

    def decide(self, document: Document) -> Outcome:
        """Measures a file. Returns the decision: to keep the file, with the file's language in a column, or to drop the file."""
        text, path = text_of(document), str(document.columns.get("path", document.id))
        if not text:
            return Outcome(None, "empty")
        said = document.columns.get("language")
        language = said if isinstance(said, str) and said in KNOWN else code_languages.language_of(path, text)
        reason = first_failed(
            (self.vendored and code_languages.is_vendored(path), "vendored"),
            (self.generated and code_languages.is_generated(path, text), "generated"),
            (self.minified and code_languages.is_minified(path), "minified"),
            (bool(self.languages) and language not in self.languages, "other_language"),
        )
        if reason:
            return Outcome(None, reason, language)
        reason, measures = self._judge(text, language)
        if not reason and language:
            document.columns["language"] = language
        return Outcome(None if reason else document, reason, language if reason else "", measures)

    def _judge(self, text: str, language: str) -> tuple[str, dict[str, float]]:
        lengths = np.array(array("q", (len(line) for part in slices(text, LINE_END) for line in part.splitlines())))
        encoded = _encoded(text)
        m = {
            "lines": len(lengths),
            "mean_line": int(lengths.sum()) / len(lengths),
            "longest_line": int(lengths.max()),
            "alphanumeric": _alphanumeric(text) / len(text),
            "encoded": sum(encoded) / len(text),
        }
        prose = language in LONG_LINES
        return first_failed(
            (m["lines"] > self.max_lines, "many_lines"),
            (not prose and m["mean_line"] > self.max_mean_line, "long_lines"),
            (m["longest_line"] > (self.max_text_line if prose else self.max_line), "long_line"),
            (m["alphanumeric"] < self.min_alphanumeric and language not in FEW_LETTERS, "few_letters"),
            (m["encoded"] > self.max_encoded or max(encoded, default=0) > self.max_encoded_run, "encoded"),
            (language not in ("XSLT", "SVG") and "<?xml version=" in text[:100], "xml"),
            (language in DATA and m["lines"] > self.max_data_lines, "data"),
            (language == "HTML" and self._invisible(text), "invisible"),
        ), m

    def _invisible(self, text: str) -> bool:
        visible = len("".join(_TAG.sub("", text).split()))
        return visible < 100 or visible < self.min_visible * len(text)


def _encoded(text: str) -> list[int]:
    """Returns the lengths of the matches of `_ENCODED`. Each match is in a long run of characters of one kind."""
    spans = merged(sorted(span for characters, least in _CLASSES for span in runs(text, characters, least)))
    return [match.end() - match.start() for start, end in spans for match in _ENCODED.finditer(text, start, end)]


def _alphanumeric(text: str) -> int:
    plain = text.encode("ascii", "ignore")
    return len(plain) - len(plain.translate(None, _ALPHANUMERIC)) + sum(map(str.isalnum, "".join(_FOREIGN.findall(text))))


KNOWN = set(code_languages.BY_SUFFIX.values()) | set(code_languages.BY_NAME.values())
