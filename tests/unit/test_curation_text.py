"""Tests stages that extract text from pages, repair it, detect its language, and mask personal data."""

import ast
import ipaddress
import random
import sysconfig
import time
from pathlib import Path

import ftfy
import numpy as np
import pytest
from heliostat import extras
from heliostat.curation import encodings, personal
from heliostat.curation.stage import Document
from heliostat.curation.stages.detect_secrets import DetectSecrets
from heliostat.curation.stages.extract import Extract
from heliostat.curation.stages.fix_text import FixText
from heliostat.curation.stages.language import Language, sample
from heliostat.curation.stages.pii import Pii
from heliostat.errors import ConfigError, MissingExtraError
from pydantic import ValidationError

from tests.seeds import every_seed

PAGE = (
    b"<html><head><title>A page</title></head><body><nav><ul><li><a href=/>Home</a></li></ul></nav>"
    b"<main><p>%s</p></main></body></html>"
)


def one(stage, text, **columns):
    (outcome,) = stage.open()([Document("a", text, columns)])
    assert (outcome.document is None) == bool(outcome.reason) and (not outcome.reason or outcome.reason in stage.reasons)
    return outcome


@pytest.mark.parametrize(
    ("data", "header", "encoding", "told"),
    [
        (b"\xef\xbb\xbfx", "text/html; charset=latin1", "utf-8", "mark"),
        (b"\xff\xfex\0", None, "utf-16-le", "mark"),
        (b"<meta charset=utf-8>", 'text/html; charset="ISO-8859-1"', "cp1252", "header"),
        (b"<meta charset=utf-8>", "text/html; charset=nonsense", "utf-8", "meta"),
        (b"<meta charset='shift_jis'>", "text/html", "cp932", "meta"),
        (b'<META http-equiv="Content-Type" content="text/html; charset=koi8-r">', None, "koi8-r", "meta"),
        (b"<!-- <meta charset=koi8-r> --><meta charset=gbk>", None, "gb18030", "meta"),
        (b"<meta charset=utf-16>", None, "utf-8", "meta"),
        (b" " * 1024 + b"<meta charset=koi8-r>", None, "utf-8", "utf-8"),
        ("<p>Größe".encode(), None, "utf-8", "utf-8"),
        ("日本語のテキストです。これは本文です。".encode("shift_jis") * 9, None, "cp932", "looks"),
    ],
)
def test_encodings_are_told_as_the_standard_has_it(data, header, encoding, told):
    assert encodings.sniff(data, header) == (encoding, told)


@pytest.mark.parametrize(
    ("text", "written", "label"),
    [
        ("株式会社㈱ ①②③ 髙橋 Ⅲ ～", "cp932", "shift_jis"),
        ("똠방각하 펲시 햏", "cp949", "euc-kr"),
        ("嘅 喺 咗", "big5hkscs", "big5"),
        ("ก… “ข”", "cp874", "tis-620"),
    ],
)
def test_labels_mean_all_that_browsers_take_them_for(text, written, label):
    assert encodings.decode(text.encode(written), f"text/html; charset={label}") == (text, written, 0)


def test_extract_leaves_out_navigation_and_tells_of_the_page():
    stage = Extract()
    outcome = one(stage, PAGE % "Größe".encode("latin-1"), content_type="text/html; charset=latin1")
    assert outcome.document.text == "Größe" and outcome.document.columns["title"] == "A page"
    assert outcome.document.columns["encoding"] == "cp1252" and 0 < outcome.measures["boilerplate"] < 1
    assert "Home" in one(Extract(main_content=False), PAGE % b"text").document.text
    assert one(stage, "text already").document.text == "text already"
    assert one(stage, b"<html></html>").reason == "no_text" and one(Extract(max_bytes=9), b"x" * 10).reason == "too_large"
    outcome = one(stage, b"\xff\xfa\x80" * 100, content_type="text/html; charset=utf-8")
    assert (outcome.reason, outcome.detail) == ("undecodable", "300 of 300 characters are no utf-8")
    assert one(stage, PAGE % b"a \xff few").document.text == "a ÿ few"


