"""Masks secrets in code, or drops files that hold them, as StarCoder does (Li et al. 2023, arXiv 2305.06161): detect-secrets'
detectors.

Tokens of clouds and services, private keys, passwords in URLs and JSON web tokens are found by their form. By default all
detectors of a form are used; those of high entropy and of words such as "password" find much that is none, and are asked for by
name (`HexHighEntropyString`, `Base64HighEntropyString`, `KeywordDetector`). A line is looked at if it has a run of 16
characters that a secret can be of, or one of the marks of shorter ones. Lines of more than 4,096 characters are looked at in
pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from heliostat import extras
from heliostat.config.schema import nearest
from heliostat.curation.filtering import text_of
from heliostat.curation.stage import Document, Outcome, Stage, Work

FORMS = [
    "ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector",
    "DiscordBotTokenDetector", "GitHubTokenDetector", "GitLabTokenDetector", "IbmCloudIamDetector", "IbmCosHmacDetector",
    "JwtTokenDetector", "MailchimpDetector", "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector",
    "SendGridDetector", "SlackDetector", "SoftlayerDetector", "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector",
    "TwilioKeyDetector",
]  # fmt: skip
WIDE = ["Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector", "IPPublicDetector"]
_NEAR = re.compile(r"[A-Za-z0-9+/_=.-]{16}|://[^\s@]{1,200}@|PRIVATE KEY|PuTTY|AKC|AP[\dA-F]|xox|_authToken")
_ANY = re.compile(r"\S")
LONG_LINE, PIECE, OVERLAP = 4096, 2048, 512


class DetectSecrets(Stage):
    """Masks secrets in code, or drops files that hold them (Li et al. 2023)."""

    reasons: ClassVar[dict[str, str]] = {"secrets": "more secrets than max_found, where `action` is drop"}
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"found": ("max_found",)}

    detectors: list[str] = Field(FORMS, min_length=1)
    """The detectors that are used, by detect-secrets' names."""
    action: Literal["mask", "drop"] = "mask"
    """Puts a mask in the place of what is found, or drops the document."""
    mask: str = "<secret>"
    """The mask."""
    max_found: int = Field(0, ge=0)
    """Documents with more are dropped, where `action` is `drop` (`secrets`)."""

    @model_validator(mode="after")
    def _known(self) -> DetectSecrets:
        for name in self.detectors:
            if name not in FORMS + WIDE:
                raise ValueError(f"{name!r} is no detector{nearest(name, FORMS + WIDE)}")
        return self

    def check(self) -> None:
        extras.require("curation", "detect_secrets", what="stage detect_secrets")

    def open(self) -> Work:
        self.check()
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

        found_classes: list[Any] = list(get_mapping_from_secret_type_to_class().values())
        classes = {found.__name__: found for found in found_classes}
        detectors = [classes[name]() for name in self.detectors]
        near = _ANY if any(name in WIDE for name in self.detectors) else _NEAR

        def outcome(document: Document) -> Outcome:
            text, found, kinds = _masked(text_of(document), detectors, self.mask, near)
            if self.action == "drop" and found > self.max_found:
                return Outcome(None, "secrets", ", ".join(sorted(kinds)), {"found": found})
            if self.action == "mask":
                document.text = text
            counts = {"masked_secrets": found} if found and self.action == "mask" else {}
            return Outcome(document, measures={"found": found}, counts=counts)

        return lambda documents: [outcome(d) for d in documents]


def _masked(text: str, detectors: list[Any], mask: str, near: re.Pattern[str]) -> tuple[str, int, set[str]]:
    """Masks the secrets of each line that may have one; returns the text, their number and their kinds."""
    out, at, count, kinds = list[str](), 0, 0, set[str]()
    while found := near.search(text, at):
        start = text.rfind("\n", at, found.start()) + 1 or at
        end = text.find("\n", found.start()) + 1 or len(text)
        line = text[start:end]
        secrets = {(secret, kind) for piece in _pieces(line) for secret, kind in _secrets(piece, detectors) if secret != mask}
        for secret, kind in sorted(secrets, key=lambda s: (-len(s[0]), s)):
            if times := line.count(secret):
                line, count = line.replace(secret, mask), count + times
                kinds.add(kind)
        out += (text[at:start], line)
        at = end
    return "".join([*out, text[at:]]), count, kinds


def _pieces(line: str) -> Iterator[str]:
    if len(line) <= LONG_LINE:
        yield line.rstrip("\n")
        return
    for start in range(0, len(line) - OVERLAP, PIECE - OVERLAP):
        yield line[start : start + PIECE].rstrip("\n")


def _secrets(line: str, detectors: list[Any]) -> Iterator[tuple[str, str]]:
    for detector in detectors:
        for secret in detector.analyze_string(line):
            if isinstance(secret, str) and secret.strip():
                yield secret, detector.secret_type
