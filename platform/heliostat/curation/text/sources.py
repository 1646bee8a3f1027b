"""Finds the files of a text input: a file, a folder, a glob, an s3:// prefix, or `python:stdlib`.

The listing is the same wherever the input lies: paths are relative to the input's root, sorted. A file is read as far as a limit
and only if it lies inside the input: neither a link nor a name in a metadata file leads out of it.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from heliostat.config import workspace
from heliostat.curation import readers
from heliostat.curation.pieces import Part
from heliostat.curation.prepare import InputFile, place
from heliostat.curation.readers.streams import LeftOutError as LeftOutError
from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.storage.locations import Location
from heliostat.storage.s3_client import Listed, RewrittenError
from heliostat.text import printable

log = logging.getLogger(__name__)

STDLIB = "python:stdlib"
SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")
FIELD = 1 << 17  # characters of a value in a .csv that lists images or URLs; the limit is the process's, set before each is read
AHEAD = 4 << 20  # bytes of a file that are read at a time
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# not the library itself: installed packages, tests (with data that is broken on purpose) and compiled files
STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def kind(path: str) -> tuple[str | None, str | None]:
    """Returns (suffix, codec) of a path: the suffix is None if it is none of SUFFIXES, the codec None if it is not compressed."""
    lower = path.lower()
    codec = next((c for end, c in COMPRESSED.items() if lower.endswith(end)), None)
    if codec:
        lower = lower.rpartition(".")[0]
    return next((s for s in SUFFIXES if lower.endswith(s)), None), codec


def known(path: str, more: bool) -> bool:
    """Tells whether such a file is read, `more` kinds among them (READERS)."""
    return kind(path)[0] is not None or (more and readers.suffix_of(path) is not None)


def split_glob(uri: str) -> tuple[str, str | None]:
    """Splits a URI into (root, pattern): `data/**/*.md` is (`data`, `**/*.md`); the pattern is None if there is no wildcard."""
    s3 = uri.startswith("s3://")
    base, mark, query = uri.partition("?") if s3 else (uri, "", "")  # on s3:// a question mark starts the query
    parts = base.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[*\[]" if s3 else r"[*?\[]", part)), None)
    if first is None:
        return uri, None
    root = "/".join(parts[:first]) or ("/" if base.startswith("/") else ".")
    return root + mark + query, "/".join(parts[first:])


def glob_regex(pattern: str, key: str = "input") -> re.Pattern[str]:
    """Compiles the glob of a key: `*`, `?` and `[...]` match within a folder's name, `**` any number of folders; ConfigError if
    invalid."""
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
        raise ConfigError(f"{key}: {pattern!r} is not a valid pattern ({e})") from e


def root(uri: str) -> Location:
    """Locates the folder that document ids are relative to.

    Each worker computes it for itself, because its Python may be installed elsewhere.
    """
    return Location(sysconfig.get_paths()["stdlib"]) if uri == STDLIB else place(split_glob(uri)[0], "input")


def absolute(uri: str) -> str:
    """Returns an input's URI as it means the same from any folder, pattern and all."""
    return uri if "://" in uri or uri == STDLIB else str(workspace.root() / uri)


def find(uri: str) -> tuple[Location, list[tuple[str, Listed]]]:
    """Finds the input's root, and the files in it that match the pattern, by relative path ("" for the root if it is a file)."""
    base, pattern = root(uri), split_glob(uri)[1]
    base.probe()
    if base.attempt(lambda: base.fs.get_file_info(base.path)).type == pafs.FileType.File and (info := base.info()):
        return base, [("", info)]
    start = len(base.path.rstrip("/")) + 1
    try:
        found = [(i.path[start:], i) for i in base.tree()]
    except UnicodeDecodeError as e:
        raise ConfigError(f"input: {uri!r}: a file's name is not UTF-8 ({e.object!r}); rename it") from e
    if pattern:
        matches = glob_regex(pattern).fullmatch
        found = [(path, i) for path, i in found if matches(path)]
    return base, found


def listing(uri: str, more: bool = False) -> list[InputFile]:
    """Lists the files to read, sorted by path, `more` kinds too (READERS); ConfigError if there are none."""
    base, found = find(uri)
    if uri == STDLIB:
        found = [(p, i) for p, i in found if p.endswith(".py") and not STDLIB_SKIPS & set(p.split("/")[:-1])]
    files = [InputFile(p, i.size, i.mtime_ns, i.etag) for p, i in found if known(p or base.path, more)]
    if not files:
        seen = f"{len(found)} files, none" if found else "no file there"
        ends = ", ".join([*SUFFIXES, *(e for e in readers.READERS if more and e not in SUFFIXES)])
        raise ConfigError(f"input: {uri!r}: {seen} that ends in {ends} (or these with .gz, .zst{', .bz2, .xz' * more})")
    return sorted(files, key=lambda f: f.path)


