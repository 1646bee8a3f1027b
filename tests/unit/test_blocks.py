"""Tests checksummed blocks: any part of a chunk is read correctly, with little excess, and no damaged byte is ever used."""

import random
import zlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from heliostat.checkpoint import checksums
from heliostat.checkpoint.checksums import Slice

from tests.seeds import every_seed

B = 64  # bytes a block, for the tests


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK", B)


def _file(rng: random.Random) -> tuple[bytes, list[tuple[int, bytes, list[int]]]]:
    """Writes a file of chunks with gaps between them; returns it with (offset, content, checksums) of each chunk."""
    data, chunks = bytearray(rng.randbytes(rng.randrange(20))), []
    for _ in range(rng.randrange(1, 6)):
        content = rng.randbytes(rng.choice([1, B - 1, B, B + 1, rng.randrange(1, 40 * B)]))
        sums = [zlib.crc32(b) for b in checksums.cut(torch.frombuffer(bytearray(content), dtype=torch.uint8))]
        chunks.append((len(data), content, sums))
        data += content + rng.randbytes(rng.choice([0, 0, 3]))
    return bytes(data), chunks


def _parts(rng: random.Random, chunks) -> list[tuple[Slice, bytes]]:
    """Returns a random part of some of the chunks, with its expected content."""
    out = []
    for offset, content, sums in chunks:
        if rng.random() < 0.8:
            first = rng.randrange(len(content))
            last = rng.randrange(first, len(content)) + 1
            target = torch.zeros(last - first, dtype=torch.uint8)
            out.append((Slice(offset, len(content), sums, first, target), content[first:last]))
    rng.shuffle(out)
    return out


@every_seed(300)
def test_any_parts_of_any_chunks_come_back_and_little_more_is_read(seed):
    """The excess is less than one block at each end of a part. Whole chunks cost exactly their bytes."""
    rng = random.Random(seed)
    data, chunks = _file(rng)
    parts = _parts(rng, chunks)
    runs = checksums.runs([p for p, _ in parts])
    total, damaged = checksums.read(pa.BufferReader(data), runs)
    assert damaged is None
    assert all(bytes(part.target.numpy()) == expected for part, expected in parts)
    wanted = sum(len(p.target) for p, _ in parts)
    assert wanted <= total < wanted + 2 * B * len(parts) + 1
    if all(len(p.target) == p.size for p, _ in parts):
        assert total == wanted
    assert all(checksums._size(r) <= checksums.RUN_BLOCKS * B for r in runs)


@every_seed(300)
def test_a_damaged_byte_is_found_exactly_if_its_block_is_needed(seed):
    """The error names its block, and the bytes of that block reach no target."""
    rng = random.Random(seed)
    data, chunks = _file(rng)
    parts = _parts(rng, chunks)
    at = rng.randrange(len(data))
    broken = bytearray(data)
    broken[at] ^= 1 << rng.randrange(8)
    runs = checksums.runs([p for p, _ in parts])
    holding = [b for r in runs for b in r if b.offset <= at < b.offset + b.size]
    _, damaged = checksums.read(pa.BufferReader(bytes(broken)), runs)
    assert damaged == (holding[0] if holding else None)
    if damaged:
        assert not damaged.target.any()


@every_seed(50)
def test_a_file_cut_short_is_found(seed):
    """Missing bytes are never replaced by the remains of an earlier read in memory."""
    rng = random.Random(seed)
    data, chunks = _file(rng)
    offset, content, sums = chunks[-1]
    part = Slice(offset, len(content), sums, 0, torch.zeros(len(content), dtype=torch.uint8))
    short = data[: offset + rng.randrange(len(content))]
    _, damaged = checksums.read(pa.BufferReader(short), checksums.runs([part]))
    assert damaged is not None


def test_neighbours_are_read_with_one_request():
    """A thousand small adjacent tensors don't cost a thousand requests to a store."""
    content = np.arange(B * 8, dtype=np.uint8)
    sums = [zlib.crc32(content[i : i + 8]) for i in range(0, len(content), 8)]
    parts = [Slice(8 * i, 8, [s], 0, torch.zeros(8, dtype=torch.uint8)) for i, s in enumerate(sums)]
    assert len(checksums.runs(parts)) == 1
