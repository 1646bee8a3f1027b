"""Runs the text pipeline's tasks in Ray's workers: reading, the tokenizer's sample, shards, and the list of dropped documents."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from heliostat.curation import readers, segment
from heliostat.curation.pdf import is_pdf
from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import archives, clones
from heliostat.curation.readers.streams import BLOCK
from heliostat.curation.segment import SpilledRun
from heliostat.curation.stage import Document, Dropped
from heliostat.curation.text import ahead, documents, gathering, infilling, repositories, sources, token_counts, tokens
from heliostat.data import manifest, row_groups, versions
from heliostat.data.infilling import Markers
from heliostat.data.manifest import FILES, SHARDS
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import care, cpu_time, spill
from heliostat.tasks.spill import survivors_of

PREFIXES = 1 << 16  # number of hash prefixes (16 bits), by which the tokenizer's training text is measured
PREFIX_SHIFT = 48  # bits of a key after the prefix
SELECTED_BYTES = 8 << 20  # bytes of the tokenizer's training texts in memory at once
LISTED = pa.schema([(name, pa.large_string()) for name in ("id", "reason", "detail")])


@dataclass(frozen=True)
class TextSource:
    """Reads parts of a text input in a Ray task."""

    by_text: ClassVar[bool] = True

    input: str
    rules: documents.TextRules

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        base = sources.root(self.input)
        fixed = self.input != sources.STDLIB  # each node has its own standard library
        if fixed:
            sources.require_unchanged(base, part)
        yield from read_file(base, part.path, self.rules, part)
        if fixed and (not base.is_s3 or part.length > ahead.AHEAD):  # in a store, only files that take several requests
            sources.require_unchanged(base, part)

    def finish(self, document: Document) -> Document | Dropped:
        if isinstance(document.text, bytes):
            what, stage = ("PDF", "pdf") if is_pdf(document.text) else ("page", "extract")
            raise ConfigError(f"stages: {document.id} is a {what}, not text. Put {{stage: {stage}}} among the first stages")
        return documents.clean(document.id, document.text, self.rules, document.columns)


def read_file(
    base: Location, path: str, rules: documents.TextRules, part: FilePart | None = None
) -> Iterator[Document | Dropped]:
    """Yields the normalized documents of a file or a repository, and a `Dropped` for each dropped document. HTML pages and PDFs
    stay bytes.

    Raises an error if the object store fails.
    """
    part = part or FilePart(path, 0, 0)
    try:
        for item in _read(base, path, rules, part):
            if isinstance(item, Dropped) or isinstance(item.text, bytes):
                yield item
            else:
                yield documents.clean(item.id, item.text, rules, item.columns)
    except sources.LeftOutError as e:
        if part.start == 0:
            yield Dropped(path or base.name, e.reason, e.detail)


def _read(base: Location, path: str, rules: documents.TextRules, part: FilePart) -> Iterator[Document | Dropped]:
    """Yields the documents of a file, an archive, or a git clone. Raises LeftOutError if the file can't be opened."""
    name = path or base.name
    if clones.is_clone(name) and not base.is_s3 and Path(base.path, path).is_dir():
        if not sources.inside(base, path):
            raise sources.LeftOutError("outside", f"leads out of {base}")
        yield from clones.read(name, Path(base.path, path), rules, repositories.commit_of(part.modified))
        return
    with sources.blocks(base, path, rules.max_file_bytes, part) as file:
        stream = cast(BinaryIO, file)
        yield from archives.read(name, stream, rules) if archives.is_archive(name) else readers.read(name, stream, rules, part)


def count_lines(folder: Location, input: str, part: FilePart) -> dict[str, object]:
    """Counts the lines that begin in a part of a file. The count is 0 if the file can't be read; a later read reports the
    error."""
    base = sources.root(input)
    sources.require_unchanged(base, part)
    stop = part.bytes if part.stop is None else part.stop
    count, at = int(part.start == 0), max(0, part.start - 1)
    try:
        with sources.blocks(base, part.path, part.bytes, part) as file:
            file.seek(at)
            while block := file.read(min(8 * BLOCK, stop - 1 - at)) if at < stop - 1 else b"":
                count, at = count + block.count(b"\n"), at + len(block)
    except sources.LeftOutError:
        count = 0
    return {"lines": count}


def survey(folder: Location, input: str, part: FilePart, target: int, limit: int) -> dict[str, object]:
    """Surveys a range of a compressed file (`readers.surveyed`). The survey is empty if the file can't be read; a later read
    reports the error."""
    base = sources.root(input)
    sources.require_unchanged(base, part)
    try:
        with sources.blocks(base, part.path, part.bytes, part) as file:
            result = readers.surveyed(part.path or base.name, cast(BinaryIO, file), part, target, limit)
    except sources.LeftOutError:
        result = readers.Survey()
    return {"survey": asdict(result)}


# the tokenizer's sample ------------------------------------------------------------------------------------------------


