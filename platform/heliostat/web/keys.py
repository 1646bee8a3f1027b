"""Keeps API keys: a file that only its owner reads, a key a line; what serves requests knows their digests alone.

    KEY
    NAME KEY        # the name is what metrics and limits count by; a comment begins at the line's start or behind white space

Keys are compared by their digests, in constant time, each of them whatever the others gave.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from heliostat.cluster import private
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.web.refusals import Refusal

LEAST = 16  # characters of a key: shorter ones can be guessed
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
COMMENT = re.compile(r"(?:^|\s)#")


def digest(key: str) -> str:
    """Returns what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def made(path: Path) -> bool:
    """Makes a file with a new key if there is none; tells whether it did."""
    if path.exists():
        return False
    Location(str(path.absolute())).require_writable()
    path.parent.mkdir(parents=True, exist_ok=True)
    private.write_token(path, f"sk-{secrets.token_urlsafe(32)}\n")
    return True


def read(path: Path) -> dict[str, str]:
    """Reads the digests of a file's keys by their names; ConfigError that shows no key."""
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--keys: can't read {path} ({getattr(e, 'strerror', None) or type(e).__name__})") from e
    if mode & 0o077:
        raise ConfigError(f"--keys: other users can read {path}. Run `chmod 600 {path}`, then make new keys")
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = _words(line)
        if not words:
            continue
        name = words[0] if len(words) == 2 else f"key-{number}"
        if len(words) > 2 or not NAME.fullmatch(name):
            raise ConfigError(f"--keys: {path}, line {number}: isn't a key. Write KEY, or NAME KEY, without spaces in them")
        if len(words[-1]) < LEAST:
            raise ConfigError(
                f"--keys: {path}, line {number}: the key is shorter than {LEAST} characters, so others could guess it"
            )
        if name in keys:
            raise ConfigError(f"--keys: {path}, line {number}: the name {name!r} appears twice")
        keys[name] = digest(words[-1])
    if not keys:
        raise ConfigError(f"--keys: {path} contains no key. Write one per line, or name a new file, which heliostat fills")
    return keys


def _words(line: str) -> list[str]:
    """Returns a line's words before a comment, which begins with a `#` at its start or behind white space."""
    return COMMENT.split(line, maxsplit=1)[0].split()


def first(path: Path) -> str:
    lines = (_words(line) for line in path.read_text(encoding="utf-8").splitlines())
    return next(words[-1] for words in lines if words)


def owner(header: str | None, known: dict[str, str]) -> str:
    """Finds the name of the key in an Authorization header; Refusal with 401 if there is none, or it is not known."""
    kind, _, key = (header or "").partition(" ")
    if kind.lower() != "bearer" or not key.strip():
        raise Refusal(401, "no API key. Send the header `Authorization: Bearer KEY`", None, "invalid_api_key")
    key_digest = digest(key.strip())
    matches = [name for name, one in known.items() if hmac.compare_digest(key_digest, one)]
    if not matches:
        raise Refusal(401, "unknown API key", None, "invalid_api_key")
    return matches[0]
