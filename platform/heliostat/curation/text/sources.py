"""Finds the files of a text input: a file, a folder, a glob, an s3:// prefix, a dataset of the Hub, or `python:stdlib`.

The listing is the same at any location, because paths are relative to the input's root, and sorted. heliostat reads a file up to
a limit, and only if the file is inside the input: links and paths in metadata files can't lead to files outside.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from heliostat.config import workspace
from heliostat.curation import hub, readers
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile, place
from heliostat.curation.readers.streams import CODECS
from heliostat.curation.readers.streams import LeftOutError as LeftOutError
from heliostat.curation.text.ahead import ReadAhead, changed, of_object
from heliostat.errors import AccessError, ConfigError, DataError
from heliostat.storage.hub import names
from heliostat.storage.locations import Location
from heliostat.storage.s3_client import Listed
from heliostat.text import brief, nearest, plural, printable

log = logging.getLogger(__name__)

STDLIB = "python:stdlib"
FIELD = 1 << 17  # maximum characters of a value in a .csv with images or URLs; the limit is global, so it is set before each file
BYTES = {"extract": "pages or web archives", "pdf": "PDFs"}  # the inputs that each stage turns into text
# folders that don't belong to the library: installed packages, tests (with intentionally invalid data), compiled files
STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def split_glob(uri: str) -> tuple[str, str | None]:
    """Splits a URI into (root, pattern): `data/**/*.md` is (`data`, `**/*.md`); the pattern is None if there is no wildcard."""
    s3 = uri.startswith("s3://")
    base, mark, query = uri.partition("?") if s3 else (uri, "", "")  # in an s3:// URI, a question mark starts the query
    parts = base.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[*\[]" if s3 else r"[*?\[]", part)), None)
    if first is None:
        return uri, None
    root = "/".join(parts[:first]) or ("/" if base.startswith("/") else ".")
    return root + mark + query, "/".join(parts[first:])


def glob_regex(pattern: str, key: str = "input") -> re.Pattern[str]:
    """Compiles a glob to a regular expression: `*`, `?`, and `[...]` match within one part of a path, and `**` matches any number
    of folders. Raises ConfigError, with the name of the pipeline's `key`, if the glob is invalid."""
    out = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]/]+\]|.", pattern, re.DOTALL):
        if token == "**/":
            out.append("(?:.*/)?")
        elif token == "**":
            out.append(".*")
        elif token == "*":
            out.append("[^/]*")
        elif token == "?":
            out.append("[^/]")
        elif len(token) > 1:
            inner = token[1:-1].replace("\\", "\\\\")
            out.append(f"[{'^' + inner[1:] if inner[0] == '!' else inner}]")
        else:
            out.append(re.escape(token))
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as e:
        raise ConfigError(f"{key}: {pattern!r} is not a valid pattern ({e}). Write a glob such as data/**/*.md") from e


def root(uri: str) -> Location:
    """Returns the location of an input's root folder. Document ids are paths relative to this folder.

    Each worker computes this folder, because the worker's Python may be installed in a different folder.
    """
    if names.is_dataset(uri):
        return hub.root(uri)
    require_built_in(uri, [STDLIB])
    return Location(sysconfig.get_paths()["stdlib"]) if uri == STDLIB else place(split_glob(uri)[0], "input")


def require_built_in(uri: str, built_in: list[str]) -> None:
    """Raises ConfigError if an input has the form of those that heliostat makes (`python:stdlib`), but isn't in `built_in`."""
    if re.match(r"(?!file:)[a-z]+:(?!//)", split_glob(uri)[0]) and uri not in built_in:
        raise ConfigError(f"input: {uri!r} isn't an input that heliostat makes{nearest(uri, built_in)}")


def absolute(uri: str) -> str:
    """Returns an input's URI or path, with any glob, in absolute form, which doesn't depend on the current folder."""
    return uri if "://" in uri or uri == STDLIB else str(workspace.root() / uri)


