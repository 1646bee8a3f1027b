"""Tests that secrets in text are masked completely, and that nothing else is masked."""

import random
import re

import pytest
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from heliostat.curation.stages import detect_secrets
from heliostat.curation.stages.detect_secrets import DetectSecrets
from pydantic import ValidationError

from tests.seeds import every_seed
from tests.unit.test_curation_text import one

KEY = "gh" + "p_" + "Ab1" * 12
CODE = (
    f'import os\n\ntoken = "{KEY}"\nurl = "https://user:pa55word@host/x"\nname = "nothing_secret_here_at_all"\n'
    "-----BEGIN RSA PRIVATE KEY-----\n"
)


def test_secrets():
    outcome = one(DetectSecrets(), CODE)
    assert (
        KEY not in outcome.document.text
        and "pa55word" not in outcome.document.text
        and "nothing_secret_here" in outcome.document.text
    )
    assert outcome.counts == {"masked_secrets": 3} and outcome.document.text.count("\n") == CODE.count("\n")
    assert one(DetectSecrets(), outcome.document.text).counts == {}
    dropped = one(DetectSecrets(action="drop"), CODE)
    assert dropped.reason == "secrets" and "GitHub Token" in dropped.detail and KEY not in dropped.detail
    assert one(DetectSecrets(detectors=["KeywordDetector"]), 'password = "hunter2secret"').counts == {"masked_secrets": 1}
    with pytest.raises(ValidationError, match="Did you mean 'GitHubTokenDetector'"):
        DetectSecrets(detectors=["GithubTokenDetector"])


LINES = "".join(f"{chr(65 + i) * 64}\n" for i in range(9)) + "QUJD" * 3 + "\n"


NO_TOKENS = [
    "sk-learn-contrib-package",
    "QAQAAAAAAAwAa" + "AK" + "IAAQAAAAAABAAHAM0AAQAAAAAABQA8AU8AAQ",  # base64
    "# Account SID (AC" + "x" * 32 + ")",
    "npm_config_registry",
    "hf_hub_download_with_progress_and_more",
    "AIza",
    "def github_pat_is_valid(x)",
    "https://example.com/eyJ",
    "dapi_test",
    "risk-proj-" + "abc-" * 9,
]


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        *((text, None, 0) for text in NO_TOKENS),
        (f"a = 1\n-----BEGIN RSA PRIVATE KEY-----\n{LINES}-----END RSA PRIVATE KEY-----\nb\n", "a = 1\n<secret>\nb\n", 1),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow...\n-----END RSA PRIVATE KEY-----\n", "<secret>\n", 1),
        ('k = "-----BEGIN PRIVATE KEY-----\\nMIIE\\n-----END PRIVATE KEY-----\\n"', 'k = "<secret>\\n"', 1),
        (f"-----BEGIN OPENSSH PRIVATE KEY-----\n{LINES}\nand then some words\n", "<secret>\n\nand then some words\n", 1),
        (f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES,00\n\n{LINES}", "<secret>\n", 1),
        (f"-----BEGIN EC PRIVATE KEY-----\n{LINES}{'x y ' * 9000}-----END EC PRIVATE KEY-----",
         f"<secret>\n{'x y ' * 9000}-----END EC PRIVATE KEY-----", 1),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nQUJD\n=ab\n-----END PGP PRIVATE KEY BLOCK-----", "<secret>", 1),
        (f"PuTTY-User-Key-File-2: ssh-rsa\nPrivate-Lines: 9\n{LINES}Private-MAC: 0aF9\nx", "<secret>\nx", 1),
        ('if "BEGIN RSA PRIVATE KEY" in text:\n    fail()', 'if "<secret>" in text:\n    fail()', 1),
        ("-----BEGIN PUBLIC KEY-----\nQUJD\n-----END PUBLIC KEY-----", None, 0),
        ("x = 'postgres://postgres:postgres@localhost/postgres'", "x = 'postgres://postgres:<secret>@localhost/postgres'", 1),
        ("curl https://user:p@api.example.com/people/list", "curl https://user:<secret>@api.example.com/people/list", 1),
        (f"{KEY} ghp {KEY}", "<secret> ghp <secret>", 2),
        ("x" * 4000 + f" {KEY} " + "x" * 900, "x" * 4000 + " <secret> " + "x" * 900, 1),
        ('key = "AKCabcdefghij1" # x', 'key = "<secret>" # x', 1),
        ("t = 'glcbt-a1_" + "Ab1" * 8 + "'", "t = '<secret>'", 1),
    ],
)  # fmt: skip
def test_a_secret_is_masked_where_it_stands_and_a_key_from_its_begin_to_its_end(text, expected, found):
    outcome = one(DetectSecrets(), text)
    assert outcome.document.text == (text if expected is None else expected)
    assert outcome.counts == ({"masked_secrets": found} if found else {}) and outcome.measures == {"found": found}
    assert one(DetectSecrets(), outcome.document.text).counts == {}


