"""Splits English text between white space into words, with regular expressions: the reference for the compiled loops."""

from itertools import pairwise

import regex
from heliostat.curation.english.characters import LABELS
from heliostat.curation.english.rules import BEFORE_STOP, EXCEPTIONS, FIRST, LAST, LETTER, LONGEST, LOWER, QUOTES, UNITS, UPPER


def _escaped(marks: str) -> str:
    return regex.escape(marks, special_only=False)


_PREFIX = regex.compile(rf"\.\.+|(?:US|C|A)\$|\+(?![0-9])|[{_escaped(FIRST)}]|\p{{So}}")
_SINGLE = frozenset(LAST)
_SYMBOL = regex.compile(r"\p{So}")
# a unit or currency after a number; searched only in the last characters
_MEASURE = regex.compile(rf"(?<=[0-9])(?:{'|'.join(map(regex.escape, sorted(UNITS, key=len, reverse=True)))})\Z")
_FULL_STOP = regex.compile(
    rf"(?:(?<=°[FfCcKk])|(?<=[{LOWER}{_escaped(BEFORE_STOP)}])|(?<=[{UPPER}][{UPPER}]))\.\Z",
    regex.V1,
)
_QUOTE = _escaped(QUOTES)
_INFIX = regex.compile(  # the marks between letters
    r"\.\.+|…|\p{So}|(?<=[0-9])[+\-*^](?=[0-9-])"
    rf"|(?<=[{LOWER}{_QUOTE}])\.(?=[{UPPER}{_QUOTE}])"
    rf"|(?<=[{LETTER}]),(?=[{LETTER}])|(?<=[{LETTER}0-9])(?:---?|——|[-–—~])(?=[{LETTER}])"
    rf"|(?<=[{LETTER}0-9])[:<>=/](?=[{LETTER}])",
    regex.V1,
)
_SCHEME = regex.compile(r"[\w+\-.]{2,}+://")
_LABEL = rf"(?:[{LABELS}][{LABELS}_-]{{0,62}}+\.)"
_HOST = regex.compile(rf"{_LABEL}++[{LOWER}]{{2,63}}(?::[0-9]{{2,5}})?(?:[/?#]\S*)?", regex.V1)
_ADDRESS = regex.compile(r"[1-9][0-9]{0,2}(?:\.[0-9]{1,3}){3}(?::[0-9]{2,5})?(?:[/?#]\S*)?")


def tokens(text: str) -> tuple[str, ...]:
    """Splits a string without white space into words."""
    if (text.isalpha() and text not in EXCEPTIONS) or len(text) > LONGEST:
        return (text,)
    parts = EXCEPTIONS.get(text) or _split(text, EXCEPTIONS)
    return tuple(_joined(list(parts))) if len(parts) > 1 else tuple(parts)


def _split(text: str, known: dict[str, tuple[str, ...]]) -> list[str]:
    """Splits off punctuation marks at both ends of a string, each as a word. Stops when the rest is in `known` or has no marks at
    its ends. Then splits the rest."""
    before, behind = list[str](), list[str]()
    while text and text not in known:
        size, mark, last = len(text), _PREFIX.match(text), 0
        first = mark.end() if mark else 0
        if first and text[first:] in known:
            before.append(text[:first])
            text = text[first:]
            break
        last = _suffix(text[first:])
        if last and text[:-last] in known:
            behind.append(text[-last:])
            text = text[:-last]
            break
        if first:
            before.append(text[:first])
        if last:
            behind.append(text[size - last :])
        text = text[first : size - last]
        if len(text) == size:
            break
    return [*before, *(_middle(text, known) if text else ()), *reversed(behind)]


def _suffix(text: str) -> int:
    """Returns the length, in characters, of the longest suffix to split off; 0 if there is none."""
    last = text[-1:]
    if not last:
        return 0
    if last == ".":
        dots = len(text) - len(text.rstrip("."))
        return dots if dots > 1 else int(_FULL_STOP.search(text, len(text) - 3 if len(text) > 3 else 0) is not None)
    if last == "…":
        return 2 if text.endswith("……") else 1
    if last in "sS" and text[-2:-1] in ("'", "’"):
        return 2
    if last in _SINGLE or _SYMBOL.match(last):
        return 1
    match = _MEASURE.search(text, len(text) - 8 if len(text) > 8 else 0)
    return len(match[0]) if match else 0


def _middle(text: str, known: dict[str, tuple[str, ...]]) -> list[str]:
    if text in known:
        return list(known[text])
    return [text] if _is_url(text) else _infixes(text)


def _infixes(text: str) -> list[str]:
    """Splits a string at the marks between its letters."""
    out, start = list[str](), 0
    for match in _INFIX.finditer(text):
        if match.start() == 0:
            continue
        if match.start() != start:
            out.append(text[start : match.start()])
        out.append(match[0])
        start = match.end()
    return [*out, text[start:]] if start < len(text) else out


def _is_url(text: str) -> bool:
    """Checks whether a string is a URL: a host with a top-level domain, or a public IP address, with the usual parts of a URL."""
    if "." not in text:
        return False
    starts = {0}
    if scheme := _SCHEME.match(text):
        starts.add(scheme.end())
    if (at := text.rfind("@")) > 0:
        starts.add(at + 1)
        starts.update(i + 1 for i in (text.find("@", start + 1) for start in tuple(starts)) if i > 0)
    return any(_HOST.fullmatch(text, start) or (_ADDRESS.fullmatch(text, start) and _public(text[start:])) for start in starts)


def _public(address: str) -> bool:
    """Checks whether the four numbers at the start of an IPv4 address are valid, and outside private networks."""
    first, second, third, last = (int(number) for number in regex.match(r"(\d+)\.(\d+)\.(\d+)\.(\d+)", address).groups())
    private = first in (10, 127) or (first, second) in ((169, 254), (192, 168)) or (first == 172 and 16 <= second <= 31)
    return not private and first <= 223 and max(second, third) <= 255 and 1 <= last <= 254


# The rules split some emoticons and abbreviations. These are joined again, in longer strings, too.
_SPLIT = {tuple(parts): whole for whole in EXCEPTIONS if len(parts := _split(whole, {})) > 1}
_FIRST, PAIRS = {parts[0] for parts in _SPLIT}, {parts[:2] for parts in _SPLIT}
_MOST = max(map(len, _SPLIT))


def _joined(parts: list[str]) -> list[str]:
    if PAIRS.isdisjoint(pairwise(parts)):
        return parts
    spans = [
        (stop - start, start)
        for start, word in enumerate(parts)
        if word in _FIRST
        for stop in range(start + 2, min(start + _MOST, len(parts)) + 1)
        if tuple(parts[start:stop]) in _SPLIT
    ]
    taken, chosen = set[int](), dict[int, int]()
    for length, start in sorted(spans, key=lambda span: (-span[0], span[1])):
        if start not in taken and start + length - 1 not in taken:
            chosen[start] = length
        taken.update(range(start, start + length))
    out, at = list[str](), 0
    while at < len(parts):
        length = chosen.get(at, 1)
        out += EXCEPTIONS[_SPLIT[tuple(parts[at : at + length])]] if length > 1 else parts[at : at + 1]
        at += length
    return out