def without_pdfs(uri: str, files: list[InputFile]) -> list[InputFile]:
    """Leaves out PDFs, and says how many; ConfigError if nothing else is there."""
    kept = [f for f in files if readers.suffix_of(f.path or root(uri).name) != ".pdf"]
    if not kept:
        raise ConfigError(f"input: {uri!r}: {len(files):,} PDFs and nothing else; put {{stage: pdf}} first among `stages`")
    if len(kept) < len(files):
        log.warning("%s: %d PDFs are not read; {stage: pdf} first among `stages` would", uri, len(files) - len(kept))
    return kept


def without(files: list[InputFile], patterns: list[str]) -> list[InputFile]:
    """Leaves out the files whose paths match a pattern, and says how many; a pattern that matches none is warned of."""
    kept = files
    for pattern in patterns:
        matches = glob_regex(pattern, "exclude").fullmatch
        if not any(matches(f.path) for f in files):
            log.warning("exclude: %r matches no file of the input", printable(pattern))
        kept = [f for f in kept if not matches(f.path)]
    if not kept:
        raise ConfigError(f"exclude: leaves none of the {len(files):,} files; remove a pattern")
    if patterns:
        log.info("exclude: %d of %d files are not read", len(files) - len(kept), len(files))
    return kept


def parquet_values(file: pq.ParquetFile, column: str, others: tuple[str, ...], limit: int,
                   part: Part) -> Iterator[tuple[int, pa.Array, dict[str, pa.Array]]]:  # fmt: skip
    """Yields (the first row's number from 1, a column's values, other columns) of some rows at a time of an open Parquet file.

    A dictionary stays one. Of a part of the file, the row groups that begin in it. LeftOutError before a row group is unpacked
    whose size in the footer is more than `limit` bytes.
    """
    names = list(dict.fromkeys([column, *(name for name in others if name in file.schema_arrow.names)]))
    firsts = np.cumsum([1, *(file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups))])
    for group in _groups(file, names, limit, part):
        row = int(firsts[group])
        for batch in file.iter_batches(1024, row_groups=[group], columns=names):
            yield row, batch.column(column), {name: batch.column(name) for name in names if name in others}
            row += len(batch)


def parquet_rows(source: pa.NativeFile, large: str, columns: list[str], limit: int,
                 part: Part) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """Reads a Parquet file's footer, and yields (number from 1, values) of its rows; a column that is missing is left out.

    `large` is the column of large values, whose dictionary stays one. Of a part of the file, the row groups that begin in it.
    LeftOutError before a row group is unpacked whose size in the footer is more than `limit` bytes.
    """
    footer = pq.read_metadata(source)
    schema = footer.schema
    leaves = [path for i in range(len(schema)) if (path := schema.column(i).path) in (large, f"{large}.bytes")]
    file = pq.ParquetFile(source, metadata=footer, page_checksum_verification=True, read_dictionary=leaves, pre_buffer=False)
    return _rows(file, [c for c in columns if c in file.schema_arrow.names], limit, part)


