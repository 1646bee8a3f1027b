"""Splits lists of URLs into fetching tasks by host. A host's URLs are in one task, or in several tasks that share the host's
request rate.

One task per list writes the list's rows to temporary files, sorted by the hash of the host. The first 16 bits of the hash are the
number of a group of hosts. The task also counts the rows of each group. The driver has in memory only the sum of these counts,
and the names of the temporary files. If there are many files, tasks merge them first, so each fetching task reads few files.

Neighboring groups with few URLs share a fetching task. A group with many URLs is split into several fetching tasks. Of these
tasks, each fetches all URLs of its own hosts. Only the URLs of hosts with more than URLS URLs are spread over all of them.
"""

from __future__ import annotations

import base64
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from heliostat.curation import recording
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import load, name_of, store
from heliostat.curation.text import sources
from heliostat.curation.web.polite import host_of
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import merging, spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.spill import SpilledRun
from heliostat.tasks.work import key
from heliostat.text import printable

LISTS = (".jsonl", ".csv", ".parquet")
ROWS = pa.schema([("key", pa.uint64()), *((name, pa.large_string()) for name in ("id", "url", "row"))])
SPILLED = 200_000  # rows in memory at once
GROUP = 48  # number of low bits of a hash; the bits above them are the group
GROUPS = 1 << (64 - GROUP)
URLS = 2000  # URLs per task, approximately
NAMES = 16  # names of files that travel with a task; more names are in a temporary file


def listing(uri: str) -> list[InputFile]:
    """Returns the input's files with lists of URLs, sorted by path. Raises ConfigError if the input has no such files."""
    base, listed = sources.find(uri)
    files = [InputFile(p, i.size, i.mtime_ns, i.etag) for p, i in listed if (p or base.path).lower().endswith(LISTS)]
    if not files:
        seen = sources.nothing(uri, base, len(listed))
        raise ConfigError(f"input: {uri!r}: {seen}. fetch reads lists of URLs in these formats: {', '.join(LISTS)}")
    return sorted(files, key=lambda f: f.path)


def plan(
    flow: Flow, uri: str, files: list[InputFile], column: str, wanted: list[str], limit: int, run_bytes: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the fetching tasks: (the description that identifies the task, further entries of the description).

    `of` is the number of tasks that share the hosts of a group. The further entries are the files that have the task's rows
    (`names`), and the mean number of URLs and bytes of these tasks (`urls`, `bytes`). Tasks of large hosts come last, because
    they may take long. `run_bytes`: maximum bytes of a merged file.
    """
    about = {"uri": uri, "column": column, "wanted": wanted, "limit": limit}

    def task(file: InputFile) -> Task:
        by_time = "list", about, file.path, file.bytes, file.modified
        name, before = key(*by_time, *([file.etag] if file.etag else [])), key(*by_time)
        return Task(name, {"part": file.part, **about}, bytes=file.bytes, before=before)

    counts, runs = np.zeros(GROUPS, np.int64), dict[int, list[SpilledRun]]()
    counted = {"valid": lambda record: "counts" in record}  # not in older versions
    for number, record in flow.run("lists", listed, map(task, files), reads=True, **counted):
        counts += unpacked(record["counts"])
        runs[number] = [SpilledRun(*run) for run in record["runs"]]
    ordered = [run for number in range(len(files)) for run in runs[number]]
    ranges = list(cut({int(group): int(counts[group]) for group in np.flatnonzero(counts)}))
    place = name_of([run.name for run in ordered])
    each = sum(run.bytes for run in ordered) / max(1, sum(run.rows for run in ordered))

    def keys(first: int, stop: int) -> tuple[int, int]:
        return ranges[first][0] << GROUP, ranges[stop - 1][1] << GROUP

    read = list[tuple[int, int, int, list[str] | str]]()
    for part in merging.merged(flow, ordered, len(ranges), keys, run_bytes) if ranges else ():
        names = [run.name for run in part.runs]
        place_or_names = names if len(names) <= NAMES else store(flow.work.spill, names)
        read += [(*one, place_or_names) for one in ranges[part.first : part.stop]]
    for low, high, of, place_or_names in sorted(read, key=itemgetter(2)):
        urls, dealing = int(counts[low:high].sum()) // of, {"large": URLS} if of > 1 else {}
        shared = {"kind": "urls", "names": place, "low": low << GROUP, "high": high << GROUP, **dealing}
        also = {"names": place_or_names, "urls": urls, "bytes": round(urls * each)}
        yield from (({**shared, "part": part, "of": of}, also) for part in range(of))


def packed(counts: np.ndarray) -> str:
    """Encodes the number of URLs of each group, int64 [GROUPS], for a task's record."""
    return base64.b64encode(zlib.compress(counts.astype(np.int64).tobytes(), 1)).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int64)


