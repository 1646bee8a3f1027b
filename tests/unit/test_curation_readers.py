"""Tests that readers return documents with their columns, continue after broken parts, and never hold a whole file."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import struct

import pyarrow as pa
import pytest
from heliostat.curation.readers import KINDS, REASONS, Limits, read, records, suffix_of
from heliostat.curation.stage import Document, Dropped

from tests.seeds import every_seed
from tests.unit.bounded import arrow_peak, python_peak

OK = b"HTTP/1.1 200 OK\r\n"
LIMITS = Limits(max_document_bytes=1 << 16)


def record(uri, body, length=None, kind="response", head=b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"):
    block = (head if kind == "response" else b"") + body
    said = len(block) if length is None else length
    return (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"Content-Length: {said}\r\n\r\n"
    ).encode() + block + b"\r\n\r\n"  # fmt: skip


ONE, TWO, THREE = (record(f"http://{n}/", f"<p>{n}</p>".encode()) for n in ("one", "two", "three"))


def items(path, data, limits=LIMITS):
    found = list(read(path, io.BytesIO(data), limits))
    assert all(d.reason in REASONS for d in found if isinstance(d, Dropped))
    assert len({d.id for d in found}) == len(found) and all(d.id.startswith(path) for d in found)
    return found


def brief(found):
    return [d.text if isinstance(d, Document) else d.reason for d in found]


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, lambda d: pa.compress(d, "zstd", asbytes=True)], ids=["plain", "gz", "zst"]
)
def test_pages_of_a_web_archive_with_their_columns(pack):
    suffix = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    data = [pack(r) for r in (record("", b"software: x", kind="warcinfo"), ONE, TWO)]
    found = items(f"a.warc{suffix}", b"".join(data))
    assert brief(found) == [b"<p>one</p>", b"<p>two</p>"]
    assert found[0].columns == {"url": "http://one/", "date": "2024-01-01T00:00:00Z", "content_type": "text/html; charset=utf-8"}
    if suffix != ".zst":
        assert [d.id for d in found] == [f"a.warc{suffix}#{len(data[0])}", f"a.warc{suffix}#{len(data[0]) + len(data[1])}"]
    else:
        assert items("a.warc.gz", gzip.compress(b"".join([ONE, TWO])))[1].id == f"a.warc.gz#0+{len(ONE)}"


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        (TWO[:-8], ["corrupt"]),  # a truncated record swallows the start of the next, which is found again
        (record("http://two/", b"<p>two</p>", length=100_000), ["truncated"]),
        (record("http://two/", b"<p>two</p>", length=10**18), ["truncated"]),
        (record("http://two/", b"<p>two</p>", length=-5), ["truncated"]),
        (record("http://two/", b"<p>two</p>", length=20), ["corrupt"]),
        (b"garbage\r\n" * 9, ["corrupt"]),
        (b"WARC/1.0\r\nX: " + b"x" * (2 << 20) + b"\r\n\r\n", ["corrupt"]),
        (record("http://two/", b"x" * 100_000), ["too_large"]),
        (record("http://two/", b""), ["empty"]),
        (record("http://two/", b"no response", head=b""), ["corrupt"]),
        (record("http://two/", b"gone", head=b"HTTP/1.1 404 Not Found\r\n\r\n"), ["http_status"]),
        (record("http://two/", b"PNG", head=b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"), ["not_html"]),
        (record("http://two/", b"\xe9t\xe9", head=OK + b"Content-Type: text/plain; charset=latin1\r\n\r\n"), ["été"]),
        (record("http://two/", b"3\r\n<p>\r\n2\r\nhi\r\n0\r\n\r\n", head=OK + b"Transfer-Encoding: chunked\r\n\r\n"), [b"<p>hi"]),
        (record("http://two/", gzip.compress(b"<p>z"), head=OK + b"Content-Encoding: gzip\r\n\r\n"), [b"<p>z"]),
        (record("http://two/", gzip.compress(b"0" * 10**6), head=OK + b"Content-Encoding: gzip\r\n\r\n"), ["too_large"]),
    ],
)  # fmt: skip
def test_a_broken_record_is_named_and_the_next_one_read(middle, expected):
    assert brief(items("a.warc", ONE + middle + THREE)) == [b"<p>one</p>", *expected, b"<p>three</p>"]
    packed = b"".join(map(gzip.compress, (ONE, middle, THREE)))
    expected = ["truncated"] if middle == TWO[:-8] else expected  # it cannot swallow what is in another member
    assert brief(items("a.warc.gz", packed)) == [b"<p>one</p>", *expected, b"<p>three</p>"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (gzip.compress(b"one") + gzip.compress(b"") + gzip.compress(b"two" * 9000), b"one" + b"two" * 9000),
        (gzip.compress(b"one") + b"\0\0 trailing", b"one"),
        (gzip.compress(b"one") + gzip.compress(b"two")[:-8], b"onetwo"),
        (gzip.compress(b"0" * 40_000) * 2, "too_large"),
        (gzip.compress(b"one") + b"\x1f\x8b noise", "corrupt"),
        (gzip.compress(b"") * 3000 + gzip.compress(b"end"), b"end"),
    ],
    ids=["members", "trailing", "cut", "large", "noise", "many"],
)
def test_all_members_of_a_packed_body_are_read(body, expected):
    made = record("http://x/", body, head=OK + b"Content-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n")
    assert brief(items("a.warc", made)) == [expected]


@pytest.mark.parametrize("damage", [lambda m: m[:-40], lambda m: m[:20] + b"\0\1\2\3" * 5 + m[40:], lambda m: b"noise" * 20])
def test_a_broken_packed_record_is_named_and_the_next_one_read(damage):
    one, two, three = map(gzip.compress, (ONE, TWO, THREE))
    found = brief(items("a.warc.gz", one + damage(two) + three))
    assert (
        found[0] == b"<p>one</p>"
        and found[-1] == b"<p>three</p>"
        and set(found[1:-1]) <= {"corrupt", "truncated"}
        and found[1:-1]
    )


class InBlocks(io.BytesIO):
    """Reads at most `most` bytes at once."""

    most = 1

    def read(self, size=-1):
        return super().read(self.most if size < 0 else min(size, self.most))


@pytest.mark.parametrize("zeros", range(4))
def test_no_page_is_lost_whose_member_begins_at_the_end_of_a_block(zeros):
    """The first bytes of a gzip member are read although they are in two blocks of the file, also after zeros, which are
    padding."""
    first = gzip.compress(ONE) + bytes(zeros)
    for InBlocks.most in range(len(first) - 4, len(first) + 4):
        assert brief(read("a.warc.gz", InBlocks(first + gzip.compress(TWO)), LIMITS)) == [b"<p>one</p>", b"<p>two</p>"]


@pytest.mark.parametrize("behind", range(11))
def test_no_page_with_a_wrong_checksum_is_kept(behind):
    """A gzip member is decompressed in pieces. Its checksum may be in another piece than the end of the page."""
    page = random.Random(0).randbytes(records.PACKED)
    size = records.PACKED + behind - (len(gzip.compress(record("http://x/", page[:16_000]))) - 16_000)
    member = bytearray(gzip.compress(record("http://x/", page[:size])))
    assert len(member) == records.PACKED + behind
    assert brief(items("a.warc.gz", bytes(member) + gzip.compress(TWO)))[1] == b"<p>two</p>"
    member[200] ^= 1  # in a block that isn't compressed, which only the checksum protects
    assert brief(items("a.warc.gz", bytes(member) + gzip.compress(TWO))) == ["corrupt", b"<p>two</p>"]


def test_every_cut_of_an_archive_ends_with_what_was_cut():
    whole = b"".join(map(gzip.compress, (ONE, TWO)))
    first = len(gzip.compress(ONE))
    for end in range(first + 1, len(whole), 7):
        found = brief(items("a.warc.gz", whole[:end]))
        assert found in ([b"<p>one</p>", "truncated"], [b"<p>one</p>", "corrupt"], [b"<p>one</p>", b"<p>two</p>", "truncated"]), (
            end
        )
    assert brief(items("a.warc", b"")) == brief(items("a.warc.gz", b"")) == []


def test_texts_and_metadata():
    wet = record("http://one/", "Größe".encode(), kind="conversion") + record("http://two/", b"\xff", kind="conversion") + ONE
    assert brief(items("a.wet", wet)) == ["Größe", "not_utf8"]
    assert brief(items("a.wat", record("http://one/", b'{"a": 1}', kind="metadata"))) == ['{"a": 1}']


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda d: pa.compress(d, "zstd", asbytes=True)}


@pytest.mark.parametrize("suffix", PACK)
def test_packed_lines_in_one_member_or_several_and_what_comes_before_a_break(suffix):
    lines = [
        json.dumps({"text": f"line {i} " + "x" * (i % 50), "url": f"http://{i}/", "id": i}).encode() + b"\n" for i in range(6000)
    ]
    half = b"".join(lines[:3000]), b"".join(lines[3000:])
    packed = PACK[suffix](half[0]) + PACK[suffix](half[1])
    found = items(f"a.json{suffix}", packed)
    assert (
        len(found) == 6000
        and found[-1].columns == {"url": "http://5999/", "source_id": 5999}
        and found[-1].id == f"a.json{suffix}#6000"
    )
    broken = items(f"a.json{suffix}", packed[:-20])
    assert broken[-1].reason == "corrupt" and len(broken) > 3000
    assert brief(items(f"a.json{suffix}", b"no packing at all")) == ["corrupt"]


@pytest.mark.parametrize("suffix", PACK)
def test_a_bomb_and_a_line_without_end_take_little_memory(suffix):
    lines = b'{"text": "' + b"a" * 30_000_000 + b'"}\n{"text": "behind"}\n'
    packed = PACK[suffix](lines)
    found = list[Document | Dropped]()
    assert python_peak(lambda: found.extend(items(f"a.jsonl{suffix}", packed))) < 20_000_000
    assert brief(found) == ["too_large", "behind"]
    assert (
        brief(items(f"a.jsonl{suffix}", packed, Limits(max_document_bytes=1 << 16, max_file_bytes=1 << 20))) == ["too_large"] * 2
    )
    assert brief(items(f"a.html{suffix}", packed)) == ["too_large"]


def test_lines_of_json():
    data = b'{"text": "a"}\n\nnone\n[1]\n{"text": 1}\n{"other": "b"}\n{"text": "\xff"}\n{"text": "last"}'
    assert brief(items("a.jsonl", data)) == ["a", "invalid_json", "invalid_json", "no_text", "no_text", "not_utf8", "last"]
    assert brief(items("a.jsonl", b"[" * 100_000 + b"\n" + b'{"text": "b"}')) in (["too_large", "b"], ["invalid_json", "b"])


def test_csv():
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows(
        [
            ["id", "text", "license"],
            [7, 'said "so",\nand on', "MIT"],
            [8, "plain", ""],
            [9, "too", "many", "fields"],
            [10, "end", "X"],
        ]
    )
    found = items("a.csv", "\ufeff".encode() + out.getvalue().encode())
    assert brief(found) == ['said "so",\nand on', "plain", "corrupt", "end"]
    assert found[0].columns == {"source_id": "7", "license": "MIT"} and found[0].id == "a.csv#1"
    assert brief(items("a.tsv", b"text\turl\nhello\thttp://x/\n")) == ["hello"]
    assert brief(items("a.csv", b"other\nx\n")) == ["no_text"] and brief(items("a.csv", b"")) == []
    assert brief(items("a.csv", b"text\na\n\xff\nb\n")) == ["a", "not_utf8", "b"]
    assert brief(items("a.csv", b'text\na\n"' + b"never closed\n" * 20_000 + b'"x\n'))[:2] == ["a", "corrupt"]
    assert brief(items("a.csv", b"text\n" + b"x" * 100_000 + b"\nb\n")) == ["too_large", "b"]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow(kind):
    table = pa.table({"text": ["a", None, "c"] * 1000, "url": ["http://x/"] * 3000})
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    data = sink.getvalue().to_pybytes()
    found = items("a.arrow", data)
    assert brief(found)[:3] == ["a", "no_text", "c"] and len(found) == 3000 and found[-1].id == "a.arrow#3000"
    assert found[0].columns == {"url": "http://x/"}
    cut = items("a.arrow", data[: len(data) // 2])
    assert cut[-1].reason == "corrupt" and len(cut) > 500
    assert brief(items("a.arrow", b"noise" * 100)) in (["corrupt"], ["too_large"])
    assert brief(items("a.arrow", b"\xff\xff\xff\xff\xff\xff\xff\x7f" + data)) in (["corrupt"], ["too_large"])


def packed_arrow(table, codec=None, new=pa.ipc.new_stream, **options):
    sink = pa.BufferOutputStream()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec, **options)) as writer:
        for batch in table.to_batches(max_chunksize=100):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("options", [
    {"codec": "zstd"}, {"codec": "lz4"}, {"codec": None},
    {"codec": None, "use_legacy_format": True, "metadata_version": pa.ipc.MetadataVersion.V4},
], ids=["zstd", "lz4", "plain", "legacy"])  # fmt: skip
@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_packed_arrow(options, new):
    texts = [f"text {i} " * (i % 7 + 1) if i % 5 else None for i in range(1000)]
    kinds = pa.array(["a", "b", None, "c" * 99] * 250).dictionary_encode()
    table = pa.table({"text": texts, "kind": kinds, "tags": [[str(i)] * (i % 3) for i in range(1000)], "n": range(1000)})
    found = items("a.feather", packed_arrow(table, new=new, **options))
    assert [d.text for d in found if isinstance(d, Document)] == [t for t in texts if t] and len(found) == 1000
    assert found[3].columns == {"kind": "c" * 99, "tags": [], "n": 3}


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_an_arrow_batch_is_as_large_as_its_buffers_are_unpacked(codec):
    for value in (pa.array(["a" * (40 << 20)]), pa.array(["a" * (40 << 20)]).dictionary_encode()):
        data = packed_arrow(pa.table({"text": value}), codec)
        assert len(data) < 1 << 18
        found = list[Document | Dropped]()
        assert arrow_peak(lambda data=data, found=found: found.extend(items("a.arrow", data))) < 2 << 20
        assert brief(found) == ["too_large"]
        assert brief(items("a.arrow", data, Limits(max_document_bytes=41 << 20))) == ["a" * (40 << 20)]


def test_dictionaries_that_grow_are_bounded_together():
    sink, batches = pa.BufferOutputStream(), []
    for n in range(1, 9):
        words = pa.array([f"{i}" * (1 << 18) for i in range(n)])
        batches.append(pa.record_batch({"text": pa.DictionaryArray.from_arrays(pa.array([n - 1], pa.int32()), words)}))
    options = pa.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=True)
    with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    found = brief(items("a.arrow", sink.getvalue().to_pybytes(), Limits(max_document_bytes=1 << 18)))
    assert len(found) == 8 and found[-1] == "7" * (1 << 18)
    found = brief(items("a.arrow", sink.getvalue().to_pybytes(), Limits(max_document_bytes=1 << 16)))
    assert found == ["too_large"] * 4, "of three the texts alone, and the fourth dictionary with what was there"


@pytest.mark.parametrize("kind", ["dictionary", "view", "runs", "nested"])
def test_rows_that_share_a_value_are_not_held_together(kind):
    long = pa.array(["a" * 60_000])
    views = struct.pack("<i4sii", 60_000, b"aaaa", 0, 0) * 2000
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), long)
    made = {
        "dictionary": lambda: shared,
        "view": lambda: pa.Array.from_buffers(pa.string_view(), 2000, [None, pa.py_buffer(views), pa.py_buffer(b"a" * 60_000)]),
        "runs": lambda: pa.RunEndEncodedArray.from_arrays(pa.array([2000], pa.int32()), long),
        "nested": lambda: pa.StructArray.from_arrays([shared], ["value"]),
    }[kind]()
    plain = pa.array(["x"] * 2000)
    sink, table = pa.BufferOutputStream(), pa.table({"other" if kind == "nested" else "text": made, "n": plain})
    table = table.append_column("text", plain) if kind == "nested" else table
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    kinds = list[bool]()
    assert python_peak(lambda: kinds.extend(isinstance(d, Document) for d in read("a.arrow", io.BytesIO(data), LIMITS))) < 4 << 20
    assert sum(kinds) == 2000


@every_seed(20)
def test_noise_in_an_arrow_file_raises_nothing(seed):
    rng = random.Random(seed)
    table = pa.table({"text": ["abc" * 50] * 50, "kind": pa.array(["x", "y"] * 25).dictionary_encode()})
    for codec in ("zstd", None):
        data = bytearray(packed_arrow(table, codec))
        for _ in range(1 + seed % 5):
            data[rng.randrange(len(data))] = rng.randrange(256)
        items("a.arrow", bytes(data))
        items("a.arrow", bytes(data[: rng.randrange(len(data))]))


def test_kinds_are_told_by_suffix():
    assert suffix_of("x/A.WARC.GZ") == ".warc" and suffix_of("a.tar") is None and suffix_of("a.html.xz") == ".html"
    assert brief(items("a.bin", b"x")) == ["unknown_kind"]
    assert brief(items("a.txt", b"\xef\xbb\xbfhi")) == ["hi"] and brief(items("a.md", b"\xff")) == ["not_utf8"]
    assert brief(items("a.html", b" ")) == ["empty"] and all(s.startswith(".") for s in KINDS)


def test_errors_of_the_stream_pass_through():
    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "the store has failed")

    for path in ("a.warc.gz", "a.jsonl.zst", "a.csv", "a.arrow", "a.html.xz"):
        with pytest.raises(OSError, match="the store has failed"):
            list(read(path, Failing(), LIMITS))
