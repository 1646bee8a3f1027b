"""Makes any amount of text from the paragraphs of real documents, in seconds per gigabyte.

A document has 2 to 31 random paragraphs of the corpus. A fifth of the documents are exact copies of other documents, and a tenth
are copies with one more paragraph. A document's number decides its paragraphs, so a copy needs no memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

LEAST, MOST = 40, 4000  # characters of a paragraph
FEWEST, RANGE = 2, 16  # a document has FEWEST to FEWEST * RANGE paragraphs, log-uniform
EXACT, NEAR = 0.2, 0.1  # shares of the documents that are copies
BATCH = 16_384  # documents of a file


def paragraphs(corpus: Path) -> list[bytes]:
    """Returns the different paragraphs of a file of JSON lines, each as the inside of a JSON string."""
    found = dict[str, None]()
    with corpus.open() as lines:
        for line in lines:
            found |= dict.fromkeys(re.split(r"\n\s*\n", json.loads(line)["text"]))
    return [json.dumps(one, ensure_ascii=False)[1:-1].encode() for one in found if len(one.strip()) >= LEAST and len(one) <= MOST]


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Returns random uint64 that depend only on the numbers (SplitMix64)."""
    z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shares(numbers: np.ndarray) -> np.ndarray:
    """Returns random fractions in [0, 1) that depend only on the numbers."""
    return (mixed(numbers) >> np.uint64(11)) / (1 << 53)


def documents(parts: list[bytes], first: int, count: int) -> Iterator[bytes]:
    """Yields the JSON lines of the documents with the numbers `first` to `first + count`."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    kind = shares(numbers * np.uint64(4))
    earlier = (shares(numbers * np.uint64(4) + np.uint64(1)) * numbers).astype(np.uint64)
    base = np.where(kind < EXACT + NEAR, earlier, numbers)
    many = (FEWEST * RANGE ** shares(base * np.uint64(4) + np.uint64(2))).astype(np.int64)
    seeds, ends = mixed(base * np.uint64(4) + np.uint64(3)), np.cumsum(many)
    within = np.arange(ends[-1]) - np.repeat(ends - many, many)
    drawn = (mixed(np.repeat(seeds, many) + within.astype(np.uint64)) % np.uint64(len(parts))).tolist()
    extra = (mixed(~numbers) % np.uint64(len(parts))).tolist()
    near = ((kind >= EXACT) & (kind < EXACT + NEAR)).tolist()
    start = 0
    for end, more, is_near in zip(ends.tolist(), extra, near, strict=True):
        picked = [parts[one] for one in drawn[start:end]]
        yield b'{"text": "%b"}\n' % b"\\n\\n".join([*picked, parts[more]] if is_near else picked)
        start = end


def write(folder: Path, corpus: Path, size: int) -> None:
    """Writes about `size` bytes of documents, decompressed, as `.jsonl.zst` files of about 75 MB."""
    parts, first, left = paragraphs(corpus), 0, size
    while left > 0:
        with pa.CompressedOutputStream(str(folder / f"{first // BATCH:05}.jsonl.zst"), "zstd") as out:
            for line in documents(parts, first, BATCH):
                out.write(line)
                left -= len(line)
                if left <= 0:
                    break
        first += BATCH
