"""Tests reading in advance: the same items in the same order, a bounded memory, and errors in their place."""

import io
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation.simulation.requests import range_reads
from heliostat.curation.text import ahead, sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.tasks import advance, merging, spill
from heliostat.tasks.advance import FILES, Reserve, in_advance


def slow(items: list[int], rng: random.Random, begun: list[int], reserve: Reserve) -> Iterator[int]:
    for item in items:
        reserve(3)
        begun.append(item)
        time.sleep(rng.random() * 0.002)
        reserve(-1)
        yield item


def of(items: list[int]) -> Callable[[Reserve], Iterator[int]]:
    return lambda reserve: iter(items)


@pytest.mark.parametrize("seed", range(5))
def test_items_come_in_order_and_few_bytes_are_held(seed, monkeypatch):
    """However slow the task or the store is, the items that wait and that are on their way fit into ADVANCE_BYTES, except one of
    the file that the task reads."""
    monkeypatch.setattr(advance, "ADVANCE_BYTES", 9)
    rng, begun = random.Random(seed), list[int]()
    files = [[100 * file + i for i in range(rng.randrange(12))] for file in range(rng.randrange(1, 30))]
    taken, most = list[int](), 0
    for item in in_advance(partial(slow, file, random.Random(seed), begun) for file in files):
        taken.append(item)
        most = max(most, len(begun) - len(taken))
        time.sleep(rng.random() * 0.001)
    assert taken == [item for file in files for item in file] and most <= 9 // 2 + 1


def test_an_item_above_the_limit_is_read_when_the_task_waits_for_it(monkeypatch):
    monkeypatch.setattr(advance, "ADVANCE_BYTES", 1)
    begun = list[int]()
    taken = list(in_advance(partial(slow, [number, number], random.Random(0), begun) for number in range(20)))
    assert taken == begun == sorted(taken) and len(taken) == 40


def test_a_read_without_rows_keeps_no_memory(monkeypatch):
    """Statistics show a range of keys, and the range may have no row."""
    monkeypatch.setattr(advance, "ADVANCE_BYTES", 6)

    def empty(reserve: Reserve) -> Iterator[int]:
        reserve(5)
        yield from ()

    together = threading.Barrier(2, timeout=10)

    def read(number: int, reserve: Reserve) -> Iterator[int]:
        reserve(3)
        together.wait()
        yield number

    assert list(in_advance([*[empty] * 20, partial(read, 1), partial(read, 2)])) == [1, 2]


def test_files_are_read_at_the_same_time():
    """Each waits for all others, so reading one after another would never end."""
    together = threading.Barrier(FILES, timeout=10)

    def read(number: int, reserve: Reserve) -> Iterator[int]:
        together.wait()
        yield number

    assert list(in_advance(partial(read, number) for number in range(FILES))) == list(range(FILES))


def test_an_error_is_raised_after_the_items_before_it():
    def fails(reserve: Reserve) -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    taken = []
    with pytest.raises(ValueError, match="damaged"):
        for item in in_advance([of([0]), fails, of([2])]):
            taken.append(item)
    assert taken == [0, 1]