def cut(counts: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
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
    """Writes the rows of a list of URLs to temporary files, sorted by the hash of the host. In the returned record, `counts` has
    the number of rows of each group of hosts (`packed`)."""
    base, name, runs, counts = sources.root(uri), part.path, list[tuple[str, int, int]](), np.zeros(GROUPS, np.int64)
    sources.require_unchanged(base, part)
    numbered = enumerate(sources.rows(base, part.path, limit, part), 1)
    while some := list(itertools.islice(numbered, SPILLED)):
        table = pa.Table.from_pylist([_row(f"{name or base.name}#{n}", row, column, wanted, name) for n, row in some], ROWS)
        counts += np.bincount((table["key"].to_numpy() >> np.uint64(GROUP)).astype(np.int64), minlength=GROUPS)
        runs.append((spill.write(folder, table, ("id",)), len(table), table.nbytes))
    return {"counts": packed(counts), "runs": runs, "files": [name for name, *_ in runs]}


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


def rows(folder: Location, task: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields the rows of a fetching task, and for each row, whether other tasks fetch from the same host.

    Each host's first row comes first, then each host's second row, and so on. So a task fetches from many hosts at a time.
    """
    names = load(folder, task["names"]) if isinstance(task["names"], str) else task["names"]
    large = _large(folder, task, names) if task["of"] > 1 else np.zeros(0, np.uint64)
    mine = pa.concat_tables([ROWS.empty_table(), *_dealt(folder, task, names, large)])
    mine = mine.sort_by([("key", "ascending"), ("id", "ascending")])
    keys = mine["key"].to_numpy()
    _, first, sizes = np.unique(keys, return_index=True, return_counts=True)
    turns = np.arange(len(keys)) - np.repeat(first, sizes)
    mine = mine.take(pa.array(np.argsort(turns, kind="stable")))
    for batch in mine.to_batches(1024):
        shared = np.isin(batch["key"].to_numpy(), large)
        yield from zip(batch.to_pylist(), shared.tolist(), strict=True)


def _large(folder: Location, task: dict[str, Any], names: list[str]) -> np.ndarray:
    """Returns the keys of the large hosts in the task's range of groups, as uint64 [hosts]. They have more than `large` rows."""
    counts = dict[int, int]()
    for table in spill.read_all(folder, names, task["low"], task["high"], ["key"]):
        for one in pc.value_counts(table["key"]).to_pylist():
            counts[one["values"]] = counts.get(one["values"], 0) + one["counts"]
    return np.array([host for host, number in counts.items() if number > task["large"]], np.uint64)


def _dealt(folder: Location, task: dict[str, Any], names: list[str], large: np.ndarray) -> Iterator[pa.Table]:
    """Yields the rows of one task: all rows of the hosts whose hash selects the task, and the rows of the large hosts whose id's
    hash selects the task. So a task has the same rows however its files were merged, and the merge depends on memory_limit."""
    for table in spill.read_all(folder, names, task["low"], task["high"]):
        selecting = table["key"].to_numpy().copy()
        spread = np.flatnonzero(np.isin(selecting, large))
        ids = table["id"].take(pa.array(spread)).to_pylist()
        selecting[spread] = np.fromiter(map(recording.key_of, ids), np.uint64, len(ids))
        mine = spill.mixed(selecting) % np.uint64(task["of"]) == task["part"]
        yield table.take(pa.array(np.flatnonzero(mine)))