def test_the_text_of_a_page_is_in_nfc():
    """Text from files is in NFC, too. Otherwise later stages would take `e` with a combining accent for two letters."""
    text = "Le cafe\u0301 est ouvert toute la journe\u0301e."
    found = one(Extract(), PAGE % text.encode(), content_type="text/html; charset=utf-8").document.text
    assert found == "Le caf\u00e9 est ouvert toute la journ\u00e9e."


def test_extract_with_trafilatura():
    text = b"This is the first sentence of an article that goes on for a while. " * 20
    assert one(Extract(library="trafilatura"), PAGE % text).document.text.startswith("This is the first sentence")


def test_a_page_that_hangs_the_parser_is_dropped_and_the_next_one_read():
    work = Extract(max_seconds=1.0).open()
    start = time.monotonic()
    outcomes = work([Document("a", PAGE % b"one"), Document("b", b"<div>" * 100_000 + b"deep"), Document("c", PAGE % b"two")])
    assert [o.reason for o in outcomes] == ["", "timeout", ""] and outcomes[2].document.text == "two"
    assert "1 s of processor time" in outcomes[1].detail and time.monotonic() - start < 60


def test_fix_text_changes_what_ftfy_changes_in_the_whole_text():
    pieces = ["plain words", "âœ” No problems", "It&amp;s fine", "a <b> tag", "caf\u00c3\u00a9", "\x1b[31mred\x1b[0m",
              "“curly” ﬁ ＡＢ", "tab\there", "\ufeffmark", "bell\x07", "Größe", "\u0085",
              "l\u2019humanit\u00e9", "&lt;", "\r", ""]  # fmt: skip
    config = ftfy.TextFixerConfig(uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
                                  fix_line_breaks=False, normalization=None)  # fmt: skip
    draw, changed = random.Random(0), 0
    for _ in range(300):
        text = draw.choice(["\n", " ", "\n\n"]).join(draw.choices(pieces, k=draw.randint(0, 8)))
        outcome = one(FixText(), text)
        assert outcome.document.text == ftfy.fix_text(text, config)
        changed += outcome.counts.get("repaired_lines", 0)
    assert changed > 100
    assert one(FixText(uncurl_quotes=True), "“x”").document.text == '"x"'


CHARSETS = ["latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257", "iso-8859-2", "mac_roman", "cp437"]
WORDS = ["naïve", "l’été", "“quoted”", "Ω", "приве́т", "日本語", "Grüße", "✔", "…", "€5", "a", "the", "", "&amp;", "&", "<b>",
         "\n", "\x85", "\ufeff", "\x1b[1m", "½", "Ã ", "Â ", "à²", "√±", "вЂ", "\x0c", "\ud800"]  # fmt: skip


@every_seed(30)
def test_fix_text_skips_only_what_ftfy_does_not_change(seed):
    """Compares with ftfy on the complete text."""
    draw = random.Random(seed)
    for _ in range(20):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        if draw.random() < 0.5:
            text = text.encode("utf-8", "replace").decode(draw.choice(CHARSETS), "replace")
        if draw.random() < 0.3:
            text += "".join(draw.choices(ftfy.badness.BADNESS_RE.pattern + "".join(WORDS), k=20))
        plain = {"uncurl_quotes": False, "fix_latin_ligatures": False, "fix_character_width": False, "fix_line_breaks": False}
        assert one(FixText(), text).document.text == ftfy.fix_text(text, normalization=None, **plain), text


@pytest.mark.parametrize("mojibake", ["Â £", "Ã b", "Â "])
def test_mojibake_is_repaired_where_ftfy_splits_a_long_line(mojibake):
    """ftfy reads a long line in parts, and repairs some characters only at the start of a part."""
    text = "X" * ftfy.TextFixerConfig().max_decode_length + mojibake
    outcome = one(FixText(), text)
    assert outcome.document.text == ftfy.fix_text(text, normalization=None) != text and outcome.counts == {"repaired_lines": 1}


