"""Removes the folders that killed dry runs left."""

from __future__ import annotations

import logging
import re
import secrets
import time

import pyarrow.fs as pafs

from heliostat.errors import StorageError
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

SAMPLE = re.compile(r"\.sample-[0-9a-f]{8}")
OLD_S = 86_400.0  # seconds since the last write in a folder: a younger folder may be in use, on any machine


def sample_folder(output: Location) -> Location:
    """Returns a random new location next to the output, for the files of a dry run. Doesn't create the folder."""
    return output.ending(f".sample-{secrets.token_hex(4)}")


def remove_old_samples(output: Location, now: float | None = None) -> list[str]:
    """Removes dry-run folders next to the output that were last written over a day ago; returns their names."""
    base, mark, query = output.uri.partition("?") if output.is_s3 else (output.uri, "", "")
    place, _, name = base.rstrip("/").rpartition("/")
    if output.is_s3 and place == "s3:/":  # a bucket has no parent folder
        return []
    beside, gone = Location((place or ("/" if base.startswith("/") else ".")) + mark + query), list[str]()
    for folder in beside.folders():
        if folder.startswith(name) and SAMPLE.fullmatch(folder[len(name) :]):
            samples = beside.join(folder)
            if (time.time() if now is None else now) - _written(samples) >= OLD_S:
                samples.delete()
                gone.append(folder)
    if gone:
        log.info("%s: removed the leftovers of killed dry runs: %s", beside, ", ".join(gone))
    return gone


def _written(folder: Location) -> float:
    """Returns the time of the last write in the folder, in seconds since 1970; the current time if the last write isn't known."""
    selector = pafs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    try:
        infos = folder.attempt(lambda: [folder.fs.get_file_info(folder.path), *folder.fs.get_file_info(selector)])
    except (FileNotFoundError, StorageError):
        return time.time()
    return max((i.mtime_ns / 1e9 for i in infos if i.mtime_ns), default=time.time())
