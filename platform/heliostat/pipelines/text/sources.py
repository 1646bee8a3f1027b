"""Finds the files of a text input: a file, a folder, a glob, an s3:// prefix, or `python:stdlib`.

The listing is the same wherever the input lies: paths are relative to the input's root, sorted. A file is read as far as a limit
and only if it lies inside the input: neither a link nor a name in a metadata file leads out of it.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from heliostat.errors import ConfigError, StorageError
from heliostat.pipelines.prepare import InputFile, place
from heliostat.storage import Location
from heliostat.text import printable

STDLIB = "python:stdlib"
SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")
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


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Compiles a glob: `*`, `?` and `[...]` match within a folder's name, `**` any number of folders; ConfigError if invalid."""
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
        raise ConfigError(f"input: {pattern!r} is not a valid pattern ({e})") from e


def root(uri: str) -> Location:
    """Locates the folder that document ids are relative to.

    Each worker computes it for itself, because its Python may be installed elsewhere.
    """
    return Location(sysconfig.get_paths()["stdlib"]) if uri == STDLIB else place(split_glob(uri)[0])


def find(uri: str) -> tuple[Location, list[tuple[str, pafs.FileInfo]]]:
    """Finds the input's root, and the files in it that match the pattern, by relative path ("" for the root if it is a file)."""
    base, pattern = root(uri), split_glob(uri)[1]
    base.probe()
    info = base.fs.get_file_info(base.path)
    if info.type == pafs.FileType.File:
        return base, [("", info)]
    selector = pafs.FileSelector(base.path, recursive=True, allow_not_found=True)
    start = len(base.path.rstrip("/")) + 1
    try:
        infos = base.fs.get_file_info(selector)
        found = [(i.path[start:], i) for i in infos if i.type == pafs.FileType.File]
    except UnicodeDecodeError as e:
        raise ConfigError(f"input: {uri!r}: a file's name is not UTF-8 ({e.object!r}); rename it") from e
    if pattern:
        matches = glob_regex(pattern).fullmatch
        found = [(path, i) for path, i in found if matches(path)]
    return base, found


def listing(uri: str) -> list[InputFile]:
    """Lists the files to read, sorted by path; ConfigError if there are none."""
    base, found = find(uri)
    if uri == STDLIB:
        found = [(p, i) for p, i in found if p.endswith(".py") and not STDLIB_SKIPS & set(p.split("/")[:-1])]
    files = [InputFile(p, i.size, i.mtime_ns or 0) for p, i in found if kind(p or base.path)[0]]
    if not files:
        seen = f"{len(found)} files, none" if found else "no file there"
        raise ConfigError(f"input: {uri!r}: {seen} that ends in {', '.join(SUFFIXES)} (or these with .gz, .zst)")
    return sorted(files, key=lambda f: f.path)


def parquet_values(data: bytes, column: str, limit: int) -> Iterator[pa.Array]:
    """Yields a column of a Parquet file, some rows at a time, a dictionary as a dictionary.

    LeftOutError before a row group is unpacked whose size in the footer is more than `limit` bytes.
    """
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=[column])
    for group in _groups(file, [column], limit):
        for batch in file.iter_batches(1024, row_groups=[group], columns=[column]):
            yield batch.column(0)


def parquet_rows(data: bytes, large: str, columns: list[str], limit: int) -> Iterator[dict[str, Any]]:
    """Yields a Parquet file's rows, unpacking some at a time; a column that is missing is left out.

    `large` is the column of large values, whose dictionary stays one. LeftOutError before a row group is unpacked whose size in
    the footer is more than `limit` bytes.
    """
    schema = pq.read_metadata(pa.BufferReader(data)).schema
    leaves = [path for i in range(len(schema)) if (path := schema.column(i).path) in (large, f"{large}.bytes")]
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=leaves)
    columns = [c for c in columns if c in file.schema_arrow.names]
    for group in _groups(file, columns, limit):
        for batch in file.iter_batches(64, row_groups=[group], columns=columns):
            for row in range(len(batch)):
                yield {name: batch.column(i)[row].as_py() for i, name in enumerate(batch.schema.names)}


def _groups(file: pq.ParquetFile, columns: list[str], limit: int) -> Iterator[int]:
    names = [file.metadata.schema.column(i).path.split(".")[0] for i in range(file.metadata.num_columns)]
    for group in range(file.num_row_groups):
        info = file.metadata.row_group(group)
        if sum(info.column(i).total_uncompressed_size for i, name in enumerate(names) if name in columns) > limit:
            raise LeftOutError("too_large", f"a row group of more than {limit:,} bytes, unpacked")
        yield group


class LeftOutError(Exception):
    """Reports that a file of the input is not read; `reason` is one of the pipelines' reasons."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def fetch(base: Location, path: str, limit: int) -> bytes:
    """Reads a file of the input, or the root itself if there is no path.

    LeftOutError if it lies outside, is larger than `limit`, or (a local one) cannot be opened; a store that refuses or fails is
    an error.
    """
    if not inside(base, path):
        raise LeftOutError("outside", f"leads out of {base}")
    try:
        data = (base.join(path) if path else base).read(limit + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise LeftOutError("unreadable") from e
    except StorageError as e:
        if base.is_s3:
            raise
        raise LeftOutError("unreadable", str(e)) from e
    if len(data) > limit:
        raise LeftOutError("too_large", f"more than {limit:,} bytes")
    return data


def inside(base: Location, path: str) -> bool:
    """Checks whether a path leads to a place below `base`, by its name and, on disk, through any links."""
    if "\0" in path or path.startswith("/") or ".." in path.split("/"):
        return False
    if base.is_s3 or not path:
        return True
    root = os.path.realpath(base.path)
    return os.path.realpath(Path(root, path)).startswith(root.rstrip("/") + "/")


def examples(ids: list[str]) -> str:
    """Formats some ids for a warning; they are names of files, so they may hold any character."""
    return ", ".join(printable(id) for id in ids)


def pack(files: list[InputFile], bytes_per_task: int, files_per_task: int = 2000) -> list[list[str]]:
    """Packs the paths into lists of about equal bytes, one per read task."""
    tasks: list[list[str]] = []
    size = 0
    for file in files:
        if not tasks or size + file.bytes > bytes_per_task or len(tasks[-1]) >= files_per_task:
            tasks.append([])
            size = 0
        tasks[-1].append(file.path)
        size += file.bytes
    return tasks