def test_language():
    stage = Language(languages=["en", "de"], min_score=0.5)
    outcome = one(stage, "This is an English text about the weather and other things that people talk about.")
    assert outcome.document.columns["language"] == "en" and outcome.measures["language_score"] > 0.9
    assert one(stage, "Ceci est un texte en français, sur la pluie et le beau temps.").reason == "other_language"
    assert one(Language(min_score=1.0), "ok no da si").reason == "uncertain"
    assert one(stage, " \n").reason == "no_language"


ENGLISH = "The old keeper walked down to the harbour every morning, and would wait for the boats to return with their nets. "
GERMAN = "Der alte Wärter ging jeden Morgen zum Hafen hinunter und wartete dort, bis die Boote mit ihren Netzen kamen. "


@pytest.mark.parametrize(("first", "rest", "language"), [(ENGLISH, GERMAN, "de"), (GERMAN, ENGLISH, "en")])
def test_the_language_of_a_document_is_that_of_most_of_it(first, rest, language):
    """A notice at the beginning doesn't decide."""
    outcome = one(Language(min_score=0.5), first * 12 + rest * 150)
    assert outcome.document.columns["language"] == language and outcome.measures["language_score"] > 0.8
    assert one(Language(min_score=0.5), rest * 150 + first * 12).document.columns["language"] == language


@pytest.mark.parametrize("chars", [50, 1000, 1007])
def test_no_more_is_looked_at_than_asked_for_and_both_ends_are(chars):
    words = " ".join(f"word{i}" for i in range(5000))
    assert sample(words[:chars], chars) == words[:chars]
    found = sample(words, chars)
    assert len(found) <= chars + 7 and found.startswith("word0"[:chars]) and found.endswith("9")
    assert all(word in words.split() for word in found.split() if len(word) == 8)
    assert len(sample("語" * 9000, chars)) <= chars + 7


