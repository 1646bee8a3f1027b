"""Tests the text pipeline's pure functions: listing, extraction, drop reasons, duplicates, and row groups."""

import errno
import gzip
import hashlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import readers
from heliostat.curation.text import documents, gathering, sources, tasks, tokens
from heliostat.curation.text.documents import Document, Dropped, TextRules
from heliostat.data import manifest
from heliostat.errors import ConfigError, StorageError
from heliostat.storage.locations import Location

END = "<|endoftext|>"
KNOWN_SHARD = "ad6595d68eed2d06"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def parquet(columns: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    return sink.getvalue()


def read(path: str, data: bytes, **rules) -> list[tuple[str, str]]:
    """Returns (id, text, or the reason in capitals) of every document, read from a folder as a task reads it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        found = list(tasks.read_file(Location(folder), path, TextRules(**rules)))
    return [(d.id, d.text if isinstance(d, Document) else d.reason.upper()) for d in found]


@pytest.mark.parametrize(
    ("raw", "rules", "expected"),
    [
        (b"cafe\xcc\x81", {}, "caf\xe9"),
        (b"cafe\xcc\x81", {"normalise": "none"}, "cafe\u0301"),
        ("\ufb01".encode(), {"normalise": "NFKC"}, "fi"),
        (b"\xef\xbb\xbfwith a mark", {}, "with a mark"),
        (b"one\r\ntwo\n", {}, "one\r\ntwo\n"),
        (b" \n\t", {}, "EMPTY"),
        (b"", {}, "EMPTY"),
        (b"a\0b", {}, "BINARY"),
        (b"\xff\xfe", {}, "NOT_UTF8"),
        ("\ud800", {}, "NOT_UTF8"),
        (b"abc", {"min_chars": 4}, "TOO_SHORT"),
        (b"abc", {"max_chars": 2}, "TOO_LONG"),
        (b"abc", {"min_chars": 3, "max_chars": 3}, "abc"),
    ],
)
def test_clean(raw, rules, expected):
    found = documents.clean("d", raw, TextRules(**rules))
    assert (found.text if isinstance(found, Document) else found.reason.upper()) == expected


@pytest.mark.parametrize("path", ["a.txt", "b/c.MD", "a.py", "a.rst"])
def test_read_plain_and_compressed(path):
    data = b"some text\n" * 3
    for name, packed in [(path, data), (path + ".gz", gzip.compress(data)), (path + ".zst", zstd(data))]:
        assert read(name, packed) == [(name, data.decode())]


def test_read_many_gzip_members_as_one():
    assert read("a.txt.gz", gzip.compress(b"one ") + gzip.compress(b"two")) == [("a.txt.gz", "one two")]


@pytest.mark.parametrize("damage", [lambda d: d[:-6], lambda d: d[: len(d) // 2], lambda d: b"junk" + d])
@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_broken_compression_is_counted(end, pack, damage):
    path = "a.txt" + end
    assert read(path, damage(pack(np.random.default_rng(0).bytes(9999)))) == [(path, "CORRUPT")]


def test_read_jsonl():
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"text": "tw',
        b'{"text": 3}',
        b'{"other": "x"}',
        b"[1]",
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    expected = ["one", "INVALID_JSON", "NO_TEXT", "NO_TEXT", "INVALID_JSON", "NOT_UTF8", "NOT_UTF8", "INVALID_JSON", "last"]
    found = read("d.jsonl.gz", gzip.compress(b"\n".join(lines)))
    assert [t for _, t in found] == expected
    assert [i for i, _ in found] == [f"d.jsonl.gz#{n}" for n in (1, 3, 4, 5, 6, 7, 8, 9, 10)]
    assert read("d.jsonl", b'{"body": "x"}', text_column="body") == [("d.jsonl#1", "x")]


def test_broken_jsonl_keeps_what_came_before():
    lines = b"".join(json.dumps({"text": f"{i} {hashlib.sha256(b'%d' % i).hexdigest()}"}).encode() + b"\n" for i in range(9000))
    found = read("d.jsonl.gz", gzip.compress(lines)[:-5000])
    assert found[0][1].startswith("0 ") and len(found) > 5000
    assert found[-1] == ("d.jsonl.gz", "CORRUPT")


ROWS = [json.dumps({"text": f"{i} {hashlib.sha256(b'%d' % i).hexdigest()}"}).encode() + b"\n" for i in range(3000)]


@pytest.mark.parametrize("end", [b"\n", b""], ids=["ended", "open"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz"])
def test_lines_of_a_damaged_gzip_member_are_kept_and_the_damage_counted(tmp_path, suffix, end):
    """For any name of the file: both names have one reader."""
    packed = gzip.compress(b"".join(ROWS).rstrip(b"\n") + end)
    wrong = packed[:-8] + bytes(4) + packed[-4:]
    padded = gzip.compress(b"".join(ROWS[:9])) + bytes(3 << 20) + gzip.compress(b"".join(ROWS[9:])) + bytes(9)
    for data, expected in (
        (packed, []),
        (wrong, ["corrupt"]),
        (packed[:-8] + packed[-8:-4] + bytes(4), ["corrupt"]),
        (padded, []),
    ):
        (tmp_path / f"a{suffix}").write_bytes(data)
        found = list(tasks.read_file(Location(str(tmp_path)), f"a{suffix}", TextRules()))
        assert [d.text for d in found[:3000]] == [json.loads(row)["text"] for row in ROWS]
        assert [d.reason for d in found[3000:]] == expected


def test_read_parquet():
    good = parquet({"text": ["one", None, " "], "n": [1, 2, 3]})
    assert read("d.parquet", good) == [("d.parquet#1", "one"), ("d.parquet#2", "NO_TEXT"), ("d.parquet#3", "EMPTY")]
    assert read("d.parquet.zst", zstd(good))[0] == ("d.parquet.zst#1", "one")
    assert read("d.parquet", good, text_column="body") == [("d.parquet", "NO_TEXT")]
    assert read("d.parquet", good, text_column="n") == [("d.parquet", "NO_TEXT")]
    words = pa.array(["x", "y", "x"]).dictionary_encode()
    assert [t for _, t in read("d.parquet", parquet({"text": words}))] == ["x", "y", "x"]
    not_utf8 = pa.array([b"\xff", b"fine"]).view(pa.string())
    assert [t for _, t in read("d.parquet", parquet({"text": not_utf8}))] == ["NOT_UTF8", "fine"]
    for broken in (good[:-9], good[: len(good) // 2], b"", b"PAR1", good[:30] + b"\xff\xff\xff" + good[33:]):
        assert read("d.parquet", broken)[-1] == ("d.parquet", "CORRUPT")


def test_every_reason_is_explained():
    """One list has the reasons of the readers, and those of the requirements for texts."""
    assert set(documents.REASONS) == {*readers.REASONS, "too_short", "too_long", "crashed", "unread"}
    assert {"unreadable", "corrupt", "invalid_json", "no_text", "not_utf8", "binary", "empty", "too_large"} < set(readers.REASONS)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data", ("data", None)),
        ("/data/**/*.md", ("/data", "**/*.md")),
        ("/*.md", ("/", "*.md")),
        ("*.md", (".", "*.md")),
        ("a?/b", (".", "a?/b")),
        ("s3://b/k?scheme=http", ("s3://b/k?scheme=http", None)),
        ("s3://b/k/*.gz?scheme=http", ("s3://b/k?scheme=http", "*.gz")),
    ],
)
def test_split_glob(uri, expected):
    assert sources.split_glob(uri) == expected


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("**/*.md", "a.md", True),
        ("**/*.md", "x/y/a.md", True),
        ("*.md", "x/a.md", False),
        ("x/**", "x/y/z.md", True),
        ("?[ab].md", "xb.md", True),
        ("?[!ab].md", "xb.md", False),
        ("a.md", "aXmd", False),
    ],
)
def test_glob(pattern, path, matches):
    assert bool(sources.glob_regex(pattern).fullmatch(path)) is matches


def test_listing(tmp_path):
    for name in ("b.txt", "a/c.jsonl.gz", "a/d.png", "a/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    assert [(f.path, f.bytes) for f in sources.listing(str(tmp_path))] == [("a/c.jsonl.gz", 2), ("a/e.md", 2), ("b.txt", 2)]
    assert [f.path for f in sources.listing(f"{tmp_path}/**/*.md")] == ["a/e.md"]
    assert [f.path for f in sources.listing(str(tmp_path / "b.txt"))] == [""]
    with pytest.raises(ConfigError, match="no such file"):
        sources.listing(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"found 1 file, but none is supported\. Supported endings: \.txt"):
        sources.listing(f"{tmp_path}/a/*.png")


def test_listing_of_the_standard_library():
    paths = [f.path for f in sources.listing("python:stdlib")]
    assert "json/decoder.py" in paths and len(paths) > 500
    assert not [p for p in paths if {"site-packages", "test", "tests", "__pycache__"} & set(p.split("/"))]


def test_excluded_files_are_left_out_and_said(tmp_path, caplog):
    for name in ("a.py", "tables/b.py", "tables/more/c.py", "tables.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    files = sources.listing(str(tmp_path))
    assert sources.without(files, []) == files and not caplog.records
    with caplog.at_level("INFO"):
        kept = sources.without(files, ["tables/**", "none/*"])
    assert [f.path for f in kept] == ["a.py", "tables.py"]
    assert caplog.messages == [
        "exclude: 'none/*' matches no file of the input. Correct or remove this pattern",
        "exclude: skipping 2 of 4 files",
    ]
    with pytest.raises(ConfigError, match=r"exclude: matches every file of the input \(4\)"):
        sources.without(files, ["**"])
    with pytest.raises(ConfigError, match=r"exclude: '\[b-a\]' is not a valid pattern"):
        sources.without(files, ["[b-a]"])


def test_unique_keeps_the_smallest_id():
    rows = pa.table({"hash": [b"b", b"a", b"b", b"a", b"c"], "id": ["2", "9", "1", "3", "7"], "text": list("xyxyz")})
    table, duplicates = gathering.unique([rows.slice(0, 2), rows.slice(2)])
    assert table["id"].to_pylist() == ["3", "1", "7"] and duplicates["id"].to_pylist() == ["9", "2"]
    assert len(gathering.unique([rows.slice(0, 0)])[1]) == 0


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 640, 99_991])
def test_a_shard_holds_the_range_of_hashes_that_it_always_held(shards):
    """By the first 52 bits, as a fraction, also for hashes next to a bound."""
    keys = [int(hashlib.sha256(b"%d" % i).hexdigest()[:16], 16) for i in range(300)]
    keys += [k for s in range(min(shards, 50)) for k in tasks.bounds(s, shards)[:1]]
    keys += [k - 1 for s in range(min(shards, 50)) for k in tasks.bounds(s, shards)[1:]]
    for key in keys:
        shard = (key >> 12) * shards >> 52
        low, high = tasks.bounds(shard, shards)
        assert low <= key < high
    assert tasks.bounds(0, shards)[0] == 0 and tasks.bounds(shards - 1, shards)[1] == 1 << 64


def test_a_chunk_ends_where_documents_may_be_held_out():
    """No row group has documents on both sides of 1, 2, or 5 parts of ten, a hundred, a thousand, or ten thousand."""
    rng = np.random.default_rng(0)
    for count in (1, 30, 3000):
        places = np.sort(rng.integers(0, manifest.PLACES, count))[::-1]
        ranges = tokens.ranges(rng.integers(1, 100, count), places, 2000)
        assert [i for a, b in ranges for i in range(a, b)] == list(range(count))
        for part in (0.0001, 0.002, 0.01, 0.02, 0.05, 0.1, 0.5):
            sides = [set((places[a:b] < part * manifest.PLACES).tolist()) for a, b in ranges]
            assert all(len(side) == 1 for side in sides)


@pytest.mark.parametrize(
    ("lengths", "target", "expected"),
    [
        ([], 10, []),
        ([3], 10, [(0, 1)]),
        ([5] * 8, 10, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ([100, 1, 1], 10, [(0, 1), (1, 3)]),
        ([1, 1, 100], 10, [(0, 2), (2, 3)]),
        ([9, 9, 2], 10, [(0, 1), (1, 3)]),
    ],
)
def test_cut(lengths, target, expected):
    assert tokens.cut(np.array(lengths), target) == expected


def test_cut_is_balanced_and_complete():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths, target = rng.integers(1, 50, rng.integers(1, 300)), int(rng.integers(1, 500))
        ranges = tokens.cut(lengths, target)
        assert [i for a, b in ranges for i in range(a, b)] == list(range(len(lengths)))
        sums = [int(lengths[a:b].sum()) for a, b in ranges]
        assert all(0 < s <= 1.5 * target + 100 for s in sums)


def test_shard_is_what_the_manifest_says(tmp_path):
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 500, n).astype(np.int32) for n in rng.integers(1, 200, 300)]
    ids = [f"d{i}" for i in range(300)]
    places = np.full(300, manifest.PLACES - 1)
    data = tokens.shard(ids, lists, 3000, places)
    assert data == tokens.shard(ids, lists, 3000, places)
    (tmp_path / "s.parquet").write_bytes(data)
    rows = manifest.read_footer(Location(str(tmp_path)), "s.parquet", "tokens")
    assert sum(r["tokens"] for r in rows) == sum(map(len, lists))
    assert len(rows) == round(sum(map(len, lists)) / 3000) and {r["place"] for r in rows} == {manifest.PLACES - 1}
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    assert file.read()["tokens"].to_pylist() == [t.tolist() for t in lists]
    assert [file.metadata.row_group(r["row_group"]).num_rows for r in rows] == [r["rows"] for r in rows]
    changed = [lists[0] ^ 1, *lists[1:]]
    (tmp_path / "s.parquet").write_bytes(tokens.shard(ids, changed, 3000, places))
    assert manifest.read_footer(Location(str(tmp_path)), "s.parquet", "tokens")[0]["footer"] != rows[0]["footer"]


def test_trained_tokenizer_round_trips_and_repeats():
    sample = ["some words and some more words \U0001f600", "words again"] * 5
    definition = tokens.train(sample, 300, END)
    assert definition == tokens.train(sample, 300, END)
    tokenizer = tokens.load(definition)
    end = tokens.end_id(tokenizer, END)
    hostile = f"\u20ac unseen \x01 {END} in a text"
    (ids,) = tokens.encode(tokenizer, [hostile], end)
    assert ids[-1] == end and end not in ids[:-1], "an end of document spelled in a text must not end it"
    assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == hostile
    with pytest.raises(ConfigError, match=r"'</s>' isn't in the vocabulary\. Choose one of .* special tokens: <\|endoftext\|>"):
        tokens.end_id(tokenizer, "</s>")


def test_encode_in_batches(monkeypatch):
    tokenizer = tokens.load(tokens.train(["abc"], 257, END))
    texts = ["a" * n for n in (1, 50, 3, 7, 0, 9)]
    whole = tokens.encode(tokenizer, texts, 0)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 10)
    assert [t.tolist() for t in tokens.encode(tokenizer, texts, 0)] == [t.tolist() for t in whole]
    assert [len(t) for t in whole] == [n + 1 for n in (1, 50, 3, 7, 0, 9)]


def test_entropy():
    assert tokens.entropy(np.array([5, 5, 0])) == pytest.approx(np.log(2), abs=1e-6)


def test_a_vanished_file_is_counted(tmp_path):
    found = list(tasks.read_file(Location(str(tmp_path)), "gone.txt", TextRules()))
    assert found == [Dropped("gone.txt", "unreadable")]


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_fault_of_the_disk_loses_no_document(tmp_path, monkeypatch, error):
    """After the retries, the task fails, so that the next start of the command reads the file."""
    (tmp_path / "a.txt").write_text("a text")
    monkeypatch.setenv("HELIOSTAT_RETRY_BUDGET_S", "0.01")

    def fail() -> None:
        raise OSError(error, "fault")

    with monkeypatch.context() as patch:
        patch.setattr(Location, "open", lambda self: self.attempt(fail))
        with pytest.raises(StorageError):
            list(tasks.read_file(Location(str(tmp_path)), "a.txt", TextRules()))
    assert [item.text for item in tasks.read_file(Location(str(tmp_path)), "a.txt", TextRules())] == ["a text"]