def _rows(file: pq.ParquetFile, columns: list[str], limit: int, part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields what `parquet_rows` does, unpacking some rows at a time."""
    firsts = np.cumsum([1, *(file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups))])
    for group in _groups(file, columns, limit, part):
        number = int(firsts[group])
        for batch in file.iter_batches(64, row_groups=[group], columns=columns):
            for row in range(len(batch)):
                yield number + row, {name: batch.column(i)[row].as_py() for i, name in enumerate(batch.schema.names)}
            number += len(batch)


def _groups(file: pq.ParquetFile, columns: list[str], limit: int, part: Part | None = None) -> Iterator[int]:
    names = [file.metadata.schema.column(i).path.split(".")[0] for i in range(file.metadata.num_columns)]
    for group in range(file.metadata.num_row_groups):
        info = file.metadata.row_group(group)
        if part is not None and part.stop is not None and not part.start <= _begins(info) < part.stop:
            continue
        if sum(info.column(i).total_uncompressed_size for i, name in enumerate(names) if name in columns) > limit:
            raise LeftOutError("too_large", f"a row group of more than {limit:,} bytes, unpacked")
        yield group


def _begins(info: pq.RowGroupMetaData) -> int:
    """Returns the offset of the first byte of a row group."""
    columns = [info.column(i) for i in range(info.num_columns)]
    return min((min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in columns), default=0)


def fetch(base: Location, path: str, limit: int, part: Part | None = None) -> bytes:
    """Reads a file of the input, or the root itself if there is no path; `part`: as it was listed, where that is known.

    LeftOutError if it lies outside, is larger than `limit`, or (a local one) cannot be opened; a store that refuses or fails is
    an error.
    """
    if not inside(base, path):
        raise LeftOutError("outside", f"leads out of {base}")
    place = base.join(path) if path else base
    try:
        data = place.read(limit + 1) if part is None or not part.etag else _of_object(place, part, 0, min(part.bytes, limit + 1))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise LeftOutError("unreadable") from e
    except StorageError as e:
        if base.is_s3:
            raise
        raise LeftOutError("unreadable", str(e)) from e
    if len(data) > limit:
        raise LeftOutError("too_large", f"more than {limit:,} bytes")
    return data


def stream(base: Location, path: str, limit: int, part: Part | None = None) -> pa.NativeFile:
    """Opens a file of the input as `blocks` does, for Arrow."""
    return pa.PythonFile(blocks(base, path, limit, part), mode="r")


def blocks(base: Location, path: str, limit: int, part: Part | None = None) -> io.RawIOBase:
    """Opens a file of the input, or the root itself, to be read in blocks; each read is repeated while the store fails.

    `part`: the file as it was listed, where that is known: of an object with an ETag, the store refuses every read of another.
    LeftOutError as of `fetch`, DataError if an object has been written again.
    """
    if not inside(base, path):
        raise LeftOutError("outside", f"leads out of {base}")
    place = base.join(path) if path else base
    try:
        if part is not None and part.etag:
            file, size = None, _as_listed(place, part)
        else:
            file = place.open()
            size = place.attempt(file.size)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise LeftOutError("unreadable") from e
    except StorageError as e:
        if base.is_s3:
            raise
        raise LeftOutError("unreadable", str(e)) from e
    if size > limit:
        raise LeftOutError("too_large", f"more than {limit:,} bytes")
    return _Blocks(place, file, size, part)


class _Blocks(io.RawIOBase):
    """Presents a file of a store as a Python file that reads some megabytes ahead."""

    def __init__(self, place: Location, file: pa.NativeFile | None, size: int, part: Part | None) -> None:
        self.place, self.file, self.part, self.length, self.at = place, file, part, size, 0
        self.block, self.begin = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def size(self) -> int:
        return self.length

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        size = self.length - self.at if size is None or size < 0 else min(size, self.length - self.at)
        if size <= 0:
            return b""
        if not (self.begin <= self.at and self.at + size <= self.begin + len(self.block)):
            self.begin, self.block = self.at, self._fetched(self.at, min(max(size, AHEAD), self.length - self.at))
        start = self.at - self.begin
        found = self.block[start : start + size]
        self.at += len(found)
        return found

    def _fetched(self, begin: int, size: int) -> bytes:
        if self.file is None:
            assert self.part is not None
            return _of_object(self.place, self.part, begin, begin + size)
        file = self.file
        return self.place.attempt(lambda: file.read_at(size, begin))


def _as_listed(place: Location, part: Part) -> int:
    """Returns the bytes of an object; FileNotFoundError if it is gone, DataError if its ETag is not as it was listed.

    Where the store gives one in listings alone, its size is compared, and each read asks for the ETag.
    """
    if (found := place.info()) is None:
        raise FileNotFoundError(str(place))
    if (found.etag or part.etag, found.size) != (part.etag, part.bytes):
        raise changed(place, part, found.size)
    return found.size


def _of_object(place: Location, part: Part, begin: int, end: int) -> bytes:
    """Reads a range of an object as it was listed; DataError if it has been written again."""
    try:
        return place.read_object(begin, end, part.etag) if begin < end else b""
    except RewrittenError as e:
        raise changed(place, part, found.size if (found := place.info()) else part.bytes) from e


def require_unchanged(base: Location, part: Part) -> None:
    """Raises DataError if a file is not as it was when the input was listed; nothing if that is not known, or it is a folder.

    Nothing also of an object with an ETag: each of its reads is conditional (`blocks`, `fetch`).
    """
    place = base.join(part.path) if part.path else base
    info = place.info() if part.modified and not part.etag else None
    if info is None or info.type != pafs.FileType.File:
        return
    unit = 1_000_000_000 if base.is_s3 else 1  # a store tells seconds where it is asked for one file, and may list fractions
    if (info.size, info.mtime_ns // unit) != (part.bytes, part.modified // unit):
        raise changed(place, part, info.size)


def changed(place: Location, part: Part, size: int) -> DataError:
    """Makes the error of a file that is not as it was when the input was listed."""
    other = "content" if part.etag else "time"
    now = f"{size:,} now" if size != part.bytes else f"as many now, of another {other}"
    return DataError(
        f"input: {place}: changed during the run: it had {part.bytes:,} bytes when it was listed, and has {now}. "
        "Start again: what was made of it is made again"
    )


def inside(base: Location, path: str) -> bool:
    """Checks whether a path leads to a place below `base`, by its name and, on disk, through any links."""
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
    """Formats some ids for a warning; they are names of files, so they may hold any character."""
    return ", ".join(printable(id) for id in ids)


def ranged(path: str) -> bool:
    """Tells whether such a file can be read from the middle: lines and row groups, not compressed as a whole."""
    suffix, codec = kind(path)
    return codec is None and suffix in (".jsonl", ".parquet")
