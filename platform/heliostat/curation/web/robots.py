"""Parses robots.txt by RFC 9309: all groups of an agent count, the longest matching rule wins, and `*` and `$` are wildcards. The
RFC doesn't define `Crawl-delay`. Here, `Crawl-delay` is a rule of a group, so a `user-agent` line after `Crawl-delay` begins a
new group.
"""

from __future__ import annotations

import codecs
import math
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

TOKEN = re.compile(r"[^/\s]*")
OCTET = re.compile("%([0-9A-Fa-f]{2})")
UNRESERVED = string.ascii_letters + string.digits + "-._~"
SAFE = "%:/?#[]@!&'()+,;="  # `*` and `$`, which are wildcards in a pattern, are quoted in the compared text
MOST_S = 1e9  # maximum seconds of a delay


@dataclass(frozen=True, slots=True)
class Rule:
    """Holds an Allow or Disallow rule, with the pattern split at each `*` into pieces. A matching URL path begins with the first
    piece, and ends with the last piece."""

    pieces: tuple[str, ...]
    length: int
    allow: bool

    def matches(self, target: str) -> bool:
        """Checks whether a normalized URL path contains the rule's pieces in order. Searches for each piece only once, after the
        end of the previous piece."""
        first, last, at = self.pieces[0], self.pieces[-1], len(self.pieces[0])
        if len(self.pieces) == 1:
            return target == first
        if not target.startswith(first):
            return False
        for piece in self.pieces[1:-1]:
            place = target.find(piece, at)
            if place < 0:
                return False
            at = place + len(piece)
        return target.endswith(last) and len(target) - len(last) >= at


@dataclass(frozen=True, slots=True)
class RobotsRules:
    """Holds the rules of a robots.txt for one agent, in order of precedence, and the minimum seconds between two requests."""

    rules: tuple[Rule, ...] = ()
    delay: float = 0.0

    def allow(self, target: str) -> bool:
        compared = normal(target)
        return next((rule.allow for rule in self.rules if rule.matches(compared)), True)


def parse(data: bytes, agent: str) -> RobotsRules:
    """Parses the rules of a robots.txt for an agent. Uses the groups that list the agent, or, without such groups, the groups for
    `*`."""
    own, groups = token(agent), dict[str, list[tuple[str, str]]]()
    named, naming = set[str](), False
    for field, value in _lines(data):
        if field == "user-agent":
            named, naming = (named if naming else set()) | ({token(value)} & {own, "*"}), True
            groups.update({name: [] for name in named if name not in groups})
        elif field in ("allow", "disallow", "crawl-delay"):
            naming = False
            for name in named:
                groups[name].append((field, value))
    mine = groups.get(own, groups.get("*", []))
    rules = (_rule(value, field == "allow") for field, value in mine if value and field != "crawl-delay")
    delay = max((_seconds(value) for field, value in mine if field == "crawl-delay"), default=0.0)
    return RobotsRules(tuple(sorted(rules, key=lambda rule: (-rule.length, not rule.allow))), delay)


def token(agent: str) -> str:
    """Returns the name that robots.txt uses for a user agent: the part before a version or a comment, in lower case."""
    match = TOKEN.match(agent.strip())
    return match[0].lower() if match else ""


def normal(text: str) -> str:
    """Normalizes a URL path, so that equal paths have equal strings: percent-encodes only the characters that need it."""
    return OCTET.sub(_octet, quote(text, safe=SAFE, errors="surrogateescape"))


def _octet(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in UNRESERVED else match[0].upper()


def _lines(data: bytes) -> Iterable[tuple[str, str]]:
    for line in data.removeprefix(codecs.BOM_UTF8).splitlines():
        field, _, value = line.decode("utf-8", "surrogateescape").partition("#")[0].partition(":")
        yield field.strip().lower(), value.strip()


def _rule(pattern: str, allow: bool) -> Rule:
    """Parses the pattern of an Allow or Disallow line. A pattern without a final `$` matches all paths that begin with the
    pattern."""
    ends = pattern.endswith("$")
    parts = [normal(part) for part in pattern.removesuffix("$").split("*")]
    length = len("*".join(parts)) + ends
    first, *others = parts if ends else [*parts, ""]
    return Rule((first, *filter(None, others[:-1]), *others[-1:]), length, allow)


def _seconds(value: str) -> float:
    """Parses the value of `Crawl-delay`. Returns the seconds, rounded up to an integer; 0 if the value is invalid."""
    try:
        number = float(value)
    except ValueError:
        return 0.0
    return float(math.ceil(min(number, MOST_S))) if number > 0 else 0.0
