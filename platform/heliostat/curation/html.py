"""Extracts text from HTML pages, with resiliparse or trafilatura; runs in a separate process (`heliostat.curation.isolated`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from typing_extensions import TypedDict

from heliostat.curation.encodings import decode


class ExtractKeys(TypedDict):
    library: Literal["resiliparse", "trafilatura"]
    main_content: bool
    max_undecodable: float


Answer = tuple[dict[str, object], bytes]


def extractor(keys: ExtractKeys) -> Callable[[dict[str, object], bytes], Answer]:
    """Builds a function that extracts the text of an HTML page. The function takes (facts about the page, bytes of the page), and
    returns (facts to record, text in UTF-8). `keys`: the keys of the stage."""
    extract = {"resiliparse": _resiliparse, "trafilatura": _trafilatura}[keys["library"]](keys)

    def work(about: dict[str, object], data: bytes) -> Answer:
        page, encoding, wrong = decode(data, content_type if isinstance(content_type := about.get("content_type"), str) else None)
        if wrong > keys["max_undecodable"] * max(len(page), 1):
            return {"error": "undecodable", "detail": f"{wrong:,} of {len(page):,} characters are no {encoding}"}, b""
        text, whole, title = extract(page)
        answer = {"encoding": encoding, "wrong": wrong, "chars": len(text), "whole": whole, "title": title}
        return answer, text.encode("utf-8", "replace")

    return work


def _resiliparse(keys: ExtractKeys) -> Callable[[str], tuple[str, int, str]]:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    def extract(page: str) -> tuple[str, int, str]:
        tree = HTMLTree.parse(page)
        whole = extract_plain_text(tree, alt_texts=False)
        text = extract_plain_text(tree, main_content=True, alt_texts=False) if keys["main_content"] else whole
        return _clean(text), len(whole), (tree.title or "").strip()

    return extract


def _trafilatura(keys: ExtractKeys) -> Callable[[str], tuple[str, int, str]]:
    from resiliparse.extract.html2text import extract_plain_text
    from trafilatura import extract as trafilatura_extract
    from trafilatura import html2txt
    from trafilatura.utils import load_html

    def extract(page: str) -> tuple[str, int, str]:
        tree = load_html(page)
        if tree is None:
            return "", 0, ""
        title = (tree.findtext(".//title") or "").strip()
        whole = extract_plain_text(page, alt_texts=False)
        if not keys["main_content"]:
            return _clean(html2txt(tree) or ""), len(whole), title
        text = trafilatura_extract(tree, favor_precision=True, include_comments=False, deduplicate=False)
        return _clean(text or ""), len(whole), title

    return extract


def _clean(text: str) -> str:
    return text.replace("\0", "").strip()