def lowest(folder: Location, runs: list[SpilledRun], high: int) -> dict[str, object]:
    """Writes the distinct documents whose key (the first 64 bits of the text's hash) is below `high` to a temporary file, as
    training text for the tokenizer. `bytes` in the record: the UTF-8 bytes of these documents, with all their copies."""
    read = (table for table in survivors_of(folder, runs, 0, high, ["hash", "id", "bytes", "text"]))
    tables = [_once(table) for table in read if len(table)]  # a table is empty if later stages dropped all its documents
    if not tables:
        return {"sample": [], "bytes": 0, "files": []}
    table = distinct(tables)
    name = spill.write(folder, table, ("hash", "id"))
    return {"sample": [name], "bytes": pc.sum(pc.multiply(table["bytes"], table["copies"])).as_py(), "files": [name]}


def _once(table: pa.Table) -> pa.Table:
    return table.append_column("copies", pa.array(np.ones(len(table), np.int64)))


def distinct(tables: list[pa.Table]) -> pa.Table:
    """Joins tables of documents, and keeps one row per hash: the row with the smallest id. Rows are sorted by hash. `copies`
    becomes the sum of the copies of all rows with the same hash. Empties the list `tables`."""
    counts = pa.concat_tables([table.select(["hash", "copies"]) for table in tables])
    counts = counts.group_by("hash").aggregate([("copies", "sum")]).sort_by("hash")
    kept, _ = gathering.unique(tables)
    return kept.set_column(kept.schema.get_field_index("copies"), "copies", counts["copies_sum"])


def train_on(folder: Location, samples: list[str], high: int, bytes: int, config: dict[str, Any]) -> dict[str, object]:
    """Trains a tokenizer on the selected documents with keys below `high`, in the order of the hashes (`selected`). Returns the
    name of the tokenizer's temporary file."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # no other task runs at the same time
    texts = selected(folder, samples, high, bytes, config["train_bytes"])
    name = segment.store(folder, tokens.train(texts, config["vocab_size"], config["end_of_document"], config.get("markers", ())))
    return {"definition": name, "files": [name]}


def selected(folder: Location, samples: list[str], high: int, bytes: int, train_bytes: int) -> Iterator[str]:
    """Yields the selected texts, each once, in the order of their hashes.

    Stops at the text with which the yielded texts reach `train_bytes`. With their copies, documents may reach `train_bytes`
    earlier. Then stops after the last text with the same 16-bit prefix of the hash. Needs only a few megabytes of memory.
    """
    parts, taken, with_copies, last = max(1, bytes // SELECTED_BYTES), 0, 0, PREFIXES
    for part in range(parts):
        low, stop = part * high // parts, (part + 1) * high // parts
        tables = list(spill.read_all(folder, samples, low, stop))
        if not tables:
            continue
        table = distinct(tables)
        numbers = (table[name].to_pylist() for name in ("key", "bytes", "copies"))
        for key, size, copies, text in zip(*numbers, table["text"], strict=True):
            prefix = key >> PREFIX_SHIFT
            if prefix > last:
                return
            yield text.as_py()
            taken, with_copies = taken + size, with_copies + size * copies
            if taken >= train_bytes:
                return
            last = min(last, prefix) if with_copies >= train_bytes else last


# shards ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSharding:
    """Configures the shards of a text dataset: the output folder, the number of shards, the tokenizer, and the tokens per row
    group."""

    output: str
    shards: int
    definition: str
    end: int
    chunk_tokens: int
    explained: bool  # whether the fate of each document is recorded
    infill: dict[str, Any] | None = None  # keys of FillInTheMiddle, and the markers' names and ids
    together: bool | None = None  # whether the runs are grouped by related documents
    every: int | None = None  # which documents are recorded (`recording`); None: all

    @property
    def recorded(self) -> int:
        return 1 if self.every is None else self.every


def bounds(first: int, shards: int, stop: int | None = None) -> tuple[int, int]:
    """Computes the range of keys for a shard, or for the shards from `first` to `stop`. A key's first 52 bits, as a fraction,
    select the shard."""
    low, high = (-(-(shard << 52) // shards) << 12 for shard in (first, first + 1 if stop is None else stop))
    return low, high


def write_shards(folder: Location, first: int, stop: int, runs: list[SpilledRun], plan: TextSharding) -> dict[str, object]:
    """Writes shards one after another. Returns the shards' counts and their rows of the manifest."""
    records = [one for shard in range(first, stop) if (one := _write_shard(folder, runs, shard, plan)) is not None]
    ends = [name for one in records for name in one.pop("ends")]
    return {"shards": records, "ends": ends, "files": [*ends, *(one["counts"] for one in records)]}