LONG = "aB3" * 100
JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0"


@pytest.mark.parametrize(
    "token",
    [
        "github" + "_pat_" + LONG[:22] + "_" + LONG[:59],
        "sk" + "-ant-api03-" + LONG[:40] + "_" + LONG[:40] + "-" + "AA",
        "h" + "f_" + LONG[:34],
        "AI" + "za" + LONG[:30] + "_-aB3",
        "dop" + "_v1_" + "0f" * 32,
        "np" + "m_" + LONG[:36],
        "sk" + "-proj-" + LONG[:74] + "T3BlbkFJ" + LONG[:40] + "_-" + LONG[:32],
        "sk" + "-" + LONG[:20] + "T3Blbk" + "FJ" + LONG[:20],
        f"{JWT}.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        f"{JWT}.{LONG * 30}",
        "sk" + "_live_" + LONG[:99],
        "gh" + "s_" + LONG[:76],
        "xox" + "b-1234-5678-" + LONG[:24],
        "s" + "hpat_" + "0a" * 16,
        "AK" + "IA" + "Q7W2" * 4,
    ],
    ids=lambda t: t[:8],
)
def test_a_token_is_masked_to_its_end(token):
    for form in ('key = "{}"  # comment', "export TOKEN={}\n", "{}", "x " * 2040 + "{} y", "a: {}, b"):
        outcome = one(DetectSecrets(), form.format(token))
        assert outcome.document.text == form.format("<secret>") and outcome.counts == {"masked_secrets": 1}


def test_a_token_of_many_others_is_not_read_to_its_end_for_each(monkeypatch):
    """Each of them was followed to the end, so a line of a megabyte took minutes."""
    read, tail = list[int](), detect_secrets.TAILS["JSON Web Token"]

    class Counting:
        def match(self, line: str, at: int) -> re.Match[str]:
            found = tail.match(line, at)
            read.append(found.end() - at)
            return found

    monkeypatch.setitem(detect_secrets.TAILS, "JSON Web Token", Counting())
    token = f"{JWT}." * 500 + "end"
    outcome = one(DetectSecrets(), f"a = {token}; b = {token};")
    assert outcome.document.text == "a = <secret>; b = <secret>;" and outcome.counts == {"masked_secrets": 2}
    assert sum(read) <= 4 * len(token)


def test_what_stands_in_quotes_is_masked_there_alone():
    outcome = one(DetectSecrets(detectors=["KeywordDetector"]), 'page.password = "p"')
    assert outcome.document.text == 'page.password = "<secret>"' and outcome.counts == {"masked_secrets": 1}


def test_every_mark_of_a_private_key_that_the_library_knows_is_one():
    (keys,) = (c for c in get_mapping_from_secret_type_to_class().values() if c.__name__ == detect_secrets.KEYS)
    for pattern in keys.denylist:
        assert one(DetectSecrets(), f"a\n{pattern.pattern}\nb\n").document.text == "a\n<secret>\nb\n"


def test_lines_that_are_passed_over_hold_no_secret():
    """The library's detectors find no more secrets in whole texts than the stage does."""
    classes = {c.__name__: c for c in get_mapping_from_secret_type_to_class().values()}
    assert set(detect_secrets.FORMS) | set(detect_secrets.WIDE) == set(classes)
    detectors = [classes[name]() for name in detect_secrets.FORMS]
    short = [
        "AKCabcdefghij1",
        "AP1abcdefghij",
        "https://u:p@h",
        "xoxb-12-ab",
        "//x/:_authToken=npm_x",
        "PuTTY-User-Key-File-2",
        "eyJhbGciOiJIUzI1NiJ9.e30",
    ]
    for line in [*short, *CODE.splitlines()]:
        expected = {s for d in detectors for s in d.analyze_string(line)}
        assert bool(one(DetectSecrets(), f"x\n{line}\ny\n").counts) == bool(expected), line


