"""Lists all files below a folder of an object store by several requests at a time.

A store gives a listing page by page, a thousand names each, and each page says where the next begins: a million objects take a
thousand answers, one behind the other. Folders can be listed beside one another. So folders are looked for until there are enough
of them, and each is listed by itself; where they hold so little that a request for each would be more work, or there are none,
everything is listed in one stream. What is found, and its order, is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as pafs

from heliostat.storage.s3_client import Listed as Info

THREADS = 16
ENOUGH = 64  # folders, behind which no more are looked for
LEVELS = 4  # of folders that are looked into, at most
PAGE = 1000  # names that a store gives at a time

Listed = Callable[[str, bool], list[Info]]
"""Lists a folder: what is directly in it, or (True) all below."""


def files_below(path: str, listed: Listed) -> list[Info]:
    """Lists all files below a folder, sorted by path."""
    with ThreadPoolExecutor(THREADS) as pool:
        found, folders = _split(listed(path, False))
        for _ in range(LEVELS):
            if not 0 < len(folders) < ENOUGH:
                break
            files, folders = _split(i for infos in pool.map(lambda f: listed(f, False), folders) for i in infos)
            found += files
        if not all(_plain(path, folder) for folder in folders):
            return _sorted(listed(path, True))
        first, rest = folders[:THREADS], folders[THREADS:]
        below = [i for infos in pool.map(lambda f: listed(f, True), first) for i in infos]
        if rest and len(below) * THREADS < PAGE * len(first):  # one stream has fewer answers than each thread would have
            return _sorted(listed(path, True))
        below += [i for infos in pool.map(lambda f: listed(f, True), rest) for i in infos]
    return _sorted([*found, *below])


def _split(infos: Iterable[Info]) -> tuple[list[Info], list[str]]:
    """Splits a listing into files and the paths of folders."""
    held = list(infos)
    return [i for i in held if i.type == pafs.FileType.File], [i.path for i in held if i.type == pafs.FileType.Directory]


def _plain(path: str, folder: str) -> bool:
    """Tells whether a folder can be listed by its path: a key may have empty names in it (`a//b`), which a path has not."""
    return folder.startswith(f"{path}/") and all(folder[len(path) + 1 :].split("/"))


def _sorted(infos: list[Info]) -> list[Info]:
    return sorted({i.path: i for i in infos if i.type == pafs.FileType.File}.values(), key=lambda i: i.path)
