"""Finds e-mail addresses, public IP addresses, phone numbers, card numbers, and account numbers in text. Each function yields
spans (start, stop) in characters.

A number must have a valid checksum, or be in the register of valid numbers. Every pattern is bounded, so the time is linear in
the text's length. Python finds a pattern that begins with a fixed character, such as `@`, about thirty times as fast as one that
begins with a condition. So each function first finds the places where a match is possible, and tries its pattern only there.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from heliostat.curation import top_level
from heliostat.errors import ConfigError

Span = tuple[int, int]

_ESCAPE = r"(?<=\\[abfnrtv])|(?<![A-Za-z0-9._%+\\-])"  # in code, an escape such as `\n` ends before an address begins
_MAILBOX = re.compile(rf"(?:{_ESCAPE})[A-Za-z0-9._%+-]{{1,64}}@")
MAILBOX = 64  # maximum characters before the @
_EMAIL = re.compile(rf"{_MAILBOX.pattern}(?:[A-Za-z0-9-]{{1,63}}\.){{1,8}}[A-Za-z]{{2,24}}(?![A-Za-z0-9_(-])")
_LOGIN = re.compile(r"(?:://[^\s/@]{0,100}|:/\w{1,100}|\bgit)@\Z")  # logins in a URL, or for git: `git@github.com:owner/name`
_NO_MAILBOX = re.compile(  # strings that have the form of an e-mail address, but aren't one
    r"\A(?:[^A-Za-z0-9]+@"  # a pattern: `LIKE '%@example.com'`
    r"|[a-z0-9-]*-[a-z0-9-]*@(?:openssh\.com|libssh\.org|lysator\.liu\.se)\Z"  # an algorithm of SSH
    r"|[^@]+@(?:www\.|[A-Za-z0-9-]+\.py\Z|\d{1,2}\.[A-Za-z]+\Z))"  # a web server, a Python file, an attribute: `f@1.bar`
)
_DOTS = re.compile(r"\.[0-9]{1,3}\.[0-9]")  # the first of them in an address is after its first group
_GROUP = re.compile(r"[0-9]{1,3}\Z")
_COLON = re.compile(r":(?<=[23][0-9a-fA-F]{3}:)")  # after the first group of an address
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\.?\w|-[A-Za-z]|\+\d)")  # excludes kernel versions and times
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])")  # 2000::/3
_NUMBERED = re.compile(  # four numbers with dots that aren't an address: a section, a version, an object identifier, a path
    r"(?:section|sec\.|chapter|appendix|version|\bver|\bv\.|release|minimum|maximum|object.?identifier|oid)s?"
    r"[-`'\"=:(_\s]{0,16}(?:[\d.]{1,12} (?:and|or|to) )?\Z"
    r"|(?:§|[=<>~!]=|\brfc[ -]?\d{1,5},?)\s?\Z|(?:[ ,-]\d){3}[ ,-]\Z",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"/\d{1,3}(?!\d)")  # prefix of a network
RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "9.9.9.9"})
"""Public name servers that `LONG` would exclude. 1.1.1.1 and 1.0.0.1 aren't in this set: in texts, they are more often the number
of a section or a version."""

LONG = 2  # minimum groups of two or more digits in an IPv4 address: with fewer, most matches are versions or sections
BEFORE = 128  # characters before a match that are checked
WRITTEN = 4  # minimum groups of an IPv6 address: a match with fewer groups may be a slice, a scope, or a time
_PHONE = re.compile(r"(?<![\w.+-])(?!\+?\d{1,20}\.\d{1,20}(?![\d.]))(?:\+|00)?\(?\d(?:[ ().\-/]{0,2}\d){6,16}(?!\w)")
_SAID = re.compile(  # words that must precede digits without a space: otherwise these digits may be any number
    r"(?:phone|tel|call|fax|\bfon(?!t)|mobil|cell|whatsapp|gsm|handy|☎|📞)[a-z]{0,3}(?: ?(?:number|nummer|no|nr))?\W{0,4}\Z",
    re.IGNORECASE,
)
_DECIMAL = re.compile(r"\d\.\d{3}(?: \d{3}){0,9} \Z")  # a decimal number, before its further digits in groups
_SEED = re.compile(r"(?:rng|seed|random)\w{0,20}[(=: ]{1,3}\Z", re.IGNORECASE)
_DIALED = re.compile(r"\d(?:[ ().\-/]{0,2}\d){6,}+")  # all digits of a phone number
_CARD_DIGITS = re.compile(r"\d(?:[ -]?\d){12,}+")
_CARD = re.compile(r"(?<![\w.*^-])\d(?:[ -]?\d){12,18}(?!\w)(?![.-]?\d)(?! ?[*^])")
_GROUPS = {(4, 4, 4, 4), (4, 6, 5), (4, 3, 3, 3), (4, 4, 4, 4, 3), (13,), (15,), (16,)}  # groups of a card's digits
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?=[ A-Z0-9])", re.DOTALL)
_ISSUERS = (  # card issuers: first digits (from, to), and lengths
    ("2221", "2720", (16,)), ("34", "34", (15,)), ("37", "37", (15,)), ("3528", "3589", (16,)), ("4", "4", (13, 16, 19)),
    ("50", "58", (16,)), ("60", "69", (16, 19)),
)  # fmt: skip
_DIGITS = re.compile(r"\d+")
OTHER_NAMES = {"UK": "GB", "USA": "US"}
FEWEST = 7  # minimum digits of a phone number
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
    """Finds e-mail addresses with an existing top-level domain. Leaves out logins in URLs and in the addresses of
    repositories."""
    for match in _each_email(text):
        local, at, host = match[0].partition("@")
        labels = host.split(".")
        while len(labels) > 1 and labels[-1].lower() not in top_level.NAMES:
            labels.pop()
        end = match.start() + len(local) + len(at)
        whole = local + at + ".".join(labels)
        if len(labels) > 1 and not _LOGIN.search(text, max(0, end - BEFORE), end) and not _NO_MAILBOX.match(whole):
            yield match.start(), match.start() + len(whole)


def _each_email(text: str) -> Iterator[re.Match[str]]:
    first = 0  # where the next address may begin
    while (at := text.find("@", first)) >= 0:
        mailbox = _MAILBOX.search(text, max(first, at - MAILBOX), at + 1)
        match = _EMAIL.match(text, mailbox.start()) if mailbox else None
        first = match.end() if match else at + 1
        if match:
            yield match


def addresses(text: str) -> Iterator[Span]:
    """Finds public IP addresses. Leaves out networks, and private, local, multicast, and documentation ranges."""
    for match in _each_ipv4(text):
        groups = match[0].split(".")
        plain = sum(len(group) > 1 for group in groups) < LONG and match[0] not in RESOLVERS
        if not plain and _public(match[0], text, match.end()) and not match[0].endswith(".0.0"):
            start = match.start()
            if not _NUMBERED.search(text, max(0, start - BEFORE), start):
                yield match.span()
    for match in _each_ipv6(text):
        if sum(map(bool, match[0].split(":"))) >= WRITTEN and _public(match[0], text, match.end()):
            yield match.span()


def _each_ipv4(text: str) -> Iterator[re.Match[str]]:
    for dot in _DOTS.finditer(text):
        group = _GROUP.search(text, max(0, dot.start() - 3), dot.start())
        if group and (match := _IPV4.match(text, group.start())):
            yield match


def _each_ipv6(text: str) -> Iterator[re.Match[str]]:
    yield from filter(None, (_IPV6.match(text, colon.start() - 4) for colon in _COLON.finditer(text)))


def _public(address: str, text: str, end: int) -> bool:
    """Checks whether an address is public, and isn't a network such as `2001:db8:7:a::/64`. `end`: the address's end in the
    text."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not parsed.is_global or parsed.is_multicast:
        return False
    prefix = _PREFIX.match(text, end)
    if prefix is None:
        return True
    try:
        return ipaddress.ip_network(address + prefix[0]).num_addresses == 1
    except ValueError:  # an address with its network's prefix, or a path of a URL
        return True


