"""Finds out whether this machine has machine code of this version's loops (`compiled`), without importing Numba."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
SHARED = "compiled.py", "comparable_characters.py"  # modules of this folder whose functions and constants all loops use


@lru_cache(maxsize=8)
def modules_digest(folder: Path) -> str:
    """Returns a digest of a folder's modules, and of the SHARED ones. It is a part of the names of the folder's cached files."""
    modules = *sorted(folder.glob("*.py")), *(HERE / name for name in SHARED)
    return hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()[:12]


def is_missing() -> bool:
    """Checks whether no loop of this version is compiled yet. The result is about this machine, and not about other nodes."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - a user may have no home
    places = [Path(chosen)] if chosen else [HERE, Path(caches, "numba")]
    names = [f"*_{modules_digest(folder)}-*.nbc" for folder in (HERE, HERE / "english")]
    with suppress(OSError):  # another user's folder
        return not any(True for place in places for name in names for _ in place.rglob(name))
    return True
