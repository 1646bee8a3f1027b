"""Reads the text of PDFs with PDFium; runs in a separate process (`heliostat.curation.isolated`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pypdfium2 import PdfPage

Answer = tuple[dict[str, object], bytes]
HEAD = 1024  # bytes at the start that contain a PDF's first line
PASSWORD = 4  # PDFium's error code for a missing password
TEXT_BYTES = 64 << 20  # maximum bytes of a document's text
JOINED = str.maketrans({"\ufffe": None, "\0": None})  # U+FFFE stands for the hyphen of a word that continues in the next line


def is_pdf(data: bytes) -> bool:
    return b"%PDF-" in data[:HEAD]


def reader(keys: dict[str, int]) -> Callable[[dict[str, object], bytes], Answer]:
    """Builds a function that extracts the text of a PDF. The function takes (facts about the file, bytes of the PDF), and returns
    (facts to record, text in UTF-8). `keys`: the keys of the stage."""
    import pypdfium2

    def work(about: dict[str, object], data: bytes) -> Answer:
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as e:
            reason = "encrypted" if e.err_code == PASSWORD else "failed"
            return {"error": reason, "detail": str(e)}, b""
        pages = len(document)
        if pages > keys["max_pages"]:
            return {"error": "too_many_pages", "detail": f"{pages:,} pages"}, b""
        texts, failed, size = list[str](), 0, 0
        for number in range(pages):
            try:
                texts.append(_text(document[number]))
            except pypdfium2.PdfiumError:
                failed += 1
                continue
            size += len(texts[-1])
            if size > TEXT_BYTES:
                return {"error": "too_large", "detail": f"more than {TEXT_BYTES:,} characters in {number + 1:,} pages"}, b""
        title = (document.get_metadata_value("Title") or "").replace("\0", "").strip()
        facts = {"pages": pages, "failed": failed, "empty": sum(not text for text in texts), "title": title}
        return facts, "\n\n".join(filter(None, texts)).encode("utf-8", "replace")

    return work


def _text(page: PdfPage) -> str:
    textpage = page.get_textpage()
    text = textpage.get_text_range()
    textpage.close()
    page.close()
    return text.translate(JOINED).replace("\r\n", "\n").strip()
