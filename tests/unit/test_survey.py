"""Tests that parts of compressed files have each record of the file once, with the id that it has in the complete file."""

import gzip
import io
import lzma
import random
import struct

import pyarrow as pa
import pytest
import xxhash
from heliostat.curation import pieces, readers
from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import Limits, streams, survey, warc
from heliostat.curation.readers import zst as zst_reader
from heliostat.curation.stage import Document
from heliostat.curation.text import making, sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.tasks import TextSource
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.seeds import every_seed
from tests.unit.build_compressed import long_lines, write_compressed, zst
from tests.unit.build_curation import HereFlow, KilledError
from tests.unit.build_making import make
from tests.unit.test_curation_readers import ONE, TWO, record
from tests.unit.test_ranges import lines

LIMITS = Limits(max_document_bytes=200)


def stored_zst(data: bytes) -> bytes:
    """Stores data in a .zst frame of raw blocks, so that the frame has the data's own bytes. The frame ends with a checksum."""
    half, checksum = len(data) // 2, struct.pack("<Q", xxhash.xxh64_intdigest(data))[:4]
    blocks = [struct.pack("<I", len(one) << 3 | last)[:3] + one for last, one in enumerate((data[:half], data[half:]))]
    return b"\x28\xb5\x2f\xfd\x04\x38" + b"".join(blocks) + checksum


def stored_gz(data: bytes) -> bytes:
    return gzip.compress(data, 0)


def skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A53, len(data)) + data


FORMATS = {
    ".gz": (gzip.compress, stored_gz),
    ".zst": (zst, stored_zst, lambda data: pa.compress(data, "zstd", asbytes=True)),
    ".xz": (lzma.compress,),
}


def compressed_lines(rng: random.Random, suffix: str) -> bytes:
    """Returns lines in several frames, which also end within lines. Some lines have the bytes of frames, stored as they are."""
    data, out = lines(rng), bytearray()
    if rng.random() < 0.5:
        data += b"".join(
            frame(b'{"text": "in a frame"}\n' * 3).replace(b"\n", b"_") + b"\n" for frame in FORMATS[suffix] for _ in range(4)
        )
    while data:
        size = rng.choice([0, 1, 30, 300, 3000])
        out += rng.choice(FORMATS[suffix])(data[:size])
        data = data[size:]
        if suffix == ".zst" and rng.random() < 0.3:
            out += skippable(b"" if rng.random() < 0.3 else zst(b"skipped\n"))
        if suffix != ".zst" and rng.random() < 0.2:
            out += b"\0" * 4
    return bytes(out)


def parts_of(path: str, data: bytes, target: int, limit: int = 1 << 30) -> list[FilePart] | None:
    """Splits a file by surveys of ranges of `target` bytes; None if these surveys don't fit together."""
    ranges = [FilePart(path, len(data), 0, a, b) for a, b in pieces.ranges(len(data), target)]
    return survey.split(ranges, [readers.surveyed(path, io.BytesIO(data), part, target, limit) for part in ranges], limit)


def from_start(path: str, data: bytes, target: int, limit: int = 1 << 30) -> list[FilePart]:
    whole = FilePart(path, len(data), 0, 0, len(data))
    parts = survey.split([whole], [readers.surveyed(path, io.BytesIO(data), whole, target, limit)], limit)
    return [FilePart(path, len(data), 0)] if parts is None else parts


def read(data: bytes, parts: list[FilePart], limits: Limits = LIMITS) -> list[tuple[str, object]]:
    items = (item for part in parts for item in readers.read(part.path, io.BytesIO(data), limits, part))
    return [(item.id, item.text if isinstance(item, Document) else (item.reason, item.detail)) for item in items]


