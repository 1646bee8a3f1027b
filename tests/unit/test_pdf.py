"""Tests the text of PDFs: what is read, what is left out and why, and that no PDF stops a run."""

import base64
import gzip
import logging
import zlib

import pytest
from heliostat.curation.pieces import FilePart
from heliostat.curation.registry import parse
from heliostat.curation.stage import Document
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.curation.text.sources import listing
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import ConfigError

from tests.unit.build_pdf import lines, make_pdf

ENCRYPTED = zlib.decompress(
    base64.b85decode(
        "c-oCpJB!so6t=OMPV@&1%54O9-jf6_x7f!;@v+NYbwSx;CUa(uUXvx6E4x-&*jibLt(9Oa*jNf;V_|C{3jPTjC)rmp7Ulsb-}%mWPQE##jn("
        "NTwj|K#$ImZc5yKQ$_C6Yq5xKd)3z)2!VCK~hA{%B08q6bMh9(mPrE7_NP|)!Zxmvge-^HTk<84G%szn(v>y?UsmbQ&*h}45l<T|**ELVF`i"
        "^f}1iqrT;#Thi!qR!(`t-`d5HC@24JQ^}Sv2huqUW3(Nqsu}6Rs)gEg$><j3o=BOO#_`exeW715Q^ONR8&vp8k9TX9+slbH=zde5S`n4ck#`"
        "Ky|e1{>rbzipDjK3`1#b0C%^BI=jwd=_I>*8<%?h6FPwQ=ZEv-bhgFB-x<6tO=77hOUhkxrz8$?KGt5t>pwUV!c_uTR@GK^##XLZb$!0L6Gq"
        "pox9gh`QPlZWYF0}_OnY1?JnQ>NHrE*6t_rPc_t@oa*R3$VKsZ$!9phElT@GU$}1?3=8#dF1Sh@n&hyq3brgj1VGO`QqFe6GQ!3S>*rsWGXv"
        "DYdfyS9>*h6i*q^;|pu0gu)&lV=VgKWy%vw%K^r?7+_qn0Venmi&hLV+3Oo>Q_P|6?B6UNLmZjRsw!^z!RlTqeTDU5yc!pHY=9|~86}*}ykl"
        "A$;6}O}AWL#Bv&sKZ;_9!JdA+|IaB{TLO)z!njMFMZqtV*>6#W59jR>p"
    )
)  # a page that wants a password (40-bit RC4)


def outcome(data: bytes, **keys):
    (found,) = parse({"stage": "pdf", **keys}).open()([Document("a.pdf", data, {"url": "u"})])
    return found


def test_pages_become_text_with_words_joined_and_columns_stay():
    pages = [lines("The first line,", "and a se-", "cond"), b"", lines("Page three")]
    found = outcome(make_pdf(pages, "A title", packed=True))
    assert found.document.text == "The first line,\nand a second\n\nPage three"
    assert found.document.columns == {"url": "u", "pages": 3, "title": "A title"}
    assert found.measures == {"pages": 3} and found.counts == {"pages_empty": 1}


def test_what_cannot_be_read_is_left_out_with_the_reason():
    small = make_pdf([lines("x")])
    assert outcome(ENCRYPTED).reason == "encrypted"
    assert outcome(small[: len(small) // 3]).reason == "failed" == outcome(b"no PDF, but named as one").reason
    assert outcome(make_pdf([b"", b""])).reason == "no_text"
    many = outcome(make_pdf([lines("x")] * 4), max_pages=3)
    assert (many.document, many.reason, many.detail) == (None, "too_many_pages", "4 pages")
    assert outcome(make_pdf([lines(*["word " * 20] * 40)] * 400, packed=True), max_seconds=0.05).reason == "timeout"


def test_a_bomb_stops_nothing_and_what_comes_behind_it_is_read():
    work = parse({"stage": "pdf", "max_memory": 256}).open()
    bomb = make_pdf([lines("x") + b" " * (300 << 20)], packed=True)
    first, second = work([Document("bomb.pdf", bomb), Document("good.pdf", make_pdf([lines("still there")]))])
    assert first.document is None and first.reason == "crashed" and "256 MiB of memory" in first.detail
    assert second.document.text == "still there"


def test_text_passes_and_pages_pass_to_extract():
    text, page = Document("a.txt", "words"), Document("b.html", b"<p>words")
    assert [o.document for o in parse({"stage": "pdf"}).open()([text, page])] == [text, page]
    data = make_pdf([lines("x")])
    (kept,) = parse({"stage": "extract"}).open()([Document("a.pdf", data)])
    assert kept.document.text == data, "extract leaves PDFs to pdf, whichever is first"


def test_files_are_read_where_the_pipeline_has_the_stage(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(make_pdf([lines("a")]))
    (folder / "b.PDF.gz").write_bytes(gzip.compress(make_pdf([lines("b")])))
    (folder / "locked.pdf").write_bytes(ENCRYPTED)

    def files(*stages) -> list[str]:
        keys = {"name": "x", "input": str(folder), "output": str(tmp_path / "out"), "tokenizer": {"vocab_size": 300}}
        return [f.path for f in TextPipeline(**keys, stages=[*stages]).inputs()]

    with pytest.raises(ConfigError, match=r"contains only PDFs \(3 files\)\. Put {stage: pdf} first"):
        files({"stage": "length", "min_chars": 1})
    (folder / "c.txt").write_text("c")
    with caplog.at_level(logging.WARNING):
        assert files({"stage": "length", "min_chars": 1}) == ["c.txt"]
    assert "skipping PDFs (3 files). To read these files, put {stage: pdf}" in caplog.text
    assert files({"stage": "pdf"}) == ["a.pdf", "b.PDF.gz", "c.txt", "locked.pdf"]
    source = TextSource(str(folder), TextRules())

    read = {f.path: next(iter(source.read(FilePart(f.path, f.bytes, 0)))) for f in listing(str(folder), ["pdf"])}
    with pytest.raises(ConfigError, match=r"a\.pdf is a PDF, not text\. Put {stage: pdf} among the first"):
        source.finish(read["a.pdf"])
    outcomes = parse({"stage": "pdf"}).open()(list(read.values()))
    assert [o.document and o.document.text for o in outcomes] == ["a", "b", "c", None]
