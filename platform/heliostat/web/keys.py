"""Manages API keys. The file of keys has one key per line, and only the file's owner can read it. Servers keep only digests of
the keys.

    KEY
    NAME KEY        # metrics and limits use the name; a comment begins at the line's start or after white space

Servers compare a key's digest in constant time, and always with the digests of all known keys.
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

LEAST = 16  # minimum characters of a key: shorter keys can be guessed
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
COMMENT = re.compile(r"(?:^|\s)#")


def digest(key: str) -> str:
    """Returns the digest of a key (SHA-256, in hex). Servers keep the digest instead of the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def made(path: Path) -> bool:
    """Creates a file with a new API key, if the file doesn't exist. Returns True if the file was created."""
    if path.exists():
        return False
    Location(str(path.absolute())).require_writable()
    path.parent.mkdir(parents=True, exist_ok=True)
    private.write_token(path, f"sk-{secrets.token_urlsafe(32)}\n")
    return True


def read(path: Path) -> dict[str, str]:
    """Reads a file of API keys. Returns a mapping from each key's name to the key's digest. A key without a name gets the name
    `key-LINE`, in which LINE is the key's line number.

    Raises ConfigError if the file is unreadable, is open to other users, has an invalid line, or contains no key. No error
    message shows a key.
    """
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"--keys: can't read {path} ({getattr(e, 'strerror', None) or type(e).__name__}). Pass a text file with keys"
        ) from e
    if mode & 0o077:
        raise ConfigError(f"--keys: other users can read {path}. Run `chmod 600 {path}`, then replace the keys in the file")
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = _words(line)
        if not words:
            continue
        name = words[0] if len(words) == 2 else f"key-{number}"
        if len(words) > 2 or not NAME.fullmatch(name):
            raise ConfigError(
                f"--keys: {path}, line {number}: the line isn't a key. Write KEY, or NAME KEY. "
                "Neither NAME nor KEY may contain spaces"
            )
        if len(words[-1]) < LEAST:
            raise ConfigError(
                f"--keys: {path}, line {number}: the key is shorter than {LEAST} characters, so others could guess the key. "
                "Use a longer key"
            )
        if name in keys:
            raise ConfigError(f"--keys: {path}, line {number}: the name {name!r} appears twice. Rename this key")
        keys[name] = digest(words[-1])
    if not keys:
        raise ConfigError(
            f"--keys: {path} contains no key. Write one key per line, or pass the path of a new file: heliostat writes a key "
            "to this file"
        )
    return keys


def _words(line: str) -> list[str]:
    """Returns a line's words before a comment. A comment begins with a `#` at the line's start or after white space."""
    return COMMENT.split(line, maxsplit=1)[0].split()


def first(path: Path) -> str:
    """Returns the first key in a file."""
    lines = (_words(line) for line in path.read_text(encoding="utf-8").splitlines())
    return next(words[-1] for words in lines if words)


def owner(header: str | None, known: dict[str, str]) -> str:
    """Returns the name of the key in an Authorization header; raises Refusal with status 401 if the key is missing or
    unknown."""
    kind, _, key = (header or "").partition(" ")
    if kind.lower() != "bearer" or not key.strip():
        raise Refusal(401, "no API key. Send the header `Authorization: Bearer KEY`", None, "invalid_api_key")
    key_digest = digest(key.strip())
    matches = [name for name, one in known.items() if hmac.compare_digest(key_digest, one)]
    if not matches:
        raise Refusal(401, "unknown API key. Use a key from the server's --keys file", None, "invalid_api_key")
    return matches[0]
