"""Writes the datasets in every contender's format, with the same samples, uncompressed: Parquet with a manifest, MDS, and tar.

Tokens are random, so compression would gain nothing and cost all contenders the same. Images are 64 x 64 PNGs with a caption.
`make` returns the number of samples, and the sum over all values that a complete delivery must reach.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heliostat.data import manifest
from heliostat.storage.locations import Location
from PIL import Image

from tests.benchmarks.ingest_contenders.task import FILES, touch

GROUPS = 2  # row groups of a Parquet file: 4 MiB each, about the million tokens that the text pipeline writes
VOCABULARY = 50_000
# without nulls, as the text pipeline writes it: reading takes a quarter less CPU time than with them allowed
TOKENS = pa.field("tokens", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False)
WORDS = ["small", "big", "red", "green", "blue", "old", "new", "round", "square", "cat", "house", "tree", "ship", "star"]

Sample = tuple[bytes, str]


def make(kind: str, folder: Path, samples: int, length: int) -> int:
    """Writes the dataset unless it exists; returns the sum of all its values."""
    done = folder / "done.json"
    if not done.exists():
        total, rows = 0, []
        for i in range(FILES):
            part = _tokens(i, samples // FILES, length) if kind == "tokens" else _images(i, samples // FILES)
            total += touch(part) if isinstance(part, np.ndarray) else touch([image for image, _ in part])
            _parquet(folder / "parquet" / f"{i:05d}.parquet", part)
            _tar(folder / "tar" / f"{i:05d}.tar", part)
            where = Location(str(folder / "parquet"))
            rows += manifest.read_footer(where, f"{i:05d}.parquet", "tokens" if kind == "tokens" else None)
        manifest.write(Location(str(folder / "parquet")), rows, {"kind": "tokens" if kind == "tokens" else "rows"})
        if find_spec("streaming"):
            _mds(folder / "mds", kind, samples, length)
        done.write_text(json.dumps({"sum": total}))
    return json.loads(done.read_text())["sum"]


def _tokens(number: int, count: int, length: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, VOCABULARY, (count, length), dtype=np.int32)


def _images(number: int, count: int) -> list[Sample]:
    """Returns smooth color fields with a little noise, as PNGs of about 7 KB."""
    random, out = np.random.default_rng(number), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(coarse) + random.integers(-3, 4, (64, 64, 3)), 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noisy).save(encoded, "PNG", compress_level=1)
        out.append((encoded.getvalue(), " ".join(random.choice(WORDS, 6))))
    return out


def _parquet(path: Path, part: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(part, np.ndarray):
        offsets = np.arange(0, part.size + 1, part.shape[1], dtype=np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.ravel()), type=TOKENS.type)
        table = pa.table([lists], schema=pa.schema([TOKENS]))
    else:
        images, captions = zip(*part, strict=True)
        table = pa.table({"image": pa.array(images, pa.binary()), "caption": pa.array(captions, pa.string())})
    size = table.num_rows // GROUPS
    pq.write_table(table, path, row_group_size=size, compression="none", use_dictionary=False, write_page_checksum=True)


def _members(part: Any) -> Iterator[tuple[str, bytes]]:
    for i, sample in enumerate(part):
        if isinstance(part, np.ndarray):
            yield f"{i:06d}.bin", sample.tobytes()
        else:
            yield f"{i:06d}.png", sample[0]
            yield f"{i:06d}.txt", sample[1].encode()


def _tar(path: Path, part: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in _members(part):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _mds(folder: Path, kind: str, samples: int, length: int) -> None:
    """Writes MDS shards of about the Parquet files' size."""
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:int32:{length}"} if kind == "tokens" else {"image": "bytes", "caption": "str"}
    limit = sum(f.stat().st_size for f in (folder.parent / "parquet").glob("*.parquet")) // FILES
    with MDSWriter(out=str(folder), columns=columns, size_limit=limit, exist_ok=True) as out:
        for i in range(FILES):
            if kind == "tokens":
                for row in _tokens(i, samples // FILES, length):
                    out.write({"tokens": row})
            else:
                for image, caption in _images(i, samples // FILES):
                    out.write({"image": image, "caption": caption})