def cards(text: str) -> Iterator[Span]:
    """Finds card numbers. Checks the issuer's first digits and lengths, the usual groups of digits, and the Luhn checksum."""
    yield from _first_valid(_CARD_DIGITS, _CARD, text, _is_card)


def _is_card(number: str, before: str) -> bool:
    groups, digits = _DIGITS.findall(number), "".join(_DIGITS.findall(number))
    if tuple(map(len, groups)) not in _GROUPS or len({*number} - {*digits}) > 1 or len({*digits}) == 1 or _SEED.search(before):
        return False
    return any(len(digits) in lengths and low <= digits[: len(low)] <= high for low, high, lengths in _ISSUERS) and luhn(digits)


def _first_valid(
    digits: re.Pattern[str], pattern: re.Pattern[str], text: str, valid: Callable[[str, str], bool]
) -> Iterator[Span]:
    """Finds valid numbers. Takes the longest valid prefix of each match, because a date or a code may follow the number. `digits`
    matches all digits of a number. `pattern` also reads up to two characters before and after these digits."""
    for place in digits.finditer(text):
        at = max(0, place.start() - 2)
        while match := pattern.search(text, at, place.end() + 2):
            at, number = match.end(), match[0]
            for end in range(len(number), 0, -1):
                whole = number[end - 1].isdecimal() and not number[end : end + 1].isdecimal()
                if whole and valid(number[:end], text[max(0, match.start() - BEFORE) : match.start()]):
                    at = match.start() + end
                    yield match.start(), at
                    break