HEX, LOWER = "0f" * 40, "abcd" * 16
SECRETS = [  # at least one for each detector, or its pattern's rarest part
    " AKC" + LONG[:12], "=APA" + LONG[:12], "AS" + "IA" + "Q7W2" * 4, f"aws_key = '{LONG[:40]}'", f"AccountKey={LONG[:86]}==",
    "://user:pa55@", f"cloudant_api_key={HEX[:64]}", f"clou-pw: {LOWER[:24]}", f"https://a:{LOWER[:24]}@b.cloudant.com",
    f"M{LONG[:23]}.{LONG[:6]}.{LONG[:27]}", KEY, f"glpat-{LONG[:20]}", f"glcbt-0f_{LONG[:20]}", f"GR1348941{LONG[:20]}",
    f"gloas-{LONG[:64]}", f"ibm_iam_password := {LONG[:44]}", f"token={LONG[:44]}", f"cos_hmac_secret_access_key={HEX[:48]}",
    f"{JWT}.abc", "eyJhbGciOiJIUzI1NiJ9.e30", f"{HEX[:32]}-us12", f"//a/:_authToken=npm_{LONG[:9]}",
    "sk-" + LONG[:20] + "T3Blbk" + "FJ" + LONG[:20],
    f"pypi-AgEIcHlwaS5vcmc{LONG[:70]}", f"SG.{LONG[:22]}.{LONG[:43]}", "xox" + f"b-12-34-{LOWER[:9]}",
    "https://hooks.slack.com/services/" + f"T{LONG[:9]}/B{LONG[:9]}/{LONG[:9]}", f"softlayer_api_key: {HEX[:64]}",
    f"http://api.softlayer.com/soap/v3/{HEX[:64]}", f"sq0csp-{LONG[:43]}", "r" + f"k_live_{LONG[:24]}",
    f"123456789:{LONG[:35]}", f"AC{HEX[:32]}", f"SK{HEX[:32]}", "h" + f"f_{LONG[:34]}", "g" + f"sk_{LONG[:52]}",
    f"hvs.{LONG[:24]}", "dckr" + f"_pat_{LONG[:27]}",
]  # fmt: skip


@every_seed(30)
def test_the_search_for_secrets_skips_only_what_no_detector_finds(seed, monkeypatch):
    """Compares with all detectors on each line that matches `_NEAR`."""
    draw = random.Random(seed)

    def altered(secret: str) -> str:
        kind, at = draw.random(), draw.randrange(len(secret))
        if kind < 0.4:
            return secret
        if kind < 0.6:
            return draw.choice([secret.upper(), secret.lower(), secret.replace("s", "\u017f"), secret.replace("k", "\u212a")])
        return secret[:at] + draw.choice(["", ".", "\n", "é", "=", "x"]) + secret[at + draw.randint(0, 1) :]

    filler = ["\n", "\n", " ", "x " * 10, '"', "'", "=", "some_text.of/a-path", "é", "\r", "x " * 2040]
    parts = [altered(draw.choice(SECRETS)) if draw.random() < 0.4 else draw.choice(filler) for _ in range(60)]
    text = "".join(parts)
    outcome = one(DetectSecrets(), text)
    with monkeypatch.context() as patch:
        patch.setattr(detect_secrets, "NEEDED", {name: [re.compile("")] for name in detect_secrets.NEEDED})
        near = detect_secrets._NEAR
        lines = detect_secrets._lines
        all_near = lambda text, _: [(a, b) for a, b in lines(text) if near.search(text, a, b)]  # noqa: E731
        patch.setattr(detect_secrets, "_near_lines", all_near)
        expected = one(DetectSecrets(), text)
    assert outcome == expected


def test_a_line_with_many_runs_is_read_once_and_not_for_each_run(monkeypatch):
    line, read = detect_secrets._line, []
    monkeypatch.setattr(detect_secrets, "_line", lambda text, at: read.append(at) or line(text, at))
    text = "short\n" + "abcdefghijkl/mnopqrstuvw " * 68 + "\n" + "0123456789abcdef_01234567 " * 68
    assert list(detect_secrets._long_lines(text)) == [(6, 1707), (1707, 3475)]
    assert len(read) == 2


def test_every_detector_has_a_secret_here_and_what_its_lines_need():
    names = {*detect_secrets.FORMS, *detect_secrets.OWN} - {detect_secrets.KEYS}
    assert names | set(detect_secrets.WIDE) == set(detect_secrets.NEEDED)
    for name in names:
        assert any(one(DetectSecrets(detectors=[name]), f"{secret}\n").counts for secret in SECRETS), name