def test_a_task_that_stops_reading_ends_the_threads(monkeypatch):
    monkeypatch.setattr(advance, "ADVANCE_BYTES", 9)
    before = threading.active_count()
    reading = in_advance([of(list(range(1000))), *(partial(slow, [1] * 1000, random.Random(0), []) for _ in range(20))])
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


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 12_000), (12_000, 30_000), (12_000, 13_000)])
def test_an_object_is_read_in_few_large_requests(place, monkeypatch, start, stop):
    """S3 limits the requests per second, so a range with its last line is read with as few requests as its bytes need. On a disk,
    and after a jump, a read stays small."""
    monkeypatch.setattr(ahead, "AHEAD", 1000)
    monkeypatch.setattr(ahead, "MOST_AHEAD", 8000)
    monkeypatch.setattr(ahead, "LINE", 100)
    body, asked = random.Random(0).randbytes(30_000), list[int]()
    place.join("a.txt").write(body)
    (file,) = sources.listing(str(place))
    part = replace(file.part, start=start, stop=stop)
    with sources.blocks(place, "a.txt", 1 << 20, part) as opened:
        fetched = opened._fetched
        monkeypatch.setattr(opened, "_fetched", lambda begin, size: asked.append(size) or fetched(begin, size))
        opened.seek(max(0, start - 1))
        end = min(len(body), start + part.length + 50)
        assert b"".join(opened.read(50) for _ in range(-(-(end - opened.tell()) // 50)))[: end - start] in body
        length = end - max(0, start - 1)
        assert max(asked) <= 8000 and len(asked) == (ahead.reads(length) if place.is_s3 else -(-length // 1000))
        asked.clear()
        opened.seek(100 if start else 20_000)
        opened.seek(5, 1)
        assert opened.read(10) == body[opened.tell() - 10 : opened.tell()] and asked == [1000]


def test_a_small_range_of_lines_is_read_with_few_other_bytes(place, monkeypatch):
    """A dry run reads hundreds of ranges of 64 KB. Each read took 4 MB of a disk, or 1 MB of an object, so that a sample's CPU
    seconds of reading were three times as many as those of the complete input."""
    body = b"".join(b'{"text": "%d"}\n' % number for number in range(400_000))
    place.join("a.jsonl").write(body)
    (file,) = sources.listing(str(place))
    asked, fetched = list[int](), ahead.ReadAhead._fetched
    monkeypatch.setattr(ahead.ReadAhead, "_fetched", lambda self, begin, size: asked.append(size) or fetched(self, begin, size))
    part = replace(file.part, start=1 << 20, stop=(1 << 20) + (64 << 10))
    read = [document.text for document in TextSource(str(place), TextRules()).read(part)]
    first = body[: 1 << 20].count(b"\n") + (body[(1 << 20) - 1] != ord("\n"))
    assert read == [str(number) for number in range(first, first + len(read))] and len(read) > 3000
    assert sum(asked) <= part.length + ahead.LINE + 1


@pytest.mark.parametrize("seed", range(30))
def test_any_reads_of_an_input_file_give_its_bytes(place, monkeypatch, seed):
    """A thread reads the bytes that follow. Reads of any size, and jumps to any place, must not mix them up."""
    rng = random.Random(seed)
    monkeypatch.setattr(ahead, "AHEAD", rng.choice([10, 100, 1000]))
    monkeypatch.setattr(ahead, "MOST_AHEAD", rng.choice([100, 1000, 8000]))
    monkeypatch.setattr(ahead, "LINE", rng.choice([1, 100]))
    body = rng.randbytes(rng.randint(1, 20_000))
    place.join("a.txt").write(body)
    (file,) = sources.listing(str(place))
    start, stop = sorted(rng.choices(range(len(body) + 1), k=2))
    part = rng.choice([file.part, replace(file.part, start=start, stop=stop)])
    with sources.blocks(place, "a.txt", 1 << 20, part) as opened:
        at = 0
        for _ in range(200):
            if rng.random() < 0.1:
                at = opened.seek(rng.choice([part.start, rng.randint(0, len(body))]))
            size = rng.choice([1, 10, 50, 500, 5000])
            assert opened.read(size) == body[at : at + size]
            at = min(len(body), at + size)


def test_the_next_bytes_of_an_object_are_read_while_the_task_works(place, monkeypatch):
    """Waiting for the store took 8 % of the time of reading tasks. An error of the store is raised where its bytes are needed.
    Memory has at most two blocks."""
    if not place.is_s3:
        pytest.skip("a disk needs no thread")
    monkeypatch.setattr(ahead, "MOST_AHEAD", 1000)
    place.join("a.txt").write(body := random.Random(0).randbytes(10_000))
    (file,) = sources.listing(str(place))
    with sources.blocks(place, "a.txt", 1 << 20, file.part) as opened:
        fetched, asked = opened._fetched, []

        def fetch(begin: int, size: int) -> bytes:
            asked.append(begin)
            if begin == 2000:
                raise DataError("a.txt: changed")
            return fetched(begin, size)

        monkeypatch.setattr(opened, "_fetched", fetch)
        assert opened.read(10) == body[:10] and len(opened.following.result(10)) == 1000 and asked == [0, 1000]
        assert opened.read(1500) == body[10:1510] and opened.following.exception(10) and asked == [0, 1000, 2000]
        assert opened.read(490) == body[1510:2000]
        with pytest.raises(DataError, match="changed"):
            opened.read(1)


@pytest.fixture
def requests(s3, monkeypatch) -> Counter[str]:
    """Counts the requests to the store by method."""
    from werkzeug.serving import WSGIRequestHandler

    counts, before = Counter[str](), WSGIRequestHandler.run_wsgi

    def run_wsgi(self):
        counts[self.command] += 1
        before(self)

    monkeypatch.setattr(WSGIRequestHandler, "run_wsgi", run_wsgi)
    return counts


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_an_input_object_is_read_without_a_request_for_its_size(requests, place):
    place.join("a.txt").write(b"text" * 1000)
    (file,) = sources.listing(str(place))
    requests.clear()
    with sources.blocks(place, "a.txt", 1 << 20, file.part) as opened:
        assert opened.read() == b"text" * 1000 and requests == {"GET": 1}


@pytest.mark.parametrize("place", ["s3"], indirect=True)
@pytest.mark.parametrize("columns", [None, ["row"]])
def test_a_temporary_file_costs_a_request_for_its_footer_and_one_for_each_large_range(requests, place, columns):
    """Also if only a few columns of each row group are read, whose bytes are far apart."""
    rng = np.random.default_rng(0)
    keys, texts = np.sort(rng.integers(0, 1 << 64, 6000, np.uint64)), [rng.bytes(500).hex() for _ in range(6000)]
    name = spill.write_sorted(place, pa.table({"key": keys, "row": np.arange(6000), "text": texts}))
    assert pq.ParquetFile(io.BytesIO(place.join(name).read())).metadata.num_row_groups > 10
    requests.clear()
    assert sum(len(table) for table in spill.read(place, name, columns=columns)) == 6000
    assert requests == {"GET": 2}
    requests.clear()
    list(spill.read(place, name, spill.ALL // 2, 3 * spill.ALL // 4, columns))
    assert requests == {"GET": 2}


@pytest.mark.parametrize("rows", [1, 300, 20_000])
def test_a_local_file_is_read_in_parts_of_a_megabyte(tmp_path, rows):
    """Small row groups have fixed costs, so a read joins them."""
    rng, place = np.random.default_rng(rows), Location(str(tmp_path))
    keys = np.sort(rng.integers(0, 1 << 64, rows, np.uint64))
    name = spill.write_sorted(place, pa.table({"key": keys, "text": [rng.bytes(rng.integers(400)) for _ in range(rows)]}))
    for low, high in ((0, spill.ALL), (spill.ALL // 5, spill.ALL // 2)):
        tables = list(spill.read(place, name, low, high))
        read = np.concatenate([np.zeros(0, np.uint64), *(table["key"].to_numpy() for table in tables)])
        assert read.tolist() == [key for key in keys.tolist() if low <= key < high]
        assert all(table.nbytes <= spill.LOCAL_BYTES + (64 << 10) for table in tables)
        assert len(tables) <= 2 + 2 * sum(table.nbytes for table in tables) // spill.LOCAL_BYTES


def documents(place: Location, seed: int) -> str:
    """Spills documents of 5 MB in 64 or more row groups."""
    rng = np.random.default_rng(seed)
    columns = {name: np.sort(rng.integers(0, 1 << 64, 5000, np.uint64)) for name in ("key", "row", "hash", "bytes", "looks")}
    return spill.write_sorted(
        place, pa.table(columns | {"id": ["a"] * 5000, "text": [rng.bytes(450).hex() for _ in range(5000)]})
    )


@pytest.mark.parametrize("place", ["s3"], indirect=True)
@pytest.mark.parametrize("read_bytes", [spill.READ_BYTES, 256 << 10])
def test_the_tasks_of_a_call_ask_once_for_each_footer(requests, place, monkeypatch, read_bytes):
    """A merge reads a small range of many files, so half of its requests were for footers. The rows are the same, and the
    simulation counts about as many requests."""
    monkeypatch.setattr(spill, "READ_BYTES", read_bytes)
    monkeypatch.setattr(spill, "GROUP_BYTES", 32 << 10)
    names, ranges = [documents(place, seed) for seed in range(4)], [spill.share(part, 3) for part in range(3)]

    def rows_of_ranges() -> list[pa.Table]:
        requests.clear()
        return [pa.concat_tables(spill.read_all(place, names, low, high)) for low, high in ranges]

    alone = rows_of_ranges()
    separate, bytes = requests["GET"], sum(table.nbytes for table in alone) // len(ranges)
    with spill.footers_kept():
        assert rows_of_ranges() == alone
    assert requests == {"GET": separate - 2 * len(names)}, "two of three tasks need no footer"
    simulated = [range_reads(len(names), bytes, footers) for footers in (len(names), 0, 0)]
    assert sum(simulated) == pytest.approx(requests["GET"], rel=0.1)
    assert rows_of_ranges() == alone and requests == {"GET": separate}, "nothing is kept after the call"


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_kept_footers_have_a_limit_in_bytes(requests, place, monkeypatch):
    names = [documents(place, seed) for seed in range(5)]
    with spill.footers_kept():
        list(spill.read_all(place, names[:2]))
        assert spill._footers
        monkeypatch.setattr(spill, "FOOTER_BYTES", spill._footers.bytes)
        list(spill.read_all(place, names))
        requests.clear()
        list(spill.read_all(place, names))
        assert requests == {"GET": 2 + 2 * 3}


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_file_that_is_rewritten_during_a_call_is_read_with_its_own_footer(place):
    """Only a name with a digest names one content. The footer of another file would place its row groups wrongly."""
    with spill.footers_kept():
        for seed in (0, 1):
            content = place.join(documents(place, seed)).read()
            place.join("file.parquet").write(content)
            rows = pa.concat_tables(spill.read(place, "file.parquet"))
            assert rows == pq.read_table(io.BytesIO(content))


def test_the_footers_of_a_merge_fit_into_their_limit(place):
    """Also those of the largest number of files, with as many row groups as a file of documents has at 100 TB."""
    footer = pq.ParquetFile(io.BytesIO(place.join(documents(place, 0)).read())).metadata
    footers = spill._Footers()
    for i in range(merging.MOST_FILES):
        footers.add(str(i), footer)
    assert footer.num_row_groups >= spill.GROUPS and len(footers.kept) == merging.MOST_FILES


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_reads_in_advance_fit_into_the_memory_that_they_reserve(place, monkeypatch):
    """Tables that wait, and the bytes from which they are made, whatever the number of files and however slow the task is."""
    monkeypatch.setattr(advance, "ADVANCE_BYTES", 4 << 20)
    monkeypatch.setattr(spill, "READ_BYTES", 1 << 20)
    rng, names = np.random.default_rng(0), list[str]()
    for _ in range(16):
        table = {"key": np.sort(rng.integers(0, 1 << 64, 4000, np.uint64)), "text": [rng.bytes(500) for _ in range(4000)]}
        names.append(spill.write_sorted(place, pa.table(table)))
    before, most = pa.total_allocated_bytes(), 0
    for _ in spill.read_all(place, names):
        for _ in range(5):
            time.sleep(0.002)
            most = max(most, pa.total_allocated_bytes() - before)
    assert 1 << 20 < most <= (4 << 20) + 3 * (1 << 20), "a table that the task has, and the read for which it waits"
