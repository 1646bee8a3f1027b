"""Tests reading in advance: the same items in the same order, a bounded number of items, and errors in their place."""

import random
import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from heliostat.curation.text import sources
from heliostat.tasks import spill
from heliostat.tasks.advance import FILES, HELD, in_advance


def slow(items: list[int], rng: random.Random, begun: list[int]) -> Iterator[int]:
    for item in items:
        begun.append(item)
        time.sleep(rng.random() * 0.002)
        yield item


@pytest.mark.parametrize("seed", range(5))
def test_items_come_in_order_and_few_are_held(seed):
    """However slow the task or the store is, at most HELD items of FILES files wait, and one of each is on its way."""
    rng, begun = random.Random(seed), list[int]()
    files = [[100 * file + i for i in range(rng.randrange(12))] for file in range(rng.randrange(1, 30))]
    taken, most = list[int](), 0
    for item in in_advance(slow(file, random.Random(seed), begun) for file in files):
        taken.append(item)
        most = max(most, len(begun) - len(taken))
        time.sleep(rng.random() * 0.001)
    assert taken == [item for file in files for item in file] and most <= FILES * (HELD + 1)


def test_files_are_read_at_the_same_time():
    """Each waits for all others, so reading one after another would never end."""
    together = threading.Barrier(FILES, timeout=10)

    def read(number: int) -> Iterator[int]:
        together.wait()
        yield number

    assert list(in_advance(map(read, range(FILES)))) == list(range(FILES))


def test_an_error_is_raised_after_the_items_before_it():
    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    taken = []
    with pytest.raises(ValueError, match="damaged"):
        for item in in_advance([iter([0]), fails(), iter([2])]):
            taken.append(item)
    assert taken == [0, 1]


def test_a_task_that_stops_reading_ends_the_threads():
    before = threading.active_count()
    reading = in_advance([iter(range(1000)) for _ in range(20)])
    assert next(reading) == 0
    reading.close()
    assert threading.active_count() == before


def test_files_in_a_store_have_the_same_rows_in_the_same_order(place):
    rng, names, expected = np.random.default_rng(0), [], []
    for file in range(12):
        table = pa.table({"key": np.sort(rng.integers(0, 1 << 64, 500, np.uint64)), "file": np.full(500, file)})
        names.append(spill.write_sorted(place, table))
        expected += [row for row in table.to_pylist() if row["key"] < spill.ALL // 3]
    assert [row for table in spill.read_all(place, names, 0, spill.ALL // 3) for row in table.to_pylist()] == expected


def test_an_object_is_read_in_few_large_requests(place, monkeypatch):
    """S3 limits the requests per second. On a disk, and after a jump, a read stays small."""
    monkeypatch.setattr(sources, "AHEAD", 1000)
    monkeypatch.setattr(sources, "MOST_AHEAD", 8000)
    body, asked = random.Random(0).randbytes(30_000), list[int]()
    place.join("a.txt").write(body)
    (file,) = sources.listing(str(place))
    with sources.blocks(place, "a.txt", 1 << 20, file.part) as opened:
        fetched = opened._fetched
        monkeypatch.setattr(opened, "_fetched", lambda begin, size: asked.append(size) or fetched(begin, size))
        assert b"".join(iter(lambda: opened.read(500), b"")) == body
        assert len(asked) == (sources.reads(len(body)) if place.is_s3 else 30) and max(asked) == (8000 if place.is_s3 else 1000)
        asked.clear()
        opened.seek(100)
        assert opened.read(10) == body[100:110] and asked == [1000]
