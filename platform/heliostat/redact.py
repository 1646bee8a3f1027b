"""Hides secrets in text: passwords and keys in URIs, and the values of keys whose names suggest a secret.

Errors and logs pass through `redact`, so no URI in them shows its password. `secret_lines` searches files before heliostat sends
or stores them. In case of doubt, heliostat hides a harmless word instead of showing a password.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

HIDDEN = "***"
USERS = ("git", "mssql", "mysql", "postgres", "postgresql", "sftp", "ssh")  # schemes whose user name isn't a secret
URI = re.compile(r"""(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*)://([^\s"<>]+)""", re.I)
PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # a host, with or without a port
NAME = (
    r"(?:(?:password|passwd|passphrase|pwd|secret|credential|(?:api|access|account|secret|private)[_-]?key(?:[_-]?id)?)s?|"
    r"(?<!bos_)(?<!cls_)(?<!eos_)(?<!pad_)(?<!sep_)(?<!unk_)(?<!mask_)token)"
)
QUERY = re.compile(rf"([?&;][\w.-]*(?:{NAME}|signature|\bsig|odbc_connect)[\w.-]*=)[^\s&\"<>]+", re.I)
ENDPOINT = re.compile(r"(endpoint_override=)[^\s&\"<>/]*@", re.I)

KEY = re.compile(rf"""(?<![/\w.-])[\w.-]*{NAME}["']?\]?\s*(?::(?=\s|$)|=(?!=))\s*""", re.I)
LITERAL = re.compile(rf"""((?<![\w.-])[\w.-]*{NAME}["']?\]?\s*(?::|=(?!=))\s*[a-z]?)((["']).{{4,}}?\3)""", re.I)
# values that refer to a secret, or are empty
REFERENCE = re.compile(
    r"""["']?(\$.*|\{\{.*|<[^>]*>|[*.]+|~/.*|null|none|~|true|false|os\.environ.*|)["']?[,}\])]*(\s+#.*)?""", re.I
)
BLOCK = re.compile(r"[|>]\S*(\s+#.*)?")
COMMENT = re.compile(r"#\s*(-\s+|export\s+)?")
ENVIRONMENT = re.compile(rf"""^\s*(?:-\s+)?name\s*:\s*["']?[\w.-]*{NAME}["']?\s*$""", re.I)
VALUE = re.compile(r"""^(\s*(?:-\s+)?value\s*:\s*)(.*)$""")
PAIR = re.compile(r"""^\s*(?:-\s+)?["']?[\w.-]+["']?\s*:(\s|$)""")
BEGIN, END = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"), re.compile(r"-----END [A-Z ]*PRIVATE KEY")


def redact(text: str) -> str:
    """Replaces the secrets in a text's URIs with ***."""
    if "://" in text:
        text = URI.sub(_without_user, text)
    if "=" in text:
        text = ENDPOINT.sub(rf"\1{HIDDEN}@", QUERY.sub(rf"\1{HIDDEN}", text))
    return text


def carries_secret(uri: str) -> bool:
    """Checks whether a URI contains a password or a key anywhere."""
    whole = re.sub(r"""[\s"<>]""", "_", uri)  # characters that would end a URI inside a text
    return redact(whole) != whole


def _without_user(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    end = authority.rfind("@")
    named = ":" in authority[: end if end >= 0 else None]
    if end < 0 and (not named or (scheme.lower() in ("http", "https") and PORT.fullmatch(authority))):
        return match[0]  # an @ after the first slash belongs to the path
    if named:
        end = rest.rfind("@")  # a password may contain / ? #, although these characters end the authority of a URI
    if end < 0:
        return match[0]
    if scheme.lower().split("+")[0] in USERS:
        user, mark, _ = rest[:end].partition(":")
        return f"{scheme}://{user}{mark}{HIDDEN if mark else ''}{rest[end:]}"
    return f"{scheme}://{HIDDEN}{rest[end:]}"


class Formatter(logging.Formatter):
    """Formats log lines and tracebacks without the secrets of URIs."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Writes the traceback of an uncaught error, without the secrets of URIs."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


SETTINGS = ("", ".cfg", ".conf", ".env", ".ini", ".json", ".properties", ".sh", ".tf", ".toml", ".yaml", ".yml")  # suffixes

# files ---------------------------------------------------------------------------------------------------------------


def secret_lines(lines: list[str], settings: bool) -> set[int]:
    """Finds the numbers, from 0, of the lines that contain a secret.

    `settings`: whether the file's suffix is in SETTINGS. In such a file, any value counts if its key's name suggests a secret,
    including the value's continuation lines. In code, only a literal counts.
    """
    secret = {i for i, line in enumerate(lines) if hide(line, settings) != line} | _keys(lines)
    return secret | (_continued(lines) | _environment(lines) if settings else set())


def hide(line: str, settings: bool) -> str:
    """Hides the secrets in a line. Can't find a secret that began on an earlier line."""
    line = redact(line)
    if not settings:
        return LITERAL.sub(rf"\1{HIDDEN}", line)
    for at in _values(line):
        if (value := line[at:].strip()) and not BLOCK.fullmatch(value):
            return line[:at] + HIDDEN
    return line


def _values(line: str) -> list[int]:
    """Finds the start positions of values that may be secrets. An empty value may continue on the next lines."""
    values = []
    for match in KEY.finditer(line):
        before, value = line[: match.start()], line[match.end() :].strip()
        colon = ":" in match[0]
        prose = colon and "#" in before and not COMMENT.fullmatch(before[before.index("#") :])
        known = REFERENCE.fullmatch(value if colon else value.partition(" ")[0])
        if not prose and (not known or not value):
            values.append(match.end())
    return values


def _keys(lines: list[str]) -> set[int]:
    """Finds the line numbers of private keys in PEM blocks."""
    numbers, inside = set[int](), False
    for i, line in enumerate(lines):
        inside = inside or bool(BEGIN.search(line))
        if inside:
            numbers.add(i)
        inside = inside and not END.search(line)
    return numbers


def _continued(lines: list[str]) -> set[int]:
    """Finds the numbers of the lines that continue the value of a key whose name suggests a secret: lines with more indentation
    than the key, and plain items of a list."""
    numbers = set[int]()
    for i, line in enumerate(lines):
        values = _values(line)
        if not values:
            continue
        open_value = bool(line[values[-1] :].strip())  # a scalar that continues; without one a mapping or a list may follow
        for j in range(i + 1, len(lines)):
            text = lines[j].strip()
            deeper = _indent(lines[j]) > _indent(line) or (not open_value and text.startswith("- "))
            if text and not deeper:
                break
            if text and (open_value or not PAIR.match(lines[j])) and not REFERENCE.fullmatch(text.removeprefix("- ")):
                numbers.add(j)
    return numbers


def _environment(lines: list[str]) -> set[int]:
    """Finds each `value` line next to a `name` line whose name suggests a secret. Kubernetes files have environment variables in
    this form."""
    numbers = set[int]()
    for i, line in enumerate(lines):
        if ENVIRONMENT.match(line):
            for j in (i - 1, i + 1):
                value = VALUE.match(lines[j]) if 0 <= j < len(lines) else None
                if value and not REFERENCE.fullmatch(value[2].strip()):
                    numbers.add(j)
    return numbers


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
