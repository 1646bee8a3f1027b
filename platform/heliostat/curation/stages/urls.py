"""Drops documents by their URL: RefinedWeb's URL filter (Penedo et al. 2023, arXiv 2306.01116, appendix G.1).

The lists are files with one entry per line; heliostat has none of its own. `domains` are blocked with all subdomains, `urls`
exactly (except scheme, `www.`, a final slash, and case). A URL with one of `words` in it as a whole word is dropped, one with
more than `max_soft_words` of `soft_words` too, and one with any of `parts` anywhere in it. The URL is read from the column
`url`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from heliostat.curation.stage import Document, Outcome, Stage
from heliostat.tasks import files

_LISTS = ("domains", "urls", "words", "soft_words", "parts")
_WORD = re.compile(r"[^\W_]+")


class Urls(Stage):
    reasons: ClassVar[dict[str, str]] = {
        "domain": "the host, or one above it, is in `domains`",
        "url": "the URL is in `urls`",
        "word": "a word of the URL is in `words`",
        "soft_words": "more words of the URL are in `soft_words` than max_soft_words",
        "part": "an entry of `parts` is in the URL",
        "no_url": "no URL, where `required` is set",
    }
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"soft_words": ("max_soft_words",)}
    paths: ClassVar[tuple[str, ...]] = _LISTS

    domains: list[str] = []
    """Files of hosts, one per line; a host also blocks its subdomains."""
    urls: list[str] = []
    """Files of URLs, one per line."""
    words: list[str] = []
    """Files of words, one per line; any of them drops a URL."""
    soft_words: list[str] = []
    """Files of words, one per line; more than `max_soft_words` of them drop a URL."""
    parts: list[str] = []
    """Files of strings, one per line; any of them drops a URL, wherever it is in it."""
    max_soft_words: int = Field(1, ge=0)
    """Maximum number of different soft words in a URL; URLs with more are dropped (`soft_words`)."""
    required: bool = False
    """Drops documents without a URL (`no_url`)."""

    @model_validator(mode="after")
    def _one(self) -> Urls:
        if not self.required and not any(getattr(self, key) for key in _LISTS):
            raise ValueError(f"set at least one list: {', '.join(_LISTS)}")
        return self

    def check(self) -> None:
        self._sets()

    def _sets(self) -> dict[str, set[str]]:
        return {k: {e.lower() for path in getattr(self, k) for e in files.entries(k, path)} for k in _LISTS}

    def loaded(self) -> Callable[[Document], Outcome]:
        sets = self._sets()
        sets["urls"] = {_bare(url) for url in sets["urls"]}
        sets["domains"] = {domain.strip(".").removeprefix("www.") for domain in sets["domains"]}
        return lambda document: self._outcome(document, sets)

    def _outcome(self, document: Document, sets: dict[str, set[str]]) -> Outcome:
        url = document.columns.get("url")
        if not isinstance(url, str) or not url.strip():
            return Outcome(None, "no_url") if self.required else Outcome(document)
        url = url.strip().lower()
        words = set(_WORD.findall(url))
        soft = words & sets["soft_words"]
        reason, detail = "", ""
        if (host := next((h for h in _hosts(url) if h in sets["domains"]), None)) is not None:
            reason, detail = "domain", host
        elif _bare(url) in sets["urls"]:
            reason, detail = "url", url
        elif listed_words := words & sets["words"]:
            reason, detail = "word", min(listed_words)
        elif len(soft) > self.max_soft_words:
            reason, detail = "soft_words", ", ".join(sorted(soft)[:3])
        elif part := next((p for p in sorted(sets["parts"]) if p in url), ""):
            reason, detail = "part", part
        return Outcome(None if reason else document, reason, detail, {"soft_words": len(soft)})


def _bare(url: str) -> str:
    return url.partition("://")[2].removeprefix("www.").rstrip("/") if "://" in url else url.removeprefix("www.").rstrip("/")


def _hosts(url: str) -> list[str]:
    """Returns a URL's host, and its parent domains; empty if it can't be parsed."""
    try:
        host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:
        return []
    parts = host.strip(".").split(".")
    return [".".join(parts[i:]) for i in range(min(len(parts), 64))]
