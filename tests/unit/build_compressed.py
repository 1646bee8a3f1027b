"""Writes compressed files of documents."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa

from tests.unit.build_curation import spelled
from tests.unit.test_curation_readers import record


def zst(data: bytes) -> bytes:
    """Compresses data to a frame that doesn't have its decompressed size."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def long_lines(rng: random.Random, count: int) -> bytes:
    return b"".join(json.dumps({"text": rng.randbytes(60).hex()}).encode() + b"\n" for _ in range(count))


def write_compressed(folder: Path) -> None:
    """Writes compressed files of each kind that is divided, and small files."""
    rng = random.Random(0)
    folder.mkdir()
    frames = [long_lines(rng, 30) for _ in range(40)]
    (folder / "a.jsonl.zst").write_bytes(b"".join(map(zst, frames)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(long_lines(rng, 900) + b"{bad\n" + long_lines(rng, 9)))
    texts = [record(f"http://{i}/", rng.randbytes(60).hex().encode(), kind="conversion") for i in range(400)]
    (folder / "c.wet.gz").write_bytes(b"".join(map(gzip.compress, texts)))
    for i in range(9):
        (folder / f"d{i}.txt").write_text(f"a text of {spelled(i)}")
    (folder / "e.jsonl").write_bytes(long_lines(rng, 90))