def check_parts(path: str, data: bytes, parts: list[FilePart], limits: Limits = LIMITS) -> None:
    """Asserts that parts cover the file's bytes, and have its documents."""
    assert [p.start for p in parts] == sorted({p.start for p in parts}) and parts[0].start == 0
    if len(parts) > 1:
        assert [p.stop for p in parts] == [*(p.start for p in parts[1:]), len(data)]
    assert read(data, parts, limits) == read(data, [FilePart(path, len(data), 0)], limits)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes readers take a few bytes at once, so that small frames are divided too."""
    small = ((streams, "BLOCK", 64), (survey, "BLOCK", 64), (zst_reader, "BLOCK", 16), (zst_reader, "TOGETHER", 40))
    for module, name, size in small:
        monkeypatch.setattr(module, name, size)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", FORMATS)
@every_seed(20)
def test_lines_of_any_frames_are_read_once_with_their_numbers(suffix, seed):
    rng = random.Random(f"{seed} {suffix}")
    data, path, divided = compressed_lines(rng, suffix), f"a.jsonl{suffix}", 0
    for target in (20, 60, 300, 1000, len(data) + 1):
        parts = parts_of(path, data, target)
        check_parts(path, data, from_start(path, data, target))
        if parts is not None:
            check_parts(path, data, parts)
            divided += len(parts) > 1
    assert divided or len(data) < 1000


def web_archive(rng: random.Random) -> bytes:
    """Returns a web archive, compressed record by record: with members of several records, stored members that contain members
    with records, damaged and truncated members, records of wrong lengths, padding, and other data."""
    out = bytearray()
    for i in range(rng.randrange(1, 30)):
        kind, body = rng.random(), b"<p>" + b"word " * rng.randrange(60) + str(i).encode()
        one = record(f"http://{i}/", body)
        if kind < 0.1:
            one += record(f"http://{i}/second", body)
        elif kind < 0.3:  # a page with the bytes of gzip members, which hold records
            one = record(f"http://{i}/", body + gzip.compress(ONE) + stored_gz(stored_gz(TWO) * 2) + b"\x1f\x8b\x08")
        elif kind < 0.4:
            one = record(f"http://{i}/", body, length=rng.choice([5, 10**4, 10**6]))
        elif kind < 0.45:
            one = record(f"http://{i}/", b"")
        member = stored_gz(one) if kind < 0.5 else gzip.compress(one)
        if rng.random() < 0.1:
            member = rng.choice([member[: rng.randrange(len(member))], member[:20] + b"\0\1" * 9 + member[38:], b"noise" * 9])
        out += member + b"\0" * rng.choice([0, 0, 0, 3])
    return bytes(out)


@every_seed(40)
def test_records_of_any_web_archive_are_read_once_with_their_offsets(seed):
    rng = random.Random(seed)
    data = web_archive(rng)
    for target in (40, 200, rng.randrange(1, 3000), len(data) + 1):
        check_parts("a.warc.gz", data, from_start("a.warc.gz", data, target))
        parts = parts_of("a.warc.gz", data, target)
        if parts is not None:
            check_parts("a.warc.gz", data, parts)


def test_a_survey_of_a_range_without_records_ends_near_the_range():
    """Otherwise, each range of a file with one long member reads a large part of the file."""
    data = bytearray(random.Random(0).randbytes(8 << 20))
    for at in range(0, len(data), 1 << 20):
        data[at : at + 3] = survey.MAGIC["gz"]
    stream = io.BytesIO(data)
    assert survey.of_records(stream, 1 << 20, 2 << 20, 1 << 20, 1 << 30) == survey.Survey()
    assert stream.tell() < 4 << 20


@pytest.mark.parametrize("faults", [4, 5, 6])
def test_a_web_archive_is_read_up_to_the_same_fault_whether_it_is_divided(monkeypatch, faults):
    for module in (survey, warc):
        monkeypatch.setattr(module, "MOST_BREAKS", 5)
    good = [gzip.compress(record(f"http://{i}/", b"<p>word " * 9)) for i in range(20)]
    data = b"".join([*good[:9], *[gzip.compress(b"no record")] * faults, *good[9:]])
    for parts in (parts_of("a.warc.gz", data, 300), from_start("a.warc.gz", data, 300)):
        if parts is not None:
            assert len(parts) > 1 or faults > 4
            check_parts("a.warc.gz", data, parts)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_long_frame_has_a_limited_number_of_slices(suffix, monkeypatch):
    """A task decompresses the slices before its own, so many slices would take quadratic time."""
    monkeypatch.setattr(streams, "BLOCK", 1 << 12)
    data, path = FORMATS[suffix][0](long_lines(random.Random(0), 8000)), f"a.jsonl{suffix}"
    for target in (len(data) // 3, 1000):
        parts = parts_of(path, data, target)
        assert parts is not None and parts == from_start(path, data, target)
        assert 2 <= len(parts) <= survey.MOST_SLICES[suffix[1:]] and (target > 1000 or len(parts) > 2)
        sizes = [p.packed.size for p in parts[:-1]]
        assert min(sizes[1:] or sizes) > 0.3 * max(sizes)
        check_parts(path, data, parts)


@pytest.mark.parametrize("suffix", FORMATS)
@every_seed(5)
def test_a_damaged_file_of_lines_is_not_divided(suffix, seed):
    """What is read before a fault must not depend on the ranges."""
    rng = random.Random(seed)
    frames = [FORMATS[suffix][0](long_lines(rng, 20)) for _ in range(9)]
    at = rng.randrange(1, 9)
    damaged = rng.choice([frames[at][:-9], frames[at][:40] + b"\xff\0" * 8 + frames[at][56:], b"noise" + frames[at]])
    data, path = b"".join([*frames[:at], damaged, *frames[at + 1 :]]), f"a.jsonl{suffix}"
    assert parts_of(path, data, len(frames[0])) is None
    assert from_start(path, data, len(frames[0])) == [FilePart(path, len(data), 0)]
    assert parts_of(path, b"".join(frames), len(frames[0])) is not None


def test_a_file_that_is_larger_than_the_limit_is_not_divided():
    data = b"".join(gzip.compress(long_lines(random.Random(0), 20)) for _ in range(9))
    size = len(gzip.decompress(data))
    assert parts_of("a.jsonl.gz", data, len(data) // 9, size) and not parts_of("a.jsonl.gz", data, len(data) // 9, size - 1)


def test_only_lines_and_web_archives_are_divided():
    wanted = ["a.jsonl.zst", "a.JSON.gz", "a.jsonl.xz", "a.warc.gz", "a.wet.gz", "a.wat.gz"]
    others = [
        "a.jsonl",
        "a.parquet",
        "a.parquet.gz",
        "a.warc",
        "a.warc.zst",
        "a.csv.gz",
        "a.jsonl.bz2",
        "a.txt.gz",
        "a.tar.gz",
        "a.zst",
    ]
    assert all(map(readers.framed, wanted)) and not any(map(readers.framed, others))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "LEAST", 1 << 12)
    monkeypatch.setattr(pieces, "MOST", 1 << 12)


@pytest.mark.usefixtures("small_pieces")
def test_the_dataset_is_the_same_whether_compressed_files_are_divided(tmp_path, monkeypatch):
    write_compressed(tmp_path / "in")
    divided, here = make(tmp_path, "divided", [], shard_bytes=1 << 20)
    assert here.done["survey"] > 40
    monkeypatch.setattr(readers, "framed", lambda path: False)
    whole, plain = make(tmp_path, "whole", [], shard_bytes=1 << 20)
    assert "survey" not in plain.done and here.done["read"] > plain.done["read"] + 20
    assert divided == whole and divided[1]["documents"] > 2000


@pytest.mark.usefixtures("small_pieces")
def test_a_killed_run_keeps_the_parts_of_a_compressed_file(tmp_path):
    write_compressed(tmp_path / "in")
    (tmp_path / "in" / "a.jsonl.zst").write_bytes(zst(long_lines(random.Random(1), 3000)))  # one frame
    for name in ("b.jsonl.gz", "c.wet.gz", "e.jsonl"):
        (tmp_path / "in" / name).unlink()
    expected, here = make(tmp_path, "whole", [], shard_bytes=1 << 20)
    surveys, reads = here.done["survey"], here.done["read"]
    with pytest.raises(KilledError):
        make(tmp_path, "killed", [], shard_bytes=1 << 20, most=surveys + reads // 2)
    again, here = make(tmp_path, "killed", [], shard_bytes=1 << 20)
    assert here.kept["survey"] == surveys and here.kept["read"] == reads // 2 + 1 > 3
    assert again == expected


@pytest.mark.usefixtures("small_pieces")
def test_damaged_files_are_named_in_the_log(tmp_path, caplog):
    write_compressed(tmp_path / "in")
    whole = (tmp_path / "in" / "a.jsonl.zst").read_bytes()
    (tmp_path / "in" / "a.jsonl.zst").write_bytes(whole[:-30])
    make(tmp_path, "made", [], shard_bytes=1 << 20)
    assert "1 large compressed files are read by one task each" in caplog.text and "a.jsonl.zst" in caplog.text


@pytest.mark.usefixtures("small_pieces")
def test_a_damaged_file_that_is_the_input_is_named_in_the_log(tmp_path, caplog):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(long_lines(random.Random(0), 900))[:-9])
    input = str(tmp_path / "a.jsonl.gz")
    files, flow = sources.listing(input), HereFlow(Work(Location(f"{tmp_path}/work")))
    assert len(list(making.pieces_of(flow, input, files, 1 << 12, 1 << 40))) == 1
    assert f"for example {input}. To read" in caplog.text


@pytest.mark.usefixtures("small_pieces")
def test_an_input_of_one_compressed_file_is_divided(tmp_path):
    write_compressed(tmp_path / "in")
    input = str(tmp_path / "in" / "a.jsonl.zst")
    files = sources.listing(input)
    flow = HereFlow(Work(Location(f"{tmp_path}/work")))
    cut = list(making.pieces_of(flow, input, files, 1 << 12, 1 << 40))
    assert len(cut) > 8 and all(len(piece) == 1 for piece in cut)
    source = TextSource(input, TextRules())
    texts = [(item.id, item.text) for (part,) in cut for item in source.read(part)]
    assert texts == [(item.id, item.text) for item in source.read(files[0].part)] and len(texts) == 1200
    assert list(making.pieces_of(flow, input, files, 1 << 12)) == [[files[0].part]], "without a limit, as batch inference does"


def test_parts_of_files_that_are_not_compressed_have_the_identity_of_earlier_versions():
    """Otherwise, the work of an earlier version would be repeated."""
    part = FilePart("a.jsonl", 10, 7, 2, 9, 3)
    assert part.identity == ["a.jsonl", 10, 7, 2, 9, 3]
    assert FilePart("a.jsonl", 10, 7, etag="e").identity == ["a.jsonl", 10, 7, 0, None, 1, "e"]
    assert part.fields == {"path": "a.jsonl", "bytes": 10, "modified": 7, "start": 2, "stop": 9, "first": 3}
