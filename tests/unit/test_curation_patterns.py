"""Tests that the fast searches of `pii` and `lines` find what the plain rules find, in any text."""

import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from heliostat import extras
from heliostat.curation import line_kinds, personal, registry, slices
from heliostat.curation.stage import Document
from heliostat.curation.stages.decontaminate import Decontaminate
from heliostat.curation.stages.lines import _COUNTER, LONG_COUNTER, Lines
from heliostat.curation.stages.minhash import MinHash
from heliostat.curation.stages.pii import Pii
from heliostat.curation.stages.repeated_lines import RepeatedLines
from heliostat.curation.stages.repeated_spans import RepeatedSpans
from heliostat.errors import MissingExtraError

from tests.seeds import every_seed

PLANTED = [
    "john.doe@example.com", "a+b@x-y.co.uk", "x@self.weight", "git@github.com:a/b", "https://u:pw@h.com/x", "\\nfoo@bar.com",
    "%@example.com", "f@1.bar", "@@@a@b@c.com", "a" * 64 + "@b.com", "a" * 65 + "@b.com", "\\t" + "a" * 64 + "@b.com",
    "8.8.8.8", "64.252.71.12", "192.168.0.1", "64.252.64.0/18", "1.2.3.4.5", "section 64.252.71.12",
    "٦٤.252.71.12", "64.252.71.١٢",
    "2001:4860:4860::8888", "2a00:1450:4001:81b::200e", "2001:db8::1", "12:34:56", "+1 650 253 0000", "(650) 253-0000", "+(1)650",
    "00 49 30 1234567", "+49 (30) 901820", "call 6502530000", "1.2345 678 901", "650.253.0000", "٣65 253 0000",
    "4111 1111 1111 1111", "4111111111111111", "5500-0000-0000-0004", "3782 822463 10005", "DE89 3704 0044 0532 0130 00",
    "GB82WEST12345698765432", "3 Likes", "12.5K views", "Sign In", "READ MORE…", "Read more...", "© all rights reserved",
    "ACCEPT COO\u212aIES", "İtems in cart", "LOG IN to", "1,234", "...", "HELLO WORLD THIS", "ÉÀÜ ẞTEST",
    "a few plain words of text",
]  # fmt: skip
BORDERS = [
    *"\n\n\n\n  \t\r\v\x1c\u2028\u00a0\u3000.,;:/-_+()[]<>\"'`=@\\x70éß中ſ\u212aİı😀\u0301٣²%*^~#!?|ǅ\0",
    "",
    "\ud800",
    "\udfff",
    "\\n",
]


def drawn(seed: int) -> str:
    """Returns planted personal data and lines, next to any border; or characters that the patterns know, in any order."""
    draw = random.Random(seed)
    if seed % 3 == 0:
        return "".join(
            draw.choices(draw.choice(["0123456789.-+ ()/", "0123456789abcdef:.", "abc@.\\n-_", "AZ09 \n", BORDERS]), k=300)
        )
    return "".join(draw.choice(draw.choice([PLANTED, BORDERS, BORDERS])) for _ in range(60))


@every_seed(600)
def test_the_search_for_personal_data_passes_over_only_texts_without_a_match(seed, monkeypatch):
    """Compares with the plain patterns, which are tried at each character."""
    text = drawn(seed)
    stages = [Pii(kinds=["email", "ip", "phone", "credit_card", "iban"], region="US"), Pii()]
    outcomes = [stage.open()([Document("a", text)]) for stage in stages]
    with monkeypatch.context() as patch:
        patch.setattr(personal, "_each_email", personal._EMAIL.finditer)
        patch.setattr(personal, "_each_ipv4", personal._IPV4.finditer)
        patch.setattr(personal, "_each_ipv6", personal._IPV6.finditer)
        for name in ("_DIALED", "_CARD_DIGITS"):
            patch.setattr(personal, name, re.compile(r"(?s)\A.*\Z"))
        patch.setattr(personal, "_IBAN", re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?=[ A-Z0-9])"))
        assert outcomes == [stage.open()([Document("a", text)]) for stage in stages]


