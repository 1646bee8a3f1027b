"""Finds e-mail addresses, public IP addresses, phone numbers, card and account numbers in text. Each function returns spans.

What has a checksum or a register of valid numbers is held to it. Every pattern is bounded, so that no text takes more than
linear time.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from heliostat.errors import ConfigError

Span = tuple[int, int]

_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\.?\w)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])")
_COLONS = re.compile(r":[0-9a-fA-F]{0,4}:")  # without which there is no address of the second kind
_PHONE = re.compile(r"(?<![\w.+-])(?:\+|00)?\(?\d(?:[ ().\-/]{0,2}\d){6,16}(?!\w)")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w.-]?\d)")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?=[ A-Z0-9])")
_NINES = (13, 15, 16, 19)  # lengths of card numbers
OTHER_NAMES = {"UK": "GB", "USA": "US"}
FEWEST = 7  # digits of a phone number
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27,
    "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip


def emails(text: str) -> Iterator[Span]:
    """Finds e-mail addresses."""
    return (m.span() for m in _EMAIL.finditer(text)) if "@" in text else iter(())


def addresses(text: str) -> Iterator[Span]:
    """Finds IP addresses that are public: private, local and documentation ranges are nobody's."""
    for pattern in (_IPV4, _IPV6) if _COLONS.search(text) else (_IPV4,):
        for found in pattern.finditer(text):
            try:
                public = ipaddress.ip_address(found[0]).is_global
            except ValueError:
                continue
            if public:
                yield found.span()


def cards(text: str) -> Iterator[Span]:
    """Finds card numbers: an issuer's first digit, one of the lengths there are, and Luhn's checksum."""
    yield from _first_valid(_CARD, text, _is_card)


def _is_card(number: str) -> bool:
    digits = re.sub(r"[ -]", "", number)
    return digits[0] in "23456" and len(digits) in _NINES and len(set(digits)) > 1 and luhn(digits)


def _first_valid(pattern: re.Pattern[str], text: str, valid: Callable[[str], bool]) -> Iterator[Span]:
    """Finds numbers that are valid, of a match as many of its groups of digits as can be: a date or a code may stand behind."""
    at = 0
    while found := pattern.search(text, at):
        at, number = found.end(), found[0]
        for end in range(len(number), 0, -1):
            if number[end - 1].isdecimal() and not number[end : end + 1].isdecimal() and valid(number[:end]):
                at = found.start() + end
                yield found.start(), at
                break


def luhn(digits: str) -> bool:
    """Checks Luhn's checksum."""
    total = sum(int(d) for d in digits[-1::-2])
    total += sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return total % 10 == 0


def ibans(text: str) -> Iterator[Span]:
    """Finds international account numbers: the country's length, and the checksum of ISO 7064."""
    for found in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(found[0][:2])
        if length is None:
            continue
        at, characters = found.start(), list[str]()
        while at < len(text) and len(characters) < length:
            character = text[at]
            if character.isascii() and (character.isdigit() or character.isupper()):
                characters.append(character)
            elif character != " " or text[at - 1] == " ":
                break
            at += 1
        whole = len(characters) == length and not (at < len(text) and text[at].isalnum())
        if whole and int("".join(str(int(c, 36)) for c in characters[4:] + characters[:4])) % 97 == 1:
            yield found.start(), at


def require_region(region: str) -> None:
    """Checks that phone numbers of a region are known: ConfigError if not."""
    import phonenumbers

    if region not in phonenumbers.SUPPORTED_REGIONS:
        meant = OTHER_NAMES.get(region.upper(), region.upper())
        known = meant in phonenumbers.SUPPORTED_REGIONS
        hint = f"did you mean {meant!r}?" if known else "leave it out for numbers with + only"
        raise ConfigError(f"region: {region!r} is no country's two capitals (ISO 3166), such as US; {hint}")


def phones(region: str | None) -> Callable[[str], Iterator[Span]]:
    """Builds the function that finds phone numbers that are valid: in the international form, and in a region's own."""
    import phonenumbers

    def valid(found: str) -> bool:
        digits = re.sub(r"\D", "", found)
        if len(digits) < FEWEST or (region is None and found[0] != "+"):
            return False
        try:
            return phonenumbers.is_valid_number(phonenumbers.parse("+" * (found[0] == "+") + digits, region))
        except phonenumbers.NumberParseException:
            return False

    return lambda text: _first_valid(_PHONE, text, valid)


def replaced(text: str, spans: dict[str, list[Span]], placeholders: dict[str, str]) -> tuple[str, dict[str, int]]:
    """Replaces spans by their kind's placeholder, and counts them; of two that overlap, the kind that is named first wins."""
    order = {kind: i for i, kind in enumerate(spans)}
    chosen = list[tuple[int, int, str]]()
    for start, stop, kind in sorted(
        ((a, b, kind) for kind, found in spans.items() for a, b in found), key=lambda s: (s[0], order[s[2]])
    ):
        if not chosen or start >= chosen[-1][1]:
            chosen.append((start, stop, kind))
        elif order[kind] < order[chosen[-1][2]] and (len(chosen) < 2 or start >= chosen[-2][1]):
            chosen[-1] = (start, stop, kind)
    out, at, counts = list[str](), 0, dict[str, int]()
    for start, stop, kind in chosen:
        out += (text[at:start], placeholders[kind])
        at, counts[kind] = stop, counts.get(kind, 0) + 1
    return "".join([*out, text[at:]]), counts
