"""Reads images and captions from scikit-learn's digits, folders with a metadata file, Parquet, or WebDataset tars.

    drawings:openmoji   captioned drawings in eight styles, see `drawings`
    sklearn:digits      1,797 handwritten digits of 8 x 8 pixels, which every machine has without a download: the default
    FOLDER              metadata.jsonl, metadata.csv or metadata.parquet with a column `file_name`, and the files in this column
    FOLDER or GLOB      *.parquet: a column of encoded images (bytes, or {bytes, path} as Hugging Face writes them)
    FOLDER or GLOB      *.tar as WebDataset writes them: KEY.png (.jpg, .webp) with KEY.txt, or with KEY.json for the columns

An image's id is the image's position in the input (`a.tar/KEY`, `b.parquet#7`), so other files don't change the id. A digit's
caption is one of TEMPLATES; the number of the image selects the template. Ten of the 60 pairs of digit and template are never
used. So these ten prompts are new to every trained model.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from heliostat.curation import pieces
from heliostat.curation.images import drawings
from heliostat.curation.images.pictures import Dropped, Raw, encode
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.readers import parquet
from heliostat.curation.readers.repository import name_of
from heliostat.curation.text import ahead, sources
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.text import printable

DIGITS = "sklearn:digits"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
ARCHIVES = (".tar", ".parquet")
PARTS = ("txt", "json", "cls", *(suffix.removeprefix(".") for suffix in IMAGES))  # suffixes of the parts of a WebDataset sample
FILES_PER_TASK = 512
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}", "the digit {}", "{} written by hand", "the number {} in ink", "a picture of {}", "{}, handwritten",
)  # fmt: skip


@dataclass(frozen=True)
class ImageLimits:
    """Holds the maximum bytes of an input file, and of an image in the file."""

    file: int = 1 << 33
    image: int = 1 << 26


@dataclass(frozen=True)
class ImageColumns:
    image: str = "image"
    caption: str = "caption"
    label: str | None = None
    others: tuple[str, ...] = ()

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of a row's columns in `others`, without missing values. The dataset stores these values with the
        row's image."""
        return {name: row[name] for name in self.others if row.get(name) is not None}


def digit_caption(number: int, digit: int) -> str:
    """Returns the caption of an image of scikit-learn's digits. `number`: the image's index; `digit`: the digit in the image."""
    used = [t for i, t in enumerate(TEMPLATES) if i != digit % len(TEMPLATES)]
    return used[number % len(used)].format(WORDS[digit])


def is_made(uri: str) -> bool:
    """Returns whether heliostat makes the images of this input from an installed package, instead of reading files."""
    return uri == DIGITS or uri.startswith(drawings.SCHEME)


# finding -------------------------------------------------------------------------------------------------------------


def listing(uri: str, limit: int = ImageLimits.file) -> list[InputFile]:
    """Lists all files of an input, sorted by path; ConfigError if the input has no files.

    The list includes files with an image suffix, and all files that a metadata file names, with any suffix. `limit`: maximum
    bytes of a metadata file.
    """
    if uri == DIGITS:
        return [InputFile("digits", 1797 * 64, 0)]
    if uri.startswith(drawings.SCHEME):
        return drawings.listing(uri)
    base, listed = sources.find(uri)
    tables = {p for p, _ in listed if p.rsplit("/", 1)[-1] in METADATA}
    wanted = (*METADATA, *IMAGES) if tables else ARCHIVES
    others = {p for p, _ in listed if tables and not p.lower().endswith(wanted)}
    named = (
        {entry["path"] for path in tables for entry in _entries(base, path, ImageColumns(), limit)} & others if others else others
    )
    files = [
        InputFile(p, i.size, i.mtime_ns, i.etag) for p, i in listed if (p or base.path).lower().endswith(wanted) or p in named
    ]
    if not files:
        seen = sources.nothing(uri, base, len(listed))
        raise ConfigError(f"input: {uri!r}: {seen}. Supported: {', '.join(METADATA)}, *.tar, *.parquet")
    return sorted(files, key=lambda f: f.path)


def tasks(
    uri: str, files: list[InputFile], columns: ImageColumns, limit: int = ImageLimits.file, target: int | None = None
) -> Iterator[dict[str, Any]]:
    """Plans the tasks that read the input. Each task reads an archive, a part of a table, or some hundred files from a metadata
    file.

    For files from a metadata file, the task's `state` contains the size and modification time of each file. So a changed file
    changes the task. `target`: bytes of input per task; the default depends on the input's total size.
    """
    if is_made(uri):
        yield {"kind": uri.partition(":")[2], "path": ""}
        return
    tables = metadata_files(files)
    if not tables:
        target = target or pieces.size(sum(f.bytes for f in files))
        for piece in pieces.cut((f.part for f in files), target, _ranged):
            yield {"kind": "archives", "parts": [part.fields for part in piece]}
        return
    states = states_of(files)
    for path in tables:
        yield from tasks_of_table(sources.root(uri), path, states, columns, limit)