def find(uri: str) -> tuple[Location, list[tuple[str, Listed]]]:
    """Returns the input's root, and the files that match the input's glob, with their sizes. Paths are relative to the root; ""
    if the input is a single file."""
    if names.is_dataset(uri):
        return hub.find(uri, glob_regex)
    base, pattern = root(uri), split_glob(uri)[1]
    base.probe()
    if base.attempt(lambda: base.fs.get_file_info(base.path)).type == pafs.FileType.File and (info := base.info()):
        return base, [("", info)]
    start = len(base.path.rstrip("/")) + 1
    try:
        files = [(i.path[start:], i) for i in base.tree()]
    except UnicodeDecodeError as e:
        raise ConfigError(f"input: {uri!r}: a file name isn't UTF-8 ({e.object!r}). Rename the file") from e
    if pattern:
        matches = glob_regex(pattern).fullmatch
        files = [(path, i) for path, i in files if matches(path)]
    return base, files


def listing(uri: str, stages: Collection[str] = ()) -> list[InputFile]:
    """Lists the input's files to read, sorted by path. Raises ConfigError if there are none.

    Some kinds of files need a stage that extracts their text. heliostat lists such files only if this stage is in `stages`, and
    logs the number of the other files.
    """
    base, listed = find(uri)
    if uri == STDLIB:
        listed = [(p, i) for p, i in listed if p.endswith(".py") and not STDLIB_SKIPS & set(p.split("/")[:-1])]
    files, unread = list[InputFile](), Counter[str]()
    for path, info in listed:
        if kind := readers.kind_of(path or base.name):
            if kind.stage and kind.stage not in stages:
                unread[kind.stage] += 1
            else:
                files.append(InputFile(path, info.size, info.mtime_ns, info.etag))
    for stage, count in sorted(unread.items()):
        what, fix = f"{BYTES[stage]} ({plural(count, 'file')})", f"{{stage: {stage}}} first among a text pipeline's `stages`"
        if not files:
            raise ConfigError(f"input: {uri!r}: contains only {what}. Put {fix}")
        log.warning("%s: skipping %s. To read these files, put %s", uri, what, fix)
    if not files:
        ends, packed = ", ".join(readers.KINDS), ", ".join(CODECS)
        raise ConfigError(f"input: {uri!r}: {nothing(uri, base, len(listed))}. Supported endings: {ends} (also with {packed})")
    return sorted(files, key=lambda f: f.path)


def nothing(uri: str, base: Location, count: int) -> str:
    """Explains why an input has no file to read. `count`: number of files that `find` has listed."""
    if count:
        return f"found {plural(count, 'file')}, but none is supported"
    if base.info() is None:
        return "no such file"
    return "no file matches" if split_glob(uri)[1] else "the folder is empty"


def without(files: list[InputFile], patterns: list[str]) -> list[InputFile]:
    """Returns the files whose paths match no pattern, and logs the number of the other files. Logs a warning for a pattern that
    matches no file."""
    kept = files
    for pattern in patterns:
        matches = glob_regex(pattern, "exclude").fullmatch
        if not any(matches(f.path) for f in files):
            log.warning("exclude: %r matches no file of the input. Correct or remove this pattern", printable(pattern))
        kept = [f for f in kept if not matches(f.path)]
    if not kept:
        raise ConfigError(f"exclude: matches every file of the input ({len(files):,}). Remove a pattern")
    if patterns:
        log.info("exclude: skipping %d of %d files", len(files) - len(kept), len(files))
    return kept


def fetch(base: Location, path: str, limit: int, part: FilePart | None = None) -> bytes:
    """Reads a file of the input, or the root itself if the path is empty. `part`: the file's entry in the listing, if known.
    Raises LeftOutError if the file is outside the input, is larger than `limit` bytes, or can't be opened. A failing object store
    raises the store's own error.
    """
    with _readable(base, path) as place:
        listed = place.is_s3 and part is not None and part.etag
        data = of_object(place, part, 0, min(part.bytes, limit + 1)) if listed and part else place.read(limit + 1)
    if len(data) > limit:
        raise LeftOutError("too_large", f"more than {limit:,} bytes")
    return data


def blocks(base: Location, path: str, limit: int, part: FilePart | None = None) -> io.RawIOBase:
    """Opens a file of the input, or the root itself, for reading in blocks. Retries a read if the object store fails.

    `part`: the file's entry in the listing, if known. Raises LeftOutError like `fetch`. Raises DataError if an object has been
    rewritten since the listing, which the object's ETag shows. If the listing has an ETag, the first read raises these errors,
    because opening the object sends no request.
    """
    with _readable(base, path) as place:
        if part is not None and part.etag and place.is_s3:
            file, size = None, part.bytes or _as_listed(place, part)
        else:
            file = place.open()
            size = place.attempt(file.size)
    if size > limit:
        raise LeftOutError("too_large", f"more than {limit:,} bytes")
    return ReadAhead(place, file, size, part)


