"""Drops documents whose URL matches a list, with RefinedWeb's URL filter (Penedo et al. 2023, arXiv 2306.01116, appendix G.1).

The lists are files with one entry per line; heliostat doesn't include any list. The URL is read from the column `url`. A document
is dropped if one of these is true:

- The host, or one of its parent domains, is in `domains`.
- The URL is in `urls`. The scheme, `www.`, a final slash, and case don't matter.
- The URL contains one of `words` as a complete word.
- The URL contains more than `max_soft_words` of `soft_words`.
- The URL contains one of `parts` anywhere.
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
    """Files of hosts, one per line. URLs of these hosts and of their subdomains are dropped (`domain`)."""
    urls: list[str] = []
    """Files of URLs, one per line. Documents with one of these URLs are dropped (`url`)."""
    words: list[str] = []
    """Files of words, one per line. URLs with one of these words are dropped (`word`)."""
    soft_words: list[str] = []
    """Files of words, one per line. URLs with more than `max_soft_words` of these words are dropped (`soft_words`)."""
    parts: list[str] = []
    """Files of strings, one per line. URLs that contain one of these strings anywhere are dropped (`part`)."""
    max_soft_words: int = Field(1, ge=0)
    """Maximum number of different soft words in a URL; URLs with more are dropped (`soft_words`)."""
    required: bool = False
    """Drops documents without a URL (`no_url`)."""

    @model_validator(mode="after")
    def _one(self) -> Urls:
        if not self.required and not any(getattr(self, key) for key in _LISTS):
            raise ValueError(f"no list is set. Set at least one of {', '.join(_LISTS)}")
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
    """Returns a URL's host and the host's parent domains, such as `a.b.com`, `b.com`, `com`; an empty list if the URL can't be
    parsed."""
    try:
        host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:
        return []
    parts = host.strip(".").split(".")
    return [".".join(parts[i:]) for i in range(min(len(parts), 64))]
