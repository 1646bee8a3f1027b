"""Tests that reading a file in ranges equals reading it at once: each record is in one range, with the same id."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import pieces, readers
from heliostat.curation.pieces import FilePart
from heliostat.curation.text import making, tasks
from heliostat.curation.text.documents import TextRules
from heliostat.storage.locations import Location


def lines(rng: random.Random) -> bytes:
    """Returns lines of all lengths: empty, broken, longer than a document may be, with and without a final line end."""
    made = []
    for i in range(rng.randrange(1, 60)):
        kind = rng.random()
        text = "é" * rng.randrange(1, 40) + str(i)
        made.append("" if kind < 0.2 else "{" if kind < 0.3 else json.dumps({"text": text}, ensure_ascii=kind < 0.6)
                    if kind < 0.95 else json.dumps({"text": "y" * 400}))  # fmt: skip
    return ("\n".join(made) + "\n" * rng.randrange(3)).encode()


def read(folder, parts: list[FilePart], **rules) -> list[tuple[str, str]]:
    base = Location(str(folder))
    items = (d for p in parts for d in tasks.read_file(base, p.path, TextRules(**rules), p))
    return [(d.id, getattr(d, "text", None) or d.reason) for d in items]


@pytest.mark.parametrize("seed", range(10))
def test_lines_read_in_ranges_are_the_lines_with_their_numbers(tmp_path, seed):
    rng = random.Random(seed)
    data = lines(rng)
    (tmp_path / "a.jsonl").write_bytes(data)
    whole = read(tmp_path, [FilePart("a.jsonl", len(data), 0)], max_document_bytes=200)
    for size in (5, 50, 128, len(data) or 1, len(data) + 5):
        parts = [FilePart("a.jsonl", len(data), 0, a, b, 0) for a, b in pieces.ranges(len(data), size)]
        counts = {p: tasks.count_lines(None, str(tmp_path), p)["lines"] for p in parts}
        cut = [p for piece in making.numbered([[p] for p in parts], counts) for p in piece]
        assert read(tmp_path, cut, max_document_bytes=200) == whole, size


def test_a_line_that_is_longer_than_many_ranges_is_read_once(tmp_path):
    """If each range read it to its end, 32 ranges would read it 16 times."""
    data = b'{"text": "first"}\n' + json.dumps({"text": "x" * (32 << 20)}).encode() + b'\n{"text": "last"}\n'
    (tmp_path / "a.jsonl").write_bytes(data)
    bytes_read, found = 0, []

    class Counted(io.FileIO):
        def read(self, size=-1):
            nonlocal bytes_read
            data = super().read(size)
            bytes_read += len(data)
            return data

    parts = [FilePart("a.jsonl", len(data), 0, a, b, 1) for a, b in pieces.ranges(len(data), 1 << 20)]
    assert len(parts) == 32
    for part in parts:
        with Counted(tmp_path / "a.jsonl") as file:
            found += [len(d.text) for d in readers.read("a.jsonl", file, TextRules(), part)]
    assert found == [5, 32 << 20, 4] and len(data) < bytes_read < 4 * len(data)


@pytest.mark.parametrize("size", [300, 1500, 5000, 10**6])
def test_row_groups_read_in_ranges_are_the_rows_with_their_numbers(tmp_path, size):
    table = pa.table({"n": range(100), "text": [f"{i} " * (i % 9 + 1) for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    bytes = (tmp_path / "a.parquet").stat().st_size
    parts = [FilePart("a.parquet", bytes, 0, a, b, 1) for a, b in pieces.ranges(bytes, size)]
    found = read(tmp_path, parts)
    assert found == read(tmp_path, [FilePart("a.parquet", bytes, 0)]) and len(found) == 100
    assert read(tmp_path, parts, text_column="body") == [("a.parquet", "no_text")], "said once"
    (tmp_path / "a.parquet").unlink()
    assert read(tmp_path, parts) == [("a.parquet", "unreadable")], "said once"


def test_columns_travel_with_the_document(tmp_path):
    row = {"text": "x", "url": "http://a", "n": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + '\n{"text": "y"}')
    pq.write_table(pa.table({"text": ["x", "y"], "url": ["http://a", None]}), tmp_path / "a.parquet")
    base, rules = Location(str(tmp_path)), TextRules(columns=("url", "date"))
    found = [d.columns for name in ("a.jsonl", "a.parquet") for d in tasks.read_file(base, name, rules)]
    assert found == [{"url": "http://a"}, {}, {"url": "http://a"}, {"url": None}]


def test_a_piece_is_a_function_of_the_files_near_it():
    """All files appear once, in order. A new file changes only its own piece, and a longer file only its end."""
    files = [FilePart(f"f/{i:04d}.txt", 1000 + i % 700, i) for i in range(3000)]
    cut = list(pieces.cut(files, 1 << 16, readers.ranged))
    assert [p for piece in cut for p in piece] == files
    sizes = [sum(p.bytes + pieces.FILE_BYTES for p in piece) for piece in cut]
    assert max(sizes) < 2.2 * (1 << 16) and 0.5 < (sum(sizes) / len(sizes)) / (1 << 16) < 1.2
    more = list(pieces.cut(sorted([*files, FilePart("f/1500b.txt", 999, 0)], key=lambda p: p.path), 1 << 16, readers.ranged))
    assert len({str(piece) for piece in more} - {str(piece) for piece in cut}) <= 3
    grown = list(pieces.cut([FilePart("a.jsonl", 10**6, 1), FilePart("b.txt", 5, 1)], 1 << 16, readers.ranged))
    assert [(p.start, p.stop) for (p,) in grown[:-1]] == [(i << 16, (i + 1) << 16 if i < 14 else 10**6) for i in range(15)]
    assert pieces.size(10) == 1 << 20 and pieces.size(100 << 20) == 8 << 20 and pieces.size(1 << 50) == pieces.MOST
