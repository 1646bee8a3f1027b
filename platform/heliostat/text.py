"""Formats text for messages: escapes untrusted text for a terminal, suggests similar names, and explains wrong values."""

from __future__ import annotations

import difflib
import re
from typing import Any

# control characters (C0, C1, DEL); line and paragraph separators; marks, embeddings, overrides, isolates of text direction
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 300
UNKNOWN = "..."  # stands for a value of an unknown kind
MAPPING = ("a mapping", "{KEY: VALUE}")
WANTED = {  # pydantic's error type -> the expected value in YAML's words, and an example
    "dict_type": MAPPING, "model_type": MAPPING, "model_attributes_type": MAPPING, "list_type": ("a list", "[VALUE, ...]"),
    "int_type": ("an integer", "INTEGER"), "float_type": ("a number", "NUMBER"), "bool_type": ("true or false", "true|false"),
    "string_type": ("text", "TEXT"),
}  # fmt: skip
LIMITS = {  # pydantic's error type -> the problem and the fix, with limits from the error's context
    "greater_than": "is too small. Use a number above {gt}", "greater_than_equal": "is too small. Use {ge} or more",
    "less_than": "is too large. Use a number below {lt}", "less_than_equal": "is too large. Use {le} or less",
    "finite_number": "isn't finite. Use a finite number",
    "too_short": "is too short. Write {min_length} or more items", "too_long": "is too long. Write {max_length} or fewer items",
    "string_too_short": "is too short. Write {min_length} or more characters",
    "string_too_long": "is too long. Write {max_length} or fewer characters",
    "byte_size": "isn't a size. Write bytes, such as 512MiB", "byte_size_unit": "isn't a size. Write bytes, such as 512MiB",
}  # fmt: skip
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_FAULT = "isn't a valid name. Use up to 100 letters, digits, '.', '_' and '-', with a letter or digit first"


def printable(text: str, lines: bool = False) -> str:
    """Escapes all characters that move a terminal's cursor, change the color of text, or reverse the direction of text.

    `lines`: whether to keep line breaks and tabs.
    """
    return UNSAFE.sub(lambda match: match[0] if lines and match[0] in "\n\t" else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def plural(count: float, noun: str) -> str:
    """Formats a count with its noun: `1 node`, `2,000 nodes`."""
    return f"{count:{',' if isinstance(count, int) else 'g'}} {noun}{'' if count == 1 else 's'}"


def brief(text: object, longest: int = LONGEST) -> str:
    """Shortens a text, such as a library's message, to its first line, and to at most `longest` printable characters."""
    said = str(text).strip() or (type(text).__name__ if isinstance(text, BaseException) else "")
    line = said.splitlines()[0].strip() if said else ""
    shown = printable(line[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[: longest - 4]} ..."


def nearest(word: str, choices: list[str]) -> str:
    """Suggests the most similar choice as `. Did you mean 'x'?`.

    If no choice is similar, lists all choices instead, up to 30. Returns "" if more than 30 choices exist and none is similar, or
    if the list is empty.
    """
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f". Did you mean {close[0]!r}?"
    return f". Use one of: {', '.join(sorted(choices))}" if 0 < len(choices) <= 30 else ""


def value_problem(kind: str, message: str, value: str, limits: dict[str, Any], key: str, example: str = UNKNOWN) -> str:
    """Explains the problem with a value, and what to write instead.

    `kind`, `message`, `limits`: the type, message, and context of pydantic's error. `example`: an example of the key's value.
    """
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind in LIMITS:
        numbers = {name: _limit(limit, value) for name, limit in limits.items()}
        return f"{value} {LIMITS[kind].format(**numbers)}"
    if kind == "string_pattern_mismatch":
        pattern = limits["pattern"]
        return f"{value} {NAME_FAULT if pattern == NAME else f'has other characters than {pattern} allows. Correct the value'}"
    wanted, usual = WANTED.get(kind, ("", UNKNOWN))
    example = usual if example == UNKNOWN else example
    problem = f"expected {wanted}, got {value}" if wanted else f"{message.removeprefix('Input ')} ({value})"
    fix = f". Write {key}: {example}" if key and example != UNKNOWN else "" if wanted else ". Correct the value"
    return f"{problem}{fix}"


def _limit(limit: object, value: str) -> object:
    """Formats the limit of a value. The limit of a size, which may be text such as '5MB', is in MiB."""
    if value.startswith("'") and isinstance(limit, int) and limit >= 1 << 20:
        return f"{limit / (1 << 20):g}MiB"
    return f"{limit:g}" if isinstance(limit, float) else limit


def absent(key: str, example: str = UNKNOWN) -> str:
    """Writes the message for a missing key, with an example of its value."""
    return f"{key}: required key missing. Write {key}: {example}"


def listed(where: str, lines: list[str]) -> str:
    """Joins faults to one message. A single fault follows `where` on the same line. Several faults are on the lines below
    `where`."""
    return f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{where}:", *lines])