def tasks_of_table(
    base: Location, path: str, states: Mapping[str, list[Any]], columns: ImageColumns, limit: int
) -> Iterator[dict[str, Any]]:
    """Plans the tasks that read the files in a metadata file. `states`: the states (`states_of`) of the input files in the
    metadata file's folder, or of all input files."""
    entries = _entries(base, path, columns, limit)
    for first in range(0, len(entries), FILES_PER_TASK):
        some = entries[first : first + FILES_PER_TASK]
        yield {"kind": "files", "path": path, "entries": some, "state": [states.get(e["path"]) for e in some]}


def states_of(files: list[InputFile]) -> dict[str, list[Any]]:
    """Returns the size and the modification time of each file, and the ETag if the file has one, by path."""
    return {f.path: [f.bytes, f.modified, *([f.etag] if f.etag else [])] for f in files}


def metadata_files(files: list[InputFile]) -> list[str]:
    return [f.path for f in files if f.path.rsplit("/", 1)[-1] in METADATA]


def _ranged(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _entries(base: Location, path: str, columns: ImageColumns, limit: int) -> list[dict[str, Any]]:
    """Reads the entries of a metadata file; ConfigError if the file is invalid."""
    return [_entry(row, path.rpartition("/")[0], path, columns) for row in sources.rows(base, path, limit)]


def _entry(row: dict[str, Any], folder: str, path: str, columns: ImageColumns) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"input: {printable(path)}: expected one object with a 'file_name' per line, got {str(row)[:40]!r}")
    if "file_name" not in row:
        columns_present = printable(", ".join(map(str, row)))
        raise ConfigError(f"input: {printable(path)}: no column 'file_name'. The file's columns: {columns_present}")
    name, caption = str(row["file_name"]), row.get(columns.caption)
    lost = name.startswith("/") or not name  # joining would move such a path into the folder
    joined = f"{folder}/{name}" if folder and not lost else name
    return {
        "path": joined if lost or ".." in joined.split("/") else posixpath.normpath(joined),  # in the same form as in the listing
        "caption": caption if isinstance(caption, str) else None,
        "label": _label(row, columns),
        "columns": columns.kept(row),
    }


def _label(row: dict[str, Any], columns: ImageColumns) -> str:
    value = row.get(columns.label) if columns.label else None
    return "" if value is None else str(value)


# reading -------------------------------------------------------------------------------------------------------------


def read(uri: str, task: dict[str, Any], columns: ImageColumns, limits: ImageLimits = ImageLimits()) -> Iterator[Raw | Dropped]:
    """Yields the images of a task, and a `Dropped` with the reason for each image or file that can't be read."""
    if is_made(uri):
        yield from digits() if uri == DIGITS else drawings.read(uri)
    elif task["kind"] == "files":
        yield from _files(sources.root(uri), task["entries"], task.get("state") or [], limits)
    else:
        for fields in task["parts"]:
            yield from _archive(sources.root(uri), FilePart.of(fields), columns, limits)


def _files(
    base: Location, entries: list[dict[str, Any]], states: list[list[Any] | None], limits: ImageLimits
) -> Iterator[Raw | Dropped]:
    for entry, state in zip(entries, states or [None] * len(entries), strict=True):
        path, id = entry["path"], name_of(entry["path"].encode("utf-8", "surrogatepass"))
        known = FilePart(path, state[0], state[1], etag="".join(state[2:])) if state else None
        try:
            data = sources.fetch(base, path, limits.image, known) if path and path == id else b""
        except sources.LeftOutError as e:
            yield Dropped(id, e.reason, e.detail)
            continue
        if known and not base.is_s3:
            sources.require_unchanged(base, known)
        elif known and data and len(data) != known.bytes:  # compares the sizes, without another request
            raise ahead.changed(base.join(path), known, len(data))
        yield Raw(id, data, entry["caption"], entry["label"], entry["columns"]) if data else Dropped(id, "unreadable")


def _archive(base: Location, part: FilePart, columns: ImageColumns, limits: ImageLimits) -> Iterator[Raw | Dropped]:
    path = part.path or base.name
    sources.require_unchanged(base, part)
    try:
        with sources.blocks(base, part.path, limits.file, part) as file:
            if path.lower().endswith(".tar"):
                yield from read_tar(path, file, columns, limits.image)
            else:
                yield from read_parquet(path, pa.PythonFile(file, mode="r"), columns, limits, part)
    except sources.LeftOutError as e:
        if part.start == 0:  # reported only once
            yield Dropped(path, e.reason, e.detail)
        return
    sources.require_unchanged(base, part)


