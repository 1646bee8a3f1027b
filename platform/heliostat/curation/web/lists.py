"""Splits lists of URLs into fetching tasks by host. A host's URLs are in one task, or in several tasks that share the host's
request rate.

One task per list writes the list's rows to temporary files, sorted by the hash of the host. The first 16 bits of the hash are the
number of a group of hosts. The task also counts the rows of each group. The driver has only these counts in memory. Neighboring
groups with few URLs share a fetching task. A group with many URLs is split into several fetching tasks.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import xxhash

from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import store
from heliostat.curation.text import sources
from heliostat.curation.web.polite import host_of
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key
from heliostat.text import printable

LISTS = (".jsonl", ".csv", ".parquet")
ROWS = pa.schema([("key", pa.uint64()), *((name, pa.large_string()) for name in ("id", "url", "row"))])
SPILLED = 200_000  # rows in memory at once
GROUP = 48  # number of low bits of a hash; the bits above them are the group
URLS = 2000  # URLs per task, approximately


def listing(uri: str) -> list[InputFile]:
    """Returns the input's files with lists of URLs, sorted by path. Raises ConfigError if the input has no such files."""
    base, listed = sources.find(uri)
    files = [InputFile(p, i.size, i.mtime_ns, i.etag) for p, i in listed if (p or base.path).lower().endswith(LISTS)]
    if not files:
        seen = f"none of {len(listed)} files is supported" if listed else "no such file"
        raise ConfigError(f"input: {uri!r}: {seen}. fetch reads lists of URLs in these formats: {', '.join(LISTS)}")
    return sorted(files, key=lambda f: f.path)


def plan(flow: Flow, uri: str, files: list[InputFile], column: str, wanted: list[str], limit: int) -> Iterator[dict[str, Any]]:
    """Yields the descriptions of the fetching tasks. In a description, `of` is the number of tasks that share the request rate of
    the same hosts."""
    about = {"uri": uri, "column": column, "wanted": wanted, "limit": limit}

    def task(file: InputFile) -> Task:
        by_time = "list", about, file.path, file.bytes, file.modified
        name, before = key(*by_time, *([file.etag] if file.etag else [])), key(*by_time)
        return Task(name, {"part": file.part, **about}, bytes=file.bytes, before=before)

    counts, names = Counter[int](), list[str]()
    for record in flow.all("lists", listed, map(task, files)):
        counts.update({int(group): number for group, number in record["groups"].items()})
        names += record["files"]
    place = store(flow.work.spill, names)
    for low, high, of in cut(counts):
        for part in range(of):
            yield {"kind": "urls", "names": place, "low": low << GROUP, "high": high << GROUP, "part": part, "of": of}


def cut(counts: Counter[int]) -> Iterator[tuple[int, int, int]]:
    """Yields ranges of groups of hosts, each with about URLS URLs: the first group, the group after the last, and the number of
    tasks for the range. `counts`: URLs of each group."""
    first, size, last = 0, 0, 0
    for group in sorted(counts):
        if counts[group] > URLS:
            if size:
                yield first, last + 1, 1
            yield group, group + 1, -(-counts[group] // URLS)
            size = 0
            continue
        if size + counts[group] > URLS:
            yield first, last + 1, 1
            size = 0
        first, last = (first if size else group), group
        size += counts[group]
    if size:
        yield first, last + 1, 1


def listed(folder: Location, part: FilePart, uri: str, column: str, wanted: list[str], limit: int) -> dict[str, object]:
    """Writes the rows of a list of URLs to temporary files, sorted by the hash of the host. In the returned record, `groups` has
    the number of rows of each group of hosts."""
    base, name, files, groups = sources.root(uri), part.path, list[str](), Counter[int]()
    sources.require_unchanged(base, part)
    numbered = enumerate(sources.rows(base, part.path, limit, part), 1)
    while some := list(itertools.islice(numbered, SPILLED)):
        table = pa.Table.from_pylist([_row(f"{name or base.name}#{n}", row, column, wanted, name) for n, row in some], ROWS)
        groups.update((k >> GROUP) for k in table["key"].to_pylist())
        files.append(spill.write(folder, table, ("id",)))
    return {"groups": {str(group): number for group, number in sorted(groups.items())}, "files": files}


def _row(id: str, row: object, column: str, wanted: list[str], path: str) -> dict[str, object]:
    if not isinstance(row, dict) or column not in row:
        row_text = printable(", ".join(map(str, row))) if isinstance(row, dict) else "none, because the row isn't an object"
        raise ConfigError(
            f"input: {printable(path)}: no column {column!r} of URLs. Set fetch.column to the column with the URLs. "
            f"The row's columns: {row_text}"
        )
    url = _whole(row[column]) if isinstance(row[column], str) else ""
    kept = {name: row[name] for name in wanted if row.get(name) is not None}
    return {"key": xxhash.xxh64_intdigest(host_of(url).encode("utf-8", "surrogatepass")), "id": id, "url": url,
            "row": json.dumps(kept, default=str)}  # fmt: skip


def _whole(url: str) -> str:
    """Returns a URL unchanged if UTF-8 can represent the URL. Otherwise, the URL has half of a surrogate pair, and the result is
    an escaped form."""
    try:
        url.encode()
    except UnicodeError:
        return f"half a surrogate pair: {printable(url)}"
    return url


def rows(folder: Location, task: dict[str, Any], names: list[str]) -> Iterator[dict[str, Any]]:
    mine = pa.concat_tables([ROWS.empty_table(), *_dealt(folder, task, names)]).sort_by(
        [("key", "ascending"), ("id", "ascending")]
    )
    for batch in mine.to_batches(1024):
        yield from batch.to_pylist()


def _dealt(folder: Location, task: dict[str, Any], names: list[str]) -> Iterator[pa.Table]:
    """Yields the rows of one task: every `of`-th row in the task's range of groups, in the order of the files."""
    seen = 0
    for name in names:
        for table in spill.read(folder, name, task["low"], task["high"]):
            yield table.take(pa.array(range((task["part"] - seen) % task["of"], len(table), task["of"]), pa.int64()))
            seen += len(table)