def plain_lines(stage: Lines, text: str) -> tuple[str, Counter[str], int]:
    """Returns the text without the lines to remove, the number of these lines by reason, and their words, line by line."""
    kept, removed, lost = [], Counter(), 0
    for line in text.split("\n"):
        words, small = line.split(), line.strip().lower()
        letters, capitals = sum(map(str.isalpha, line)), sum(map(str.isupper, line))
        why = ""
        if stage.numbers and re.fullmatch(r"[\d\W_]+", line):
            why = "lines_of_numbers"
        elif stage.single_words and len(words) == 1:
            why = "lines_of_one_word"
        elif letters >= stage.capital_letters and capitals > stage.max_capitals * letters:
            why = "lines_of_capitals"
        elif len(words) <= stage.short_words:
            if stage.counters and len(small) < LONG_COUNTER and _COUNTER.fullmatch(small):
                why = "counters"
            elif any(small.startswith(one) for one in stage.begins) or any(small.endswith(one) for one in stage.ends):
                why = "boilerplate_lines"
            why = why or "boilerplate_lines" * any(one in small for one in stage.holds)
        if words and why:
            removed[why] += 1
            lost += len(words)
        else:
            kept.append(line)
    return "\n".join(kept), removed, lost


@every_seed(600)
def test_lines_are_removed_by_the_plain_rules(seed, monkeypatch):
    """This holds for any text, any keys, and any size of slices."""
    text = drawn(seed)
    monkeypatch.setattr(slices, "SLICE", [1, 50, 1 << 18][seed % 3])
    keys = {"max_capitals": 0.2, "capital_letters": 1, "short_words": 4, "numbers": False, "single_words": False, "begins": ["é"],
            "ends": ["…", "中"], "holds": ["kie"]}  # fmt: skip
    for stage in (
        Lines(max_removed_words=1.0),
        Lines(max_removed_words=1.0, **keys),
        Lines(max_removed_words=1.0, counters=False),
    ):
        kept, removed, lost = plain_lines(stage, text)
        (outcome,) = stage.open()([Document("a", text)])
        assert outcome.counts == removed and outcome.measures == {"removed_words": lost / max(1, len(text.split()))}
        assert outcome.document.text == kept if kept.strip() else outcome.reason == "empty"


def test_a_low_limit_of_capitals_holds_for_lines_with_few_capitals():
    """Earlier, lines with at most half of `capital_letters` capitals always stayed."""
    (outcome,) = Lines(max_capitals=0.2, max_removed_words=1.0).open()([Document("a", "AB cde\nab cde fgh")])
    assert outcome.document.text == "ab cde fgh" and outcome.counts == {"lines_of_capitals": 1}


def test_the_kinds_of_characters_are_those_of_python():
    every = list(map(chr, range(0x110000)))
    kinds = line_kinds._kinds()[np.minimum(np.arange(0x110000), line_kinds.CODES)]
    for kind, test in ((line_kinds.SPACE, str.isspace), (line_kinds.LETTER, str.isalpha), (line_kinds.CAPITAL, str.isupper)):
        assert ((kinds & kind) != 0).tolist() == list(map(test, every))
    words = np.zeros(0x110000, bool)
    words[[match.start() for match in re.finditer(r"[^\d\W_]", "".join(every))]] = True
    assert ((kinds & line_kinds.WORD) != 0).tolist() == words.tolist()


@pytest.mark.parametrize("stage", [Lines(), MinHash(), RepeatedLines(), RepeatedSpans(), Decontaminate(sets={"a": "a.txt"})],
                         ids=lambda stage: stage.named())  # fmt: skip
def test_a_missing_compiler_is_one_line_before_any_document(stage, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"^stage {stage.named()} needs the extra 'curation' .*'numba'.*pip install"):
        stage.check()


def test_checks_do_not_import_the_compiler():
    """Importing Numba takes 0.4 s."""
    names = ["lines", "minhash", "repeated_lines", "repeated_spans", "pii", "detect_secrets"]
    assert set(names) <= set(registry.names())
    code = f"import sys; from heliostat.curation.registry import parse; [parse({{'stage': n}}).check() for n in {names}]"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; print('numba' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"