def luhn(digits: str) -> bool:
    total = sum(int(d) for d in digits[-1::-2])
    total += sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return total % 10 == 0


def ibans(text: str) -> Iterator[Span]:
    """Finds international bank account numbers (IBAN). Checks the length that the country uses, and the ISO 7064 checksum."""
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2])
        if length is None:
            continue
        at, characters = match.start(), list[str]()
        while at < len(text) and len(characters) < length:
            character = text[at]
            if character.isascii() and (character.isdigit() or character.isupper()):
                characters.append(character)
            elif character != " " or text[at - 1] == " ":
                break
            at += 1
        whole = len(characters) == length and not (at < len(text) and text[at].isalnum())
        if whole and int("".join(str(int(c, 36)) for c in characters[4:] + characters[:4])) % 97 == 1:
            yield match.start(), at


def require_region(region: str) -> None:
    """Raises ConfigError if the phone numbers of a region (a country code, such as US) aren't known."""
    import phonenumbers

    if region not in phonenumbers.SUPPORTED_REGIONS:
        meant = OTHER_NAMES.get(region.upper(), region.upper())
        known = meant in phonenumbers.SUPPORTED_REGIONS
        hint = f"Did you mean {meant!r}?" if known else "Remove `region` to find only numbers that start with +"
        raise ConfigError(f"region: {region!r} isn't an ISO 3166 country code (two capital letters, such as US). {hint}")


def phones(region: str | None) -> Callable[[str], Iterator[Span]]:
    """Builds a function that finds valid phone numbers in the international form and, if a region is given, in the region's
    national form."""
    import phonenumbers

    def valid(candidate: str, before: str) -> bool:
        groups = _DIGITS.findall(candidate)
        digits = "".join(groups)
        if len(digits) < FEWEST or (region is None and candidate[0] != "+") or not _apart(candidate) or _DECIMAL.search(before):
            return False
        try:
            number = phonenumbers.parse("+" * (candidate[0] == "+") + digits, region)
        except phonenumbers.NumberParseException:
            return False
        if not phonenumbers.is_valid_number(number):
            return False
        if candidate[0] == "+" or (len(groups) == 1 and _SAID.search(before)):
            return True
        usual = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)
        own = groups[1:] if groups[0] == str(number.country_code) else groups
        return _as_written(own, _DIGITS.findall(usual))

    return lambda text: _first_valid(_DIALED, _PHONE, text, valid)


def _apart(number: str) -> bool:
    """Checks that a candidate for a phone number has closed parentheses, and isn't a decimal number (its only separator is one
    point)."""
    between = {*number} - {*"0123456789+"}
    return number.count("(") == number.count(")") and ("." not in between or (between == {"."} and number.count(".") > 1))


def _as_written(groups: list[str], usual: list[str]) -> bool:
    """Checks whether the area code is a separate group of digits, as is usual in phone numbers. In a date or a list of numbers,
    these digits aren't a separate group."""
    ends = {len("".join(groups[i:])) for i in range(1, len(groups))}
    apart = len("".join(usual[1:])) in ends
    return apart and min(map(len, groups)) >= min(2, *map(len, usual))


def replaced(text: str, spans: dict[str, list[Span]], placeholders: dict[str, str]) -> tuple[str, dict[str, int]]:
    """Replaces spans with the placeholder of their kind. Returns the new text, and the number of replaced spans per kind. If two
    spans overlap, the kind that comes first in `spans` wins."""
    order = {kind: i for i, kind in enumerate(spans)}
    chosen = list[tuple[int, int, str]]()
    for start, stop, kind in sorted(
        ((a, b, kind) for kind, places in spans.items() for a, b in places), key=lambda s: (s[0], order[s[2]])
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
