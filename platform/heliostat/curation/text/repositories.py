"""Finds the code repositories in an input: archives, and git clones on disk. It ignores other files.

In the listing, a clone's size is the bytes of the files in the newest commit. A clone's modification time is a number from the
first digits of the commit hash. So the listing doesn't depend on how the repository was cloned, or on how git stores the clone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from heliostat.curation.prepare import InputFile
from heliostat.curation.readers import archives, clones
from heliostat.curation.readers.streams import LeftOutError
from heliostat.curation.text import sources
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

COLUMNS = ("repository", "path", "commit", "language", "license")  # columns of a document, if they are known
DIGITS = 15  # hex digits of a commit that fit into an integer of 64 bits
THREADS = 8


def listing(uri: str) -> list[InputFile]:
    """Lists the archives and git clones of an input, sorted by path. Raises ConfigError if there are none, if a clone isn't on
    disk, or if git isn't installed."""
    base, listed = sources.find(uri)
    paths = {path for path, _ in listed}
    folders = _clones(base, paths)
    if folders and base.is_s3:
        place = base.join(folders[0]) if folders[0] else base
        raise ConfigError(f"input: {place}: heliostat reads git clones only from disk. Use an archive of the clone (git archive)")
    if folders and not clones.there_is_git():
        raise ConfigError("input: contains git clones, but `git` isn't installed. Install git")
    inside = tuple(_worked_in(folder) for folder in folders)
    files = [
        InputFile(path, info.size, info.mtime_ns, info.etag)
        for path, info in listed
        if archives.is_archive(path or base.name) and not path.startswith(inside)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        files += pool.map(lambda folder: _listed(base, folder), folders)
    if not files:
        what = "no archive (.tar, .zip, also compressed) and no git clone (a folder whose name ends in .git)"
        raise ConfigError(f"input: {uri!r}: {len(listed):,} files, but {what}. Change input, or remove `repositories`")
    return sorted(files, key=lambda f: f.path)


def commit_of(modified: int) -> str:
    """Returns the first digits of a commit hash from a clone's modification time in the listing; "HEAD" for 0."""
    return f"{modified:0{DIGITS}x}" if modified else "HEAD"


def _clones(base: Location, paths: set[str]) -> list[str]:
    """Returns the folders of git repositories, which contain the files `HEAD` and `config`. Ignores repositories inside other
    repositories."""
    heads = sorted(path[: -len("HEAD")].rstrip("/") for path in paths if path == "HEAD" or path.endswith("/HEAD"))
    folders = [f for f in heads if clones.is_clone(f or base.name) and {f"{f}/config".lstrip("/")} <= paths]
    return [f for f in folders if not any(f != other and f.startswith(_worked_in(other)) for other in folders)]


def _worked_in(folder: str) -> str:
    """Returns the common prefix of all paths of a clone and of the clone's working tree."""
    if folder == "" or folder == clones.SUFFIX:
        return ""
    return folder.removesuffix(clones.SUFFIX) if folder.endswith(f"/{clones.SUFFIX}") else f"{folder}/"


def _listed(base: Location, folder: str) -> InputFile:
    """Returns the listing's entry for a clone. An unreadable clone has 0 bytes. heliostat reports the reason later, when it reads
    the clone."""
    try:
        if not sources.inside(base, folder):
            return InputFile(folder, 0, 0)
        commit, size = clones.facts(Path(base.path, folder))
    except LeftOutError:
        return InputFile(folder, 0, 0)
    return InputFile(folder, size, int(commit[:DIGITS], 16))