CODE_WITHOUT_DATA = [
    "y = x[::2] + x[1::3][5::7, ::-1]",
    "auto A::B::operator()() -> ::f(dead::beef::cafe); A::B c{1::2};",
    "id = univ.ObjectIdentifier('2.5.29.16')  # RFC 9535 section 2.3.5.1, §4.2.3.2",
    '__version__ = "1.2.3.4"; pip install foo==1.0.0.0; {"contentVersion": "1.0.0.0"}',
    'd="M11.75 4.5a.75.75 0 1 1 0 1.5.75.75 0 0 1 0-1.5"',
    "A = L@D@L.conjugate().T; B = x@self.weight + A@sps.diags(C)",
    'text = "\\n@mlflow.trace\\ndef f(): ..."',
    "git clone git@github.com:org/name.git; connect('postgres://user:word@db.example.com:5432/x')",
    "hash % 2280545475268481167llu + 4154246671960*x**20 + 2**63",
    "// 300 332 364 396 428 460 492 276; 2 34 66 98 130 162 194 226 258; 48 0 1096 0 48 48 0 10-96",
    'pd.Timestamp("2018-02-27 09:03:30"), 2147483647, 9373599542, 14.134725142, 415-419 (2012)',
    "# [3.3.3.3^1] and 8.2.4.45, RFC 5445 3.8.2.4, RFC 2616, 14.35.16.2; Guile 3.0.5.130-5a1e7, h2o 3.46.0.6",
    '"maximum": "3.46.0.12"; OS-release       : 5.10.102.1; Linux 5.10.102.1-microsoft; 12.34.56.78+0800; v. 10.12.3.4',
    'entries=[{"Cidr": "64.252.64.0/18"}, {"Cidr": "3.218.180.0/23"}, {"Cidr": "2600:1f14:fff:f800::/53"}]',
    'b"aes256-gcm@openssh.com", b"-cert-v01@openssh.com", "curve25519-sha256@libssh.org"',
    'like("%@gmail.com"), foo@1.bar, "foo-bar@baz.py", http.client("user:password@www.python.org"), wasbs:/a@b.azure.net',
    "rng = default_rng(348932549825235), {'fontNumber': 2147483648}, '+35236450.6', -2.002 319 304 3622   0.000",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", "Write to <email>."),
        ("user@localhost and @name", "user@localhost and @name"),
        ("From 8.8.8.8 to 10.0.0.1, version 1.2.3.4.5", "From <ip> to 10.0.0.1, version 1.2.3.4.5"),
        ("At 2001:4860:4860::8888, not ::1 or 12:30:45", "At <ip>, not ::1 or 12:30:45"),
        ("Card 4111 1111 1111 1111 is; 4111 1111 1111 1112 is not", "Card <credit_card> is; 4111 1111 1111 1112 is not"),
        ("Pay to DE89 3704 0044 0532 0130 00 now", "Pay to <iban> now"),
        ("Pay to GB82WEST12345698765432, not GB82WEST12345698765433", "Pay to <iban>, not GB82WEST12345698765433"),
        ("Call +44 20 7031 3000 or (212) 736-5000.", "Call <phone> or <phone>."),
        ("4111 1111 1111 1111 12/27 and 4111-1111-1111-1111 123", "<credit_card> 12/27 and <credit_card> 123"),
        ("4111 1111 1111 1111 5500 0000 0000 0004 4111 1111 1111 1112", "<credit_card> <credit_card> 4111 1111 1111 1112"),
        ("(650) 253-0000 (212) 736-5000", "<phone> <phone>"),
        ("650-253-0000 2024-01-02, +44 20 7031 3000 2024", "<phone> 2024-01-02, <phone> 2024"),
        ("In 2024-01-01 there were 1234567890123", "In 2024-01-01 there were 1234567890123"),
        ("", ""),
        ('"From:\\nfoo@example.com"', '"From:\\n<email>"'),
        ("Write to jane@a.com.Then wait, mailto:joe@b.museum", "Write to <email>.Then wait, mailto:<email>"),
        ("请发邮件到john@example.com联系我们", "请发邮件到<email>联系我们"),  # no spaces between words
        ("ping 2a00:1450:4001:80b::200e, [2001:4860:4860::8844]:53", "ping <ip>, [<ip>]:53"),
        ("8.8.8.8-8.8.4.4 and 224.0.0.1", "<ip>-<ip> and 224.0.0.1"),
        ("host 24.201.139.93/24, [64.32.235.228], 52.2.144.13/32.", "host <ip>/24, [<ip>], <ip>/32."),
        ("jane@openssh.com, djm@lysator.liu.se, x@163.com, joe@tigo.com.py", "<email>, <email>, <email>, <email>"),
        ("2024-01-02 8.8.8.8 GET /", "2024-01-02 <ip> GET /"),
        ("Call 2127365000 or 212.736.5000 or 1-212-736-5000", "Call <phone> or <phone> or <phone>"),
        ("3782 822463 10005 and 378282246310005", "<credit_card> and <credit_card>"),
        *((line, line) for line in CODE_WITHOUT_DATA),
    ],
)
def test_pii(text, expected):
    stage = Pii(kinds=["email", "ip", "phone", "credit_card", "iban"], region="US")
    outcome = one(stage, text)
    assert outcome.document.text == expected and sum(outcome.counts.values()) == outcome.measures["found"] == expected.count("<")
    assert one(stage, expected).document.text == expected
    dropped = one(Pii(kinds=stage.kinds, region="US", action="drop"), text)
    assert dropped.reason == ("pii" if "<" in expected else "") and (dropped.reason or dropped.document.text == text)


REAL_ADDRESSES = {("socket.py", "123.45.67.89")}  # in the documentation of the module `socket`


@pytest.mark.ci
def test_the_source_of_the_standard_library_and_of_numpy_keeps_its_slices_versions_and_sections():
    """Only the one real address is masked, and code with masked e-mail addresses still parses."""
    folders = (Path(sysconfig.get_paths()["stdlib"]), Path(np.__file__).parent)
    others = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
    files = [p for f in folders for p in f.rglob("*.py") if not others & {*p.relative_to(f).parts}]
    work, masked, slices = Pii().open(), set[tuple[str, str]](), 0
    for path in files:
        text = path.read_text("utf-8", "replace")
        slices += text.count("::")
        (outcome,) = work([Document(str(path), text)])
        if outcome.counts.get("masked_ip"):
            masked |= {(path.name, text[slice(*span)]) for span in personal.addresses(text)}
        if outcome.counts:
            ast.parse(outcome.document.text)
    assert len(files) > 500 and slices > 500 and masked == REAL_ADDRESSES