def rows(base: Location, path: str, limit: int, part: FilePart | None = None) -> Iterator[Any]:
    """Yields the rows of a file that lists images or URLs: a .parquet, a .csv, or JSON lines.

    Raises ConfigError if the file can't be read, because then heliostat doesn't know the missing entries.
    """
    try:
        with blocks(base, path, limit, part) as file:
            lower = (path or base.name).lower()
            if lower.endswith(".parquet"):
                opened = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True, pre_buffer=False)
                for batch in opened.iter_batches(1024):
                    yield from batch.to_pylist()
                return
            csv.field_size_limit(FIELD)
            text = io.TextIOWrapper(io.BufferedReader(file), "utf-8-sig", newline="")
            yield from csv.DictReader(text) if lower.endswith(".csv") else (json.loads(line) for line in text if line.strip())
    except LeftOutError as e:
        raise ConfigError(f"input: {printable(path)}: can't read this file: {readers.REASONS[e.reason]} ({e.detail})") from e
    except (pa.ArrowException, OSError, ValueError, RecursionError, csv.Error) as e:
        raise ConfigError(f"input: {printable(path)}: can't read this file ({brief(e)}). Repair the file") from e


@contextmanager
def _readable(base: Location, path: str) -> Iterator[Location]:
    """Provides the location of a file of the input. Downloads the file first if the input is on the Hugging Face Hub. Raises
    LeftOutError if the file is outside the input, or if a local file is missing or its permissions don't allow reading. Other
    faults of a disk raise StorageError after their retries, because they may be temporary, and no document may be lost."""
    if not hub.fetch(base, path) and not inside(base, path):
        raise LeftOutError("outside", f"leads out of {base}")
    try:
        yield base.join(path) if path else base
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise LeftOutError("unreadable") from e
    except AccessError as e:
        if base.is_s3:
            raise
        raise LeftOutError("unreadable", str(e)) from e


def _as_listed(place: Location, part: FilePart) -> int:
    """Returns the size of an object in an object store, in bytes. Raises FileNotFoundError if the object is missing, and
    DataError if the ETag or the size has changed since the listing, or if an object that is read in ranges is missing.

    Some stores return ETags only in listings. For these stores, this function compares only the size, and each read checks the
    ETag.
    """
    if (info := place.info()) is None:
        raise changed(place, part, None) if part.start else FileNotFoundError(str(place))
    if (info.etag or part.etag, info.size) != (part.etag, part.bytes):
        raise changed(place, part, info.size)
    return info.size


def require_unchanged(base: Location, part: FilePart) -> None:
    """Raises DataError if a file has changed since the input was listed, or if a file that is read in ranges is missing: other
    tasks may have read its earlier ranges. Does nothing for a folder, or if the listing isn't known.

    Also does nothing for an object with an ETag, because each read of the object checks the ETag (`ahead.of_object`).
    """
    place = base.join(part.path) if part.path else base
    if not part.modified or part.etag:
        return
    info = place.info()
    if info is None and part.start:
        raise changed(place, part, None)
    if info is None or info.type != pafs.FileType.File:
        return
    unit = 1_000_000_000 if base.is_s3 else 1  # for one file, a store returns whole seconds; in listings, maybe fractions
    if (info.size, info.mtime_ns // unit) != (part.bytes, part.modified // unit):
        raise changed(place, part, info.size)


def inside(base: Location, path: str) -> bool:
    """Checks whether a path is inside `base`, by the path's name. On disk, also checks the targets of links."""
    if "\0" in path:
        return False
    try:
        base.join(path)
    except DataError:
        return False
    if base.is_s3 or not path:
        return True
    root = os.path.realpath(base.path)
    return os.path.realpath(Path(root, path)).startswith(root.rstrip("/") + "/")


def examples(ids: list[str]) -> str:
    """Formats a few document ids for a warning. Escapes unprintable characters, because ids contain file names."""
    return ", ".join(printable(id) for id in ids)
