"""Masks secrets in code, or drops files with secrets, like StarCoder (Li et al. 2023, arXiv 2305.06161), with the detectors of
detect-secrets.

The default detectors find secrets by their format: tokens of cloud providers and services, private keys, passwords in URLs, and
JSON web tokens. Detectors of high entropy and of words such as "password" have many false positives, so you must list them in
`detectors` (`HexHighEntropyString`, `Base64HighEntropyString`, `KeywordDetector`). A line is checked only if it has 16
consecutive characters that may be a secret, or a prefix of a shorter secret. Lines of more than 4,096 characters are checked in
pieces. A private key is one secret from its BEGIN line to its END line, even over several lines. Without an END line, the key
ends where the base64 data ends.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from heliostat.curation.runs import Span, merged, runs, table
from heliostat.curation.stage import Document, Outcome, Stage, text_of
from heliostat.schema import nearest

FORMS = [
    "ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector",
    "DiscordBotTokenDetector", "GitHubTokenDetector", "GitLabTokenDetector", "IbmCloudIamDetector", "IbmCosHmacDetector",
    "JwtTokenDetector", "MailchimpDetector", "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector",
    "SendGridDetector", "SlackDetector", "SoftlayerDetector", "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector",
    "TwilioKeyDetector",
]  # fmt: skip
OWN = ["ServiceTokenDetector"]  # this module's detector: tokens of services that detect-secrets doesn't know
WIDE = ["Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector", "IPPublicDetector"]
_NEAR = re.compile(r"[A-Za-z0-9+/_=.-]{16}|://[^\s@]{1,200}@|PRIVATE KEY|PuTTY|AKC|AP[\dA-F]|xox|_authToken")
_IN_RUN = table(string.ascii_letters + string.digits + "+/_=.-")
LONG_LINE, PIECE, OVERLAP = 4096, 2048, 512
# In the patterns of these detectors, the group is the prefix of a token. In other patterns, the group is the secret.
WHOLE = {"GitHubTokenDetector", "GitLabTokenDetector", *OWN}
ALONE = {"AWSKeyDetector", "TwilioKeyDetector"}  # detectors whose keys also occur by chance in base64
TAILS = {  # secret type -> the rest of a token; detect-secrets finds only the beginning of these tokens
    "JSON Web Token": re.compile(r"[\w=-]*(?:\.[\w=-]+)*"),
    **dict.fromkeys(("OpenAI Token", "Slack Token", "Discord Bot Token"), re.compile(r"[\w-]*")),
    **dict.fromkeys(("GitHub Token", "Stripe Access Key"), re.compile(r"\w*")),
}
_TOKEN = (
    r"(?:github_pat_\w{36,255}"
    r"|sk-(?:ant|proj|svcacct|admin|or)-[\w-]{20,300}"
    r"|(?:hf_|api_org_)[A-Za-z0-9]{34}"
    r"|AIza[\w-]{35}|GOCSPX-[\w-]{28}|ya29\.[\w-]{30,300}"
    r"|do[opr]_v1_[a-f0-9]{64}"
    r"|npm_[A-Za-z0-9]{36}"
    r"|gsk_[A-Za-z0-9]{52}|r8_[A-Za-z0-9]{37}|nvapi-[\w-]{60,100}|dapi[a-f0-9]{32}"
    r"|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|dckr_pat_[\w-]{27}|hvs\.[\w-]{24,200}"
    r")"
)
_TOKENS = re.compile(rf"(?<![A-Za-z0-9]){_TOKEN}(?![A-Za-z0-9])", re.ASCII)
KEYS, MOST_KEY = "PrivateKeyDetector", 1 << 15  # maximum characters of a private key
_KEY = re.compile(
    r"-{0,5} ?(?:(?P<begin>BEGIN)|END) "
    r"(?P<kind>PGP PRIVATE KEY BLOCK|(?:(?:DSA|EC|OPENSSH|RSA|SSH2 ENCRYPTED) )?PRIVATE KEY) ?-{0,5}"
    r"|(?P<putty>PuTTY-User-Key-File-2)|Private-MAC:[ \t]*[0-9A-Fa-f]*"
)
_GAP = r"(?:\\[nr]?|[\s\"'#*>|,;+.]){1,48}+"  # text between a key's lines, which may be strings or comments in code
_HEADER = rf"{_GAP}[A-Za-z-]{{2,30}}+: [^\n]{{0,200}}+"
_LAST = rf"{_GAP}(?:[A-Za-z0-9+/=]{{4}}){{1,9}}+(?![\w+/=])"
_BODY = re.compile(rf"(?:{_HEADER}){{0,4}}+(?:{_GAP}[A-Za-z0-9+/=]{{40,}}+)++(?:{_LAST})?")
LEAST = 24
ODD = "\u0130\u0131\u017f\u212a"  # characters that also match [a-z] if case doesn't matter
_QUOTED = "(?i:['\"][0-9a-z/+]{40}['\"])"
_VALUE = r"""(?i:(?:key|pwd?|pass(?:word)?|token)["'\]:=> ]+[\w-]{24}|:[\da-z]{24,64}@|/soap/)"""
# detector -> patterns; if the detector finds a secret in a line, the line has a match of at least one of them
NEEDED = {
    name: [re.compile(pattern) for pattern in patterns]
    for name, patterns in {
        "ArtifactoryDetector": [r"AKC|AP[\dA-F]"],
        "AWSKeyDetector": [_QUOTED, "A(?:3T|BIA|CCA|KIA|SIA)[0-9A-Z]{16}"],
        "AzureStorageKeyDetector": ["AccountKey="],
        "BasicAuthDetector": [r"://[^:/\s]+:[^:/\s]+@"],
        "CloudantDetector": [_VALUE],
        "DiscordBotTokenDetector": [r"\.[\w-]{6}\.[\w-]{27}"],
        "GitHubTokenDetector": ["gh[opsur]_"],
        "GitLabTokenDetector": ["gl(?:pat|[dfr]t|soat|cbt|imt|ptt|agent|oas)-", "GR1348941"],
        "IbmCloudIamDetector": [_VALUE],
        "IbmCosHmacDetector": [_VALUE],
        "JwtTokenDetector": ["eyJ"],
        "MailchimpDetector": [r"-us\d"],
        "NpmDetector": ["_authToken"],
        "OpenAIDetector": ["T3BlbkFJ"],
        "PypiTokenDetector": ["pypi-Ag"],
        "SendGridDetector": [r"SG\."],
        "ServiceTokenDetector": [_TOKEN],
        "SlackDetector": ["-(?<=[xX][oO][xX].-)", "(?i://hooks)"],
        "SoftlayerDetector": [_VALUE],
        "SquareOAuthDetector": ["sq0csp-"],
        "StripeDetector": ["k_live_"],
        "TelegramBotTokenDetector": [r":[\w-]{35}"],
        "TwilioKeyDetector": ["AC[a-z0-9]{32}", "SK[a-z0-9]{32}"],
        **{name: [""] for name in WIDE},
    }.items()
}
LONG = {re.compile(pattern) for pattern in (_QUOTED, _TOKEN, _VALUE)}
"""Patterns that Python finds slowly, because they don't begin with a fixed character. heliostat searches for them only in lines
with a run of LEAST characters of `_IN_RUN`, which the secrets of these detectors have."""


class SecretDetector(Protocol):
    """Describes the interface of detect-secrets' detectors, which find secrets in a line. Detectors with patterns have a
    `denylist`."""

    secret_type: str

    def analyze_string(self, line: str, /) -> Iterable[str]: ...


class ServiceTokenDetector:
    """Finds access tokens of services, such as GitHub, by the tokens' prefixes. Has the interface of detect-secrets'
    detectors."""

    secret_type = "Service Token"
    denylist = (_TOKENS,)

    def analyze_string(self, line: str) -> Iterator[str]:
        yield from (match[0] for match in _TOKENS.finditer(line))


class DetectSecrets(Stage):
    reasons: ClassVar[dict[str, str]] = {"secrets": "more secrets than max_found, where `action` is drop"}
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"found": ("max_found",)}
    version: ClassVar[int] = 4
    needs: ClassVar = ("curation", "detect_secrets")
    libraries: ClassVar[tuple[str, ...]] = ("detect-secrets",)

    detectors: list[str] = Field(FORMS + OWN, min_length=1)
    """Detectors to use, by detect-secrets' names. heliostat adds `ServiceTokenDetector`, which finds tokens of GitHub
    (fine-grained), Anthropic, OpenAI, Hugging Face, Google, DigitalOcean, npm, and other services."""
    action: Literal["mask", "drop"] = "mask"
    """Replaces secrets with a mask, or drops the document."""
    mask: str = "<secret>"
    """Mask that replaces a secret."""
    max_found: int = Field(0, ge=0)
    """Maximum secrets in a document if `action` is `drop`; documents with more are dropped (`secrets`)."""

    @model_validator(mode="after")
    def _known(self) -> DetectSecrets:
        for name in self.detectors:
            if name not in FORMS + OWN + WIDE:
                raise ValueError(f"{name!r} isn't a detector{nearest(name, FORMS + OWN + WIDE)}")
        return self

    def edits(self) -> bool:
        return self.action == "mask"

    def loaded(self) -> Callable[[Document], Outcome]:
        self.check()
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

        found_classes: list[type[SecretDetector]] = list(get_mapping_from_secret_type_to_class().values())
        classes = {secrets_found.__name__: secrets_found for secrets_found in [*found_classes, ServiceTokenDetector]}
        detectors = [classes[name]() for name in self.detectors]
        wide = any(name in WIDE for name in self.detectors)

        def outcome(document: Document) -> Outcome:
            text, secrets_found, kinds = _masked(text_of(document), detectors, self.mask, wide)
            if self.action == "drop" and secrets_found > self.max_found:
                return Outcome(None, "secrets", ", ".join(sorted(kinds)), {"found": secrets_found})
            if self.action == "mask":
                document.text = text
            counts = {"masked_secrets": secrets_found} if secrets_found and self.action == "mask" else {}
            return Outcome(document, measures={"found": secrets_found}, counts=counts)

        return outcome


def _masked(text: str, detectors: list[SecretDetector], mask: str, wide: bool) -> tuple[str, int, set[str]]:
    """Masks private keys, and the secrets in lines that may have any. `wide`: whether a detector checks all lines.

    Returns the masked text, the number of secrets, and the kinds of secrets.
    """
    out, at, count, kinds = list[str](), 0, 0, set[str]()
    for kind in (d.secret_type for d in detectors if type(d).__name__ == KEYS):
        if keys := list(_keys(text)):
            text, count = _replaced(text, keys, mask), len(keys)
            kinds.add(kind)
    others = [(d, NEEDED[type(d).__name__]) for d in detectors if type(d).__name__ != KEYS]
    needs = {pattern for _, patterns in others for pattern in patterns}
    for start, end in _lines(text) if wide else _near_lines(text, needs):
        line = text[start:end]
        if not (able := [d for d, patterns in others if any(pattern.search(line) for pattern in patterns)]):
            continue
        tails = Tails(line)
        secrets = {
            (first + offset, tails.end(last + offset, kind)): kind
            for offset, piece in _pieces(line)
            for (first, last), kind in _secrets(piece, able)
            if piece[first:last] != mask
        }
        spans = merged(sorted(secrets))
        kinds.update(secrets.values())
        count += len(spans)
        out += (text[at:start], _replaced(line, spans, mask))
        at = end
    return "".join([*out, text[at:]]), count, kinds


def _lines(text: str) -> Iterator[Span]:
    """Yields the start and the end of each line."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield start, end
        start = end


def _near_lines(text: str, needs: set[re.Pattern[str]]) -> list[Span]:
    """Finds the lines that match `_NEAR` and at least one of `needs`."""
    near = {line for line in _long_lines(text) if any(need.search(text, *line) for need in needs & LONG)}
    for need in needs - LONG:
        at = 0
        while match := need.search(text, at):
            near.add(line := _line(text, match.start()))
            at = line[1]
    return sorted(line for line in near if _NEAR.search(text, *line))


def _long_lines(text: str) -> Iterator[Span]:
    """Yields the lines that are long enough for a secret of LONG."""
    for odd in ODD:
        text = text.replace(odd, "x")
    end = 0
    for start, _ in runs(text, _IN_RUN, LEAST):
        if start >= end:  # otherwise, the run is in the line before `end`
            yield (line := _line(text, start))
            end = line[1]


def _line(text: str, at: int) -> Span:
    return text.rfind("\n", 0, at) + 1, text.find("\n", at) + 1 or len(text)


class Tails:
    """Finds the ends of a line's secrets. A secret's tail, the characters after the detected beginning, may have megabytes. So
    each tail is read only once, even if many secrets begin in the same tail."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._read = dict[str, Span]()  # the last tail of each kind

    def end(self, end: int, kind: str) -> int:
        """Returns the position after the last character of a secret. `end`: the position after the detected beginning of the
        secret."""
        first, last = self._read.get(kind, (0, -1))
        if not first <= end <= last:
            tail = TAILS[kind].match(self._line, end) if kind in TAILS else None
            last = tail.end() if tail else end
            self._read[kind] = end, last
        return last


def _keys(text: str) -> Iterator[Span]:
    """Yields the spans of private keys. A key ends at the next END line if both have the same kind and the key has at most
    MOST_KEY characters. Otherwise, the key ends where the base64 data ends."""
    if "PRIVATE KEY" not in text and "PuTTY" not in text:
        return
    marks = list(_KEY.finditer(text))
    for i, mark in enumerate(marks):
        if not mark["begin"] and not mark["putty"]:
            continue
        end = marks[i + 1] if i + 1 < len(marks) else None
        closed = end is not None and not end["begin"] and not end["putty"] and end["kind"] == mark["kind"]
        if end is not None and closed and end.end() - mark.start() <= MOST_KEY:
            yield mark.start(), end.end()
        else:
            body = _BODY.match(text, mark.end(), mark.end() + MOST_KEY)
            yield mark.start(), body.end() if body else mark.end()


def _replaced(text: str, spans: list[Span], mask: str) -> str:
    out, at = list[str](), 0
    for start, end in spans:
        out += (text[at:start], mask)
        at = end
    return "".join([*out, text[at:]])


def _pieces(line: str) -> Iterator[tuple[int, str]]:
    if len(line) <= LONG_LINE:
        yield 0, line.rstrip("\n")
        return
    for start in range(0, len(line) - OVERLAP, PIECE - OVERLAP):
        yield start, line[start : start + PIECE].rstrip("\n")


def _secrets(line: str, detectors: list[SecretDetector]) -> Iterator[tuple[Span, str]]:
    """Yields the span and the kind of each secret in a line. For a detector with patterns, the span is the complete match, or the
    regex group that contains the secret."""
    for detector in detectors:
        secrets = set(detector.analyze_string(line))
        if not secrets:
            continue
        spans = _matched(line, detector, secrets) if hasattr(detector, "denylist") else _quoted(line, secrets)
        yield from ((span, detector.secret_type) for span in spans if line[slice(*span)].strip())


def _matched(line: str, detector: SecretDetector, secrets: set[str]) -> Iterator[Span]:
    whole, alone = (type(detector).__name__ in some for some in (WHOLE, ALONE))
    for pattern in getattr(detector, "denylist", ()):
        for match in pattern.finditer(line):
            if not secrets.isdisjoint((match[0], *match.groups(""))):
                start, end = match.span(0 if whole or not pattern.groups or match[1] is None else 1)
                if alone and (line[:start][-1:].isalnum() or line[end:][:1].isalnum() or len({*line[start + 2 : end]}) == 1):
                    continue
                secret = line[start:end].rstrip(' \t\r"')  # some patterns include the characters around a secret
                yield end - len(line[start:end].lstrip(' \t\r"=:')), start + len(secret)


def _quoted(line: str, secrets: set[str]) -> Iterator[Span]:
    """Yields the spans of secrets in quotes. Handles detectors that report secrets without positions."""
    for secret in filter(None, secrets):
        for match in re.finditer(rf"(?<=[\"'`]){re.escape(secret)}(?=[\"'`])", line):
            yield match.span()
