"""Decodes pages by the rules of two standards: https://encoding.spec.whatwg.org, and "encoding sniffing" in
https://html.spec.whatwg.org.

Evidence is used in this order: a byte-order mark, the `charset` of the Content-Type header, a `meta` element in the first 1,024
bytes, UTF-8 if the bytes are valid, and a guess from the bytes. Labels mean the same as in browsers (`latin1` is windows-1252).
"""

from __future__ import annotations

import re

_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:+-]{1,40})", re.IGNORECASE)
_META = re.compile(rb"<meta[\s/][^>]{0,1000}", re.IGNORECASE)
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
# browsers replace an encoding by its superset with more characters: vendor rows, syllables, Hong Kong's characters
_WIDER = {
    "gbk": "gb18030", "gb2312": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs", "iso8859-11": "cp874",
}  # fmt: skip
PRESCAN, HEADER = 1024, 300  # maximum bytes of a page, and maximum characters of a header, that are searched


def sniff(data: bytes, content_type: str | None = None) -> tuple[str, str]:
    """Returns Python's name for a page's encoding, and the kind of evidence for it: `mark` (a byte-order mark), `header`, `meta`,
    `utf-8`, or `looks` (a guess from the bytes)."""
    from resiliparse.parse.encoding import detect_encoding

    for mark, known in _MARKS:
        if data.startswith(mark):
            return known, "mark"
    if content_type and (match := _CHARSET.search(content_type[:HEADER])) and (named := _named(match[1])):
        return named, "header"
    for meta in _META.findall(_COMMENT.sub(b"", data[:PRESCAN])):
        if (said := _CHARSET.search(meta.decode("latin-1"))) and (encoding := _named(said[1])):
            return ("utf-8" if encoding.startswith("utf-16") else encoding), "meta"  # the page reads as ASCII, so it isn't UTF-16
    try:
        data.decode()
        return "utf-8", "utf-8"
    except UnicodeDecodeError:
        return _named(detect_encoding(data[: 1 << 16]) or "") or "cp1252", "looks"


def _named(label: str) -> str | None:
    """Returns Python's name for the encoding that browsers use for a label; None for an unknown label."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label, False)
    return _WIDER.get(name, name) if name else None


def decode(data: bytes, content_type: str | None = None) -> tuple[str, str, int]:
    """Decodes a page. Returns its text, its encoding, and the number of characters that couldn't be decoded (replaced by
    U+FFFD)."""
    encoding, _ = sniff(data, content_type)
    text = data.decode(encoding, "replace").removeprefix("\ufeff")
    wrong = text.count("\ufffd")
    if wrong:
        wrong = max(0, wrong - data.count("\ufffd".encode()) if encoding == "utf-8" else wrong)
    return text, encoding, wrong
