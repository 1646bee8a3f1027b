"""Where images and captions come from: scikit-learn's digits, folders with a metadata file, Parquet, WebDataset tars.

    sklearn:digits      1,797 handwritten digits of 8 x 8 pixels, on every machine: the default that downloads nothing
    FOLDER              metadata.jsonl, metadata.csv or metadata.parquet with a column `file_name`, and the files it names
    FOLDER or GLOB      *.parquet: a column of encoded images (bytes, or {bytes, path} as Hugging Face writes them)
    FOLDER or GLOB      *.tar as WebDataset writes them: KEY.png (.jpg, .webp) with KEY.txt, or KEY.json that has the columns

Ids are places (`a.tar/KEY`, `b.parquet#7`), so they name an image for ever. A digit's caption is one of TEMPLATES, chosen by its
number; of the 60 pairs of digit and template ten are never used, so that prompts are left which no model has seen.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heliostat.errors import ConfigError, StorageError
from heliostat.prepare import InputFile
from heliostat.storage import Location
from heliostat.text import brief
from PIL import Image

from pipelines import sources
from pipelines.pictures import Dropped, Raw, encode

DIGITS = "sklearn:digits"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
ARCHIVES = (".tar", ".parquet")
FILES_PER_TASK = 512
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}", "the digit {}", "{} written by hand", "the number {} in ink", "a picture of {}", "{}, handwritten",
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    image: str = "image"
    caption: str = "caption"
    label: str | None = None


def held_back(digit: int) -> str:
    """The caption that no image of this digit has."""
    return TEMPLATES[digit % len(TEMPLATES)].format(WORDS[digit])


def digit_caption(number: int, digit: int) -> str:
    """The caption of the image of this number."""
    used = [t for i, t in enumerate(TEMPLATES) if i != digit % len(TEMPLATES)]
    return used[number % len(used)].format(WORDS[digit])


# finding -------------------------------------------------------------------------------------------------------------


def listing(uri: str) -> list[InputFile]:
    """Every file that belongs to the input, sorted by path; ConfigError if there is none."""
    if uri == DIGITS:
        return [InputFile("digits", 1797 * 64, 0)]
    base, found = sources.find(uri)
    tables = {p for p, _ in found if p.rsplit("/", 1)[-1] in METADATA}
    wanted = (*METADATA, *IMAGES) if tables else ARCHIVES
    files = [InputFile(p, i.size, i.mtime_ns or 0) for p, i in found if (p or base.path).lower().endswith(wanted)]
    if not files:
        seen = f"{len(found)} files, none" if found else "no file there"
        raise ConfigError(f"input: {uri!r}: {seen} of {', '.join(METADATA)}, *.tar or *.parquet")
    return sorted(files, key=lambda f: f.path)


def tasks(uri: str, files: list[InputFile], columns: Columns) -> list[dict[str, Any]]:
    """What each read task reads: an archive, a table, or some hundred files that a metadata file names."""
    if uri == DIGITS:
        return [{"kind": "digits", "path": "", "entries": []}]
    base, out = sources.root(uri), []
    tables = [f.path for f in files if f.path.rsplit("/", 1)[-1] in METADATA]
    for path in tables:
        folder = path.rpartition("/")[0]
        entries = [_entry(row, folder, path, columns) for row in read_table(path, base.join(path).read())]
        for first in range(0, len(entries), FILES_PER_TASK):
            out.append({"kind": "files", "path": path, "entries": entries[first : first + FILES_PER_TASK]})
    if not tables:
        out = [{"kind": "archive", "path": f.path, "entries": []} for f in files]
    return out


def _entry(row: dict[str, Any], folder: str, path: str, columns: Columns) -> dict[str, Any]:
    if "file_name" not in row:
        raise ConfigError(f"input: {path}: has no column 'file_name'; its columns: {', '.join(row)}")
    name = f"{folder}/{row['file_name']}" if folder else str(row["file_name"])
    return {"path": name, "caption": row.get(columns.caption), "label": _label(row, columns)}


def _label(row: dict[str, Any], columns: Columns) -> str:
    value = row.get(columns.label) if columns.label else None
    return "" if value is None else str(value)


def read_table(path: str, data: bytes) -> list[dict[str, Any]]:
    """A metadata file's rows; ConfigError if it cannot be read, because then nothing can."""
    try:
        if path.endswith(".parquet"):
            return pq.read_table(io.BytesIO(data)).to_pylist()
        text = data.decode("utf-8-sig")
        if path.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ConfigError(f"input: {path}: cannot be read ({brief(e)})") from e