def test_few_public_addresses_look_like_versions():
    """The stage's documentation states this share."""
    draw, found = random.Random(0), 0
    public = [a for a in (ipaddress.IPv4Address(draw.getrandbits(32)) for _ in range(24_000)) if a.is_global]
    public = [a for a in public if not a.is_multicast][:20_000]
    found = sum(bool([*personal.addresses(f"from {a} at")]) for a in public)
    assert len(public) == 20_000 and found >= 19_990
    sixes = [ipaddress.IPv6Address((2 << 124) | draw.getrandbits(124)) for _ in range(5_000)]
    assert all(any(personal.addresses(f"from {a} at")) for a in sixes if a.is_global)


@pytest.mark.parametrize(
    ("region", "hint"),
    [
        ("us", "Did you mean 'US'"),
        ("UK", "Did you mean 'GB'"),
        ("USA", "Did you mean 'US'"),
        ("", "Remove `region`"),
        ("XX", "Remove `region`"),
    ],
)
def test_a_region_that_has_no_phone_numbers_is_refused(region, hint):
    with pytest.raises(ConfigError, match=rf"^region: '{region}' isn't an ISO 3166 .*{hint}"):
        Pii(kinds=["phone"], region=region).check()
    Pii(kinds=["phone"], region="GB").check()
    Pii(kinds=["phone"]).check()


def test_masks_are_idempotent_on_noise():
    draw = random.Random(3)
    pieces = [
        "a@b.com",
        "8.8.8.8",
        "+442070313000",
        "4111111111111111",
        "DE89370400440532013000",
        ".",
        "@",
        "1",
        " ",
        "-",
        "<",
        "x",
        ":",
        "::",
        "+",
        "(",
    ]
    work = Pii(kinds=["email", "ip", "phone", "credit_card", "iban"], region="GB").open()
    for _ in range(2000):
        (first,) = work([Document("a", "".join(draw.choices(pieces, k=draw.randint(1, 12))))])
        text = first.document.text
        (second,) = work([Document("a", text)])
        assert second.document.text == text and not second.counts


def test_a_mask_that_could_be_masked_is_refused():
    with pytest.raises(ValidationError, match="contains a digit or @"):
        Pii(mask="x@example.com")


def test_luhn():
    assert personal.luhn("4111111111111111") and not personal.luhn("4111111111111112")


HOSTILE = ["a@" * 25000, "1) " * 16500, "4 " * 20000, "2 1 2 7 3 6 5 0 0 0 " * 1250,
           "a." * 25000 + "@", "1" * 50000, "1-" * 25000, "(1) " * 12500, "::" * 25000, "DE89 " * 10000,
           "eyJ" * 16250, "://a:" * 10000, "key = " * 7500, "<" * 50000, "&amp;" * 10000, "\u00c3\u00a9" * 25000,
           "-" * 50000 + "@x", "xoxb-1-" * 7000, "-----BEGIN RSA PRIVATE KEY-----\\n" * 1500,
           "-----BEGIN RSA PRIVATE KEY-----\n" + "a: " * 16500, "BEGIN PRIVATE KEY" + "\\n+" * 15000]  # fmt: skip


@pytest.fixture(scope="module")
def hostile_stages():
    return [stage.open() for stage in (Pii(kinds=["email", "ip", "phone", "credit_card", "iban"], region="US"),
                                       DetectSecrets(), FixText())]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:6])
def test_hostile_text_takes_linear_time(text, hostile_stages):
    """Four times the text takes four times as long, not 16 times."""
    for work in hostile_stages:
        began = time.process_time()
        work([Document("a", text[-len(text) // 4 :])])
        quarter = time.process_time()
        work([Document("a", text)])
        assert time.process_time() - quarter < 8 * (quarter - began) + 0.25


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for stage in (Extract(), FixText(), Language(), DetectSecrets(), Pii(kinds=["phone"])):
        with pytest.raises(MissingExtraError, match=r"^stage \w+.* needs the extra 'curation' .*pip install"):
            stage.check()
    assert issubclass(MissingExtraError, ConfigError)
    Pii().check()
