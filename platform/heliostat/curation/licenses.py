"""Finds the license of a file: from the SPDX id in the file, otherwise from the nearest folder above the file that has license
files.

A license file counts only if all its words match the license's text (`identify` has the 35 texts of choosealicense.com). SPDX
allows differences in titles, copyright lines, names of holders, list marks, and the FSF's addresses. The text after the terms
may be missing. A license text with changes or additions counts as NOASSERTION, SPDX's word for unknown. A file without any
license file above it is NONE. Several license files in one folder are joined by AND.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from heliostat.curation.code_languages import BY_SUFFIX

NONE, UNKNOWN = "NONE", "NOASSERTION"
MOST = 1 << 18  # maximum bytes of a license file
HEAD = 4000  # characters at a file's start in which its SPDX id is searched
_NAME = re.compile(r"(?:un)?licen[cs]es?(?:[-_.].*)?|(?:.+[-_])?licen[cs]e|copying(?:[-_.].*)?", re.IGNORECASE)
_PROSE = {"Text", "Markdown", "reStructuredText"}
_OWN = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9(][A-Za-z0-9.+() -]{0,98}[A-Za-z0-9.+)])")
_COPYRIGHT = re.compile(
    r"^[^\w\n]*(?:(?:portions )?copyright(?: (?:notice|and license))?\s*(?:\(c\)|©|[12]\d{3}|\[|<|\{|by\b)|\(c\)|©"
    r"|all rights reserved|\d+ (?:temple place|franklin st|mass ave)|boston, ma|<?https?://fsf\.org/?>?$).*$",
    re.IGNORECASE | re.MULTILINE,
)
_MARK = re.compile(r"^[ \t]*(?:\(?(?:\d{1,2}|[a-z])[.)]|[*•-])[ \t]+", re.IGNORECASE | re.MULTILINE)
_END = re.compile(r"end of (?:the )?terms and conditions", re.IGNORECASE)
_HOLDERS = (
    (re.compile(r"\bprovided by .{1,120}? as is\b"), "provided by holder as is"),
    (re.compile(r"\bin no event shall .{1,160}? be liable\b"), "in no event shall holder be liable"),
    (re.compile(r"\bneither the names? of .{1,200}? may be used\b"), "neither the name of holder may be used"),
    (re.compile(r"\bwrite to the free software foundation inc\b(?: \d+ [a-z ]{1,40}(?:boston|cambridge) ma \d{5}(?: \d{4})?"
                r"(?: usa)?)?|\bsee http www gnu org licenses\b"), "ask the fsf"),
    (re.compile(r"\b(?:ty coon|moe ghoul)\b"), "name"),
)  # fmt: skip
_TITLE = set(re.findall(r"\w+", "the mit x11 expat isc bsd 2 3 clause two three new simplified revised modified zlib boost"
                                " software version 1 0 license licence licensed under terms of is this project"))  # fmt: skip
_TITLE_WORDS = 12


def is_license_file(path: str) -> bool:
    """Checks whether a file's name is that of a license file, such as LICENSE, COPYING.LESSER, or LICENSE-MIT.txt, but not
    license.py."""
    name = path.rpartition("/")[2]
    suffix = name.rpartition(".")[2].lower()
    code = "." in name and suffix in BY_SUFFIX and BY_SUFFIX[suffix] not in _PROSE
    stem = name[: -len(suffix) - 1] if "." in name and BY_SUFFIX.get(suffix) in _PROSE else name
    return not code and _NAME.fullmatch(stem) is not None


def spdx_of(text: str) -> str | None:
    """Returns the SPDX id of a license's text; None if the text isn't a known license, or was edited."""
    words = normalised(text).split()
    for length, known in _by_length().items():
        if length <= len(words) <= length + _TITLE_WORDS and (license := known.get(" ".join(words[-length:]))):
            return license if set(words[:-length]) <= _TITLE else None
    return None


def normalised(text: str) -> str:
    """Reduces a license's text to the words that are compared. Removes list marks, copyright lines, and names of holders."""
    body = _MARK.sub("", _COPYRIGHT.sub("", text.lower().replace("https://", "http://")))
    words = " ".join(re.findall(r"[a-z0-9]+", body))
    for pattern, holder in _HOLDERS:
        words = pattern.sub(holder, words)
    return words


@lru_cache(maxsize=1)
def _by_length() -> dict[int, dict[str, str]]:
    """Returns the known license texts: number of words of a text (without its title) -> the text's words -> SPDX id."""
    from identify.vendor.licenses import LICENSES

    by_length: dict[int, dict[str, str]] = {}
    for id, text in LICENSES:
        end = _END.search(text)
        for form in (text, *((text[: end.start()], text[: end.end()]) if end else ())):
            words = normalised(form).split()
            body = words[next(i for i, word in enumerate(words) if word not in _TITLE) :]
            by_length.setdefault(len(body), {})[" ".join(body)] = id
    return by_length


class Licenses:
    """Collects the license files of a repository, and finds those that apply to a file."""

    def __init__(self) -> None:
        self._by_folder: dict[str, set[str]] = {}

    def add(self, path: str, text: str) -> None:
        self._by_folder.setdefault(path.rpartition("/")[0], set()).add(spdx_of(text) or UNKNOWN)

    def of(self, path: str, text: str) -> str:
        if own := _OWN.search(text[:HEAD]):
            return own[1]
        licenses: set[str] = next((self._by_folder[folder] for folder in _above(path) if folder in self._by_folder), set())
        return UNKNOWN if UNKNOWN in licenses else " AND ".join(sorted(licenses)) or NONE


def _above(path: str) -> Iterator[str]:
    """Yields the folders above a file, the nearest first; "" is the repository's root."""
    while path:
        path = path.rpartition("/")[0]
        yield path