# reading -------------------------------------------------------------------------------------------------------------


def read(uri: str, task: dict[str, Any], columns: Columns) -> Iterator[Raw | Dropped]:
    """The images of a task."""
    if task["kind"] == "digits":
        yield from digits()
        return
    base = sources.root(uri)
    if task["kind"] == "files":
        for entry in task["entries"]:
            data = _bytes(base, entry["path"])
            yield Raw(entry["path"], data, entry["caption"], entry["label"]) if data else Dropped(entry["path"], "unreadable")
        return
    path = task["path"] or base.name
    data = _bytes(base, task["path"])
    if data is None:
        yield Dropped(path, "unreadable")
    elif path.lower().endswith(".tar"):
        yield from read_tar(path, data, columns)
    else:
        yield from read_parquet(path, data, columns)


def _bytes(base: Location, path: str) -> bytes | None:
    """None for a local file that cannot be opened; a store that refuses or fails is an error."""
    try:
        return (base.join(path) if path else base).read()
    except FileNotFoundError:
        return None
    except StorageError:
        if base.is_s3:
            raise
        return None


def digits() -> Iterator[Raw]:
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (pixels, digit) in enumerate(zip(found.images, found.target.tolist(), strict=True)):
        image = Image.fromarray((255 - pixels * (255 / 16)).round().astype(np.uint8))  # black on white
        yield Raw(f"digits#{number}", encode(image, "png", 0), digit_caption(number, digit), WORDS[digit])


def read_parquet(path: str, data: bytes, columns: Columns) -> Iterator[Raw | Dropped]:
    number = 0
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        wanted = [c for c in (columns.image, columns.caption, columns.label) if c in file.schema_arrow.names]
        for batch in file.iter_batches(256, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                image = row.get(columns.image)
                image = image.get("bytes") if isinstance(image, dict) else image
                caption = row.get(columns.caption)
                yield Raw(
                    f"{path}#{number}",
                    image if isinstance(image, bytes) else None,
                    caption if isinstance(caption, str) else None,
                    _label(row, columns),
                )
    except (pa.ArrowException, OSError, ValueError):
        yield Dropped(path, "corrupt")


def read_tar(path: str, data: bytes, columns: Columns) -> Iterator[Raw | Dropped]:
    """Consecutive members with one name up to the first point of their last part are a sample."""
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                here = f"{folder}/{stem}" if folder else stem
                if here != key:
                    yield from _sample(path, key, parts, columns)
                    key, parts = here, {}
                body = tar.extractfile(member)
                assert body is not None
                parts[suffix.lower()] = body.read()
                if len(parts[suffix.lower()]) != member.size:
                    raise tarfile.ReadError("cut short")
    except (tarfile.TarError, OSError, EOFError):
        yield Dropped(path, "corrupt")
        return
    yield from _sample(path, key, parts, columns)


def _sample(path: str, key: str, parts: dict[str, bytes], columns: Columns) -> Iterable[Raw | Dropped]:
    if not parts:
        return ()
    id = f"{path}/{key}"
    try:
        row = json.loads(parts["json"]) if "json" in parts else {}
        caption = parts["txt"].decode() if "txt" in parts else row.get(columns.caption)
        label = parts["cls"].decode().strip() if "cls" in parts else _label(row, columns)
    except (ValueError, AttributeError):
        return (Dropped(id, "corrupt"),)
    image = next((parts[s.removeprefix(".")] for s in IMAGES if s.removeprefix(".") in parts), None)
    return (Raw(id, image, caption if isinstance(caption, str) else None, label),)