def digits() -> Iterator[Raw]:
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (pixels, digit) in enumerate(zip(data.images, data.target.tolist(), strict=True)):
        image = Image.fromarray((255 - pixels * (255 / 16)).round().astype(np.uint8))  # black on white
        yield Raw(f"digits#{number}", encode(image, "png", 0), digit_caption(number, digit), WORDS[digit])


def read_parquet(
    path: str, file: pa.NativeFile, columns: ImageColumns, limits: ImageLimits, part: FilePart
) -> Iterator[Raw | Dropped]:
    """Yields the images in the rows of a Parquet file, or of a part of the file. Yields a `Dropped` for an invalid footer only in
    the file's first part, and for invalid row groups in each part."""
    wanted = [c for c in (columns.image, columns.caption, columns.label, *columns.others) if c]
    try:
        opened = parquet.opened(file, columns.image)
    except (pa.ArrowException, OSError, ValueError):
        if part.start == 0:
            yield Dropped(path, "corrupt")
        return
    total = 0
    try:
        for number, row in _rows(opened, tuple(wanted), limits.file, part):
            image = row.get(columns.image)
            image = image.get("bytes") if isinstance(image, dict) else image
            caption = row.get(columns.caption)
            total += len(image) if isinstance(image, bytes) else 0
            if total > limits.file:
                raise sources.LeftOutError("too_large", f"more than {limits.file:,} bytes, unpacked")
            if isinstance(image, bytes) and len(image) > limits.image:
                yield Dropped(f"{path}#{number}", "too_large", f"{len(image):,} bytes")
                continue
            yield Raw(
                f"{path}#{number}",
                image if isinstance(image, bytes) else None,
                caption if isinstance(caption, str) else None,
                _label(row, columns),
                columns.kept(row),
            )
    except (pa.ArrowException, OSError, ValueError):
        yield Dropped(path, "corrupt")
    except sources.LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)


def _rows(file: pq.ParquetFile, wanted: tuple[str, ...], limit: int, part: FilePart) -> Iterator[tuple[int, dict[str, Any]]]:
    for first, batch in parquet.batches(file, wanted, limit, part, 64):
        for row in range(len(batch)):
            yield first + row, {name: batch.column(i)[row].as_py() for i, name in enumerate(batch.schema.names)}


def read_tar(path: str, file: Any, columns: ImageColumns, limit: int = ImageLimits.image) -> Iterator[Raw | Dropped]:
    """Yields the samples of a WebDataset tar. A sample consists of consecutive members in one folder whose file names are equal
    up to the first dot.

    Only members with a suffix in PARTS are read. A sample of more than `limit` bytes is dropped. The sizes in the members'
    headers count for this limit.
    """
    key, parts = "", dict[str, bytes | None]()
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise, tarfile keeps all members
                if not member.isfile():
                    continue
                folder, _, name = name_of(member.name.encode("utf-8", "surrogateescape")).rpartition("/")
                stem, _, suffix = name.partition(".")
                here = f"{folder}/{stem}" if folder else stem
                if here != key:
                    yield from _sample(path, key, parts, columns)
                    key, parts = here, {}
                if (part := suffix.lower()) not in PARTS:
                    parts[""] = b""
                    continue
                others_bytes = sum(len(other or b"") for name, other in parts.items() if name != part)
                if member.size + others_bytes > limit:
                    parts[part] = None
                    continue
                body = tar.extractfile(member)
                assert body is not None
                parts[part] = content = body.read()
                if len(content) != member.size:
                    raise tarfile.ReadError("cut short")
            file.seek(tar.offset)  # the offset where tarfile stopped: tarfile skips an invalid header
            end = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError):
        yield Dropped(path, "corrupt")
        return
    yield from _sample(path, key, parts, columns)
    if not end:
        yield Dropped(path, "corrupt", "no mark at its end")
    elif end != bytes(tarfile.BLOCKSIZE):
        yield Dropped(path, "corrupt", "what follows a file is no file")


def _sample(path: str, key: str, contents: dict[str, bytes | None], columns: ImageColumns) -> Iterable[Raw | Dropped]:
    if not contents:
        return ()
    id = f"{path}/{key}"
    parts = {suffix: body for suffix, body in contents.items() if body is not None}
    if len(parts) < len(contents):
        return (Dropped(id, "too_large", f"the part .{next(s for s in contents if s not in parts)}"),)
    try:
        row = json.loads(parts["json"]) if "json" in parts else {}
        caption = parts["txt"].decode() if "txt" in parts else row.get(columns.caption)
        label = parts["cls"].decode().strip() if "cls" in parts else _label(row, columns)
        kept = columns.kept(row)
    except (ValueError, AttributeError, RecursionError):
        return (Dropped(id, "corrupt"),)
    image = next((parts[s.removeprefix(".")] for s in IMAGES if s.removeprefix(".") in parts), None)
    return (Raw(id, image, caption if isinstance(caption, str) else None, label, kept),)