def _write_shard(folder: Location, runs: list[SpilledRun], shard: int, plan: TextSharding) -> dict[str, Any] | None:
    table, duplicates = _gathered(folder, runs, *bounds(shard, plan.shards), plan)
    if table is None:
        return None
    with cpu_time.loading():  # a sample has few documents per shard
        tokenizer = tokens.load(plan.definition)
    encoded, rearranged = _encoded(tokenizer, table, plan)
    table = table.drop_columns("text")  # frees memory for the file
    ids = table["id"].to_pylist()
    places = np.array(
        [manifest.place(digest.hex()) for digest in table["group" if plan.together else "hash"].to_pylist()], np.int64
    )
    data = tokens.shard(ids, encoded, plan.chunk_tokens, places)
    counts = tokens.counted(encoded, tokenizer.get_vocab_size())
    groups = tokens.chunks(np.array([len(e) for e in encoded]), plan.chunk_tokens, places)
    del encoded
    output = Location(plan.output)
    path = versions.store(output, f"{SHARDS}/{shard:05d}/", data, ".parquet")
    return {
        **row_groups.written(output, path, data, "tokens"),
        "documents": len(ids),
        "duplicates": duplicates.count,
        "bytes": int(table["bytes"].to_numpy().sum()),
        "cut": sum(len(rows) for rows, _ in groups) - len(ids),
        "counts": token_counts.store(folder, counts),
        "ends": gathering.spill_kept(folder, path, table, duplicates, plan.recorded) if plan.explained else [],
        **({"rearranged": rearranged} if plan.infill else {}),
        **({"together": gathering.counted(table)} if plan.together else {}),
    }


def _gathered(
    folder: Location, runs: list[SpilledRun], low: int, high: int, plan: TextSharding
) -> tuple[pa.Table | None, gathering.Duplicates]:
    if plan.together:
        return gathering.grouped(folder, runs, low, high), gathering.Duplicates(folder, False)
    return gathering.gather(folder, runs, low, high, plan.explained)


def _encoded(tokenizer: Tokenizer, table: pa.Table, plan: TextSharding) -> tuple[list[np.ndarray], dict[str, int]]:
    """Encodes the texts of a table. With `fill_in_the_middle`, rearranges the texts first. Returns the token ids of each text,
    and the counts of rearranged texts."""
    encoded: list[np.ndarray] = []
    infill = plan.infill or {}
    keys = infilling.FillInTheMiddle(**{k: infill[k] for k in infilling.FillInTheMiddle.model_fields}) if infill else None
    markers = Markers(*infill["markers"]) if infill else None
    for start, stop in _slices(table["bytes"].to_numpy()):
        texts = table["text"].slice(start, stop - start).to_pylist()
        if keys is None or markers is None:
            encoded += tokens.encode(tokenizer, texts, plan.end)
        else:
            hashes = [digest.hex() for digest in table["hash"].slice(start, stop - start).to_pylist()]
            arranged = [infilling.arrange(*one, keys) for one in zip(texts, hashes, strict=True)]
            encoded += infilling.encode(tokenizer, arranged, plan.end, markers)
    return encoded, markers.counted(encoded) if markers else {}


def _slices(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields ranges of documents (first index, index after the last) with about a megabyte of text each. So only a few texts are
    Python strings at a time."""
    places = np.cumsum(sizes) // (16 * tokens.BATCH_CHARS)
    edges = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), len(sizes)]
    yield from itertools.pairwise(edges)


# what was left out -----------------------------------------------------------------------------------------------------


def list_left_out(folder: Location, part: int, parts: int, output: str, names: list[str],
                  also: list[str] | None = None) -> dict[str, object]:  # fmt: skip
    """Writes a Parquet file that lists the documents that reading and the stages in `also` dropped, sorted by reason and id.
    Covers one of `parts` equal ranges of keys."""
    low, high = spill.share(part, parts)
    tables = [_listed(t, also).select(LISTED.names) for t in spill.read_all(folder, names, low, high)]
    table = pa.concat_tables([LISTED.empty_table(), *tables]).sort_by([("reason", "ascending"), ("id", "ascending")])
    sink = io.BytesIO()
    pq.write_table(spill.narrowed(table), sink, compression="zstd")
    return {"listed": versions.store(Location(output), f"{FILES}/listed-", sink.getvalue(), ".parquet"), "rows": len(table)}


def select_left_out(folder: Location, names: list[str], also: list[str] | None = None) -> dict[str, object]:
    """Writes the rows that `list_left_out` lists from many temporary files to one temporary file. So a task that lists them
    doesn't read the rows of other stages, or very many files."""
    tables = [_listed(t, also) for t in spill.read_all(folder, names)]
    files = [spill.write(folder, pa.concat_tables(tables))] if any(map(len, tables)) else []
    return {"files": files}


def _listed(table: pa.Table, also: list[str] | None) -> pa.Table:
    """Returns the rows of documents that reading and the stages in `also` dropped, and of all documents that crashed a worker."""
    stages = pa.array([segment.READ, segment.FINISH, *(also or [])], pa.large_string())
    return table.filter(pc.or_(pc.is_in(table["stage"], stages), pc.equal(table["reason"], care.CRASHED)))
