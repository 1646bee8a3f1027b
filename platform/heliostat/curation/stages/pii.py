"""Masks personal data, or drops documents with personal data: e-mail addresses, public IP addresses, and phone, card, and account
numbers.

Card numbers must pass Luhn's checksum. Account numbers (IBAN) must pass the checksum of ISO 7064. Phone numbers must be valid by
Google's libphonenumber. IP addresses must be public. By default, the stage masks e-mail and IP addresses, like FineWeb (Penedo et
al. 2024, arXiv 2406.17557); `kinds` adds other data. The stage doesn't find names and street addresses, because heliostat has no
model for names and addresses. A mask never looks like personal data, so a later pass doesn't mask the mask again. Phone numbers
without + and a country code are found only if `region` is set.

Much code looks like personal data, so the format alone isn't enough:

- A slice (`x[1::2]`), a scope (`A::B`), a section number, or an object identifier isn't an IP address. An IPv6 address needs four
  written groups.
- `x@self.weight` and `git@github.com:a/b` aren't e-mail addresses. The top-level domain must be one that IANA has delegated.
- A date or a long integer isn't a phone number. A space or a punctuation mark must separate the area code from the other digits,
  unless a word such as `call` is before the number.
- The digits of a card number must be grouped as on cards.

An IPv4 address needs at least two groups of two or more digits: `3.3.3.3` and `3.4.1.1` are section or version numbers. This rule
leaves 0.03 % of random public addresses unmasked, 263 of 1,000,000. The addresses of the DNS resolvers of Google (`8.8.8.8`) and
Quad9 are masked nevertheless; Cloudflare's address `1.1.1.1` isn't. Networks (`64.252.64.0/18`) aren't masked either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from heliostat import extras
from heliostat.curation import personal
from heliostat.curation.stage import Document, Outcome, Stage, text_of

Kind = Literal["iban", "credit_card", "email", "ip", "phone"]
ROUNDS = 8
ORDER: tuple[Kind, ...] = ("iban", "credit_card", "email", "ip", "phone")  # if matches overlap, the first kind here wins


class Pii(Stage):
    libraries: ClassVar[tuple[str, ...]] = ("phonenumbers",)
    reasons: ClassVar[dict[str, str]] = {"pii": "more of it than max_found, where `action` is drop"}
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {"found": ("max_found",)}
    version: ClassVar[int] = 4

    kinds: list[Kind] = Field(["email", "ip"], min_length=1)
    """Kinds of personal data to find: `email`, `ip`, `phone`, `credit_card`, `iban`."""
    action: Literal["mask", "drop"] = "mask"
    """Replaces personal data with a mask, or drops the document."""
    mask: str = "<{kind}>"
    """Mask; `{kind}` becomes `email`, `ip`, and so on."""
    region: str | None = None
    """Country whose local phone numbers are also found, such as `US`. Unset: only numbers with +."""
    max_found: int = Field(0, ge=0)
    """Maximum matches in a document if `action` is `drop`; documents with more are dropped (`pii`)."""

    @model_validator(mode="after")
    def _mask(self) -> Pii:
        if any(c.isdigit() or c == "@" for c in self.mask):
            raise ValueError(
                f"mask: {self.mask!r} contains a digit or @, so the mask may look like personal data. Remove digits and @"
            )
        return self

    def check(self) -> None:
        if "phone" in self.kinds:
            extras.require("curation", "phonenumbers", what="stage pii, kind phone")
            if self.region is not None:
                personal.require_region(self.region)

    def edits(self) -> bool:
        return self.action == "mask"

    def loaded(self) -> Callable[[Document], Outcome]:
        self.check()
        finders: dict[str, Callable[[str], Iterator[personal.Span]]] = {
            "iban": personal.ibans, "credit_card": personal.cards, "email": personal.emails, "ip": personal.addresses,
        }  # fmt: skip
        if "phone" in self.kinds:
            finders["phone"] = personal.phones(self.region)
        kinds = [kind for kind in ORDER if kind in self.kinds]
        masks: dict[str, str] = {kind: self.mask.replace("{kind}", kind) for kind in kinds}

        def outcome(document: Document) -> Outcome:
            masked, counts = text_of(document), Counter[str]()
            for _ in range(ROUNDS):  # masking may expose a number that was part of a longer number
                masked, more = personal.replaced(masked, {kind: list(finders[kind](masked)) for kind in kinds}, masks)
                counts.update(more)
                if not more:
                    break
            number = sum(counts.values())
            if self.action == "drop" and number > self.max_found:
                return Outcome(None, "pii", ", ".join(f"{n} {kind}" for kind, n in counts.items()), {"found": number})
            if self.action == "mask":
                document.text = masked
            masks_put = {f"masked_{k}": n for k, n in counts.items()} if self.action == "mask" else {}
            return Outcome(document, measures={"found": number}, counts=masks_put)

        return outcome
