"""Tests hostile input files of `prepare`: they take bounded memory, and are left out with a reason. Nothing outside the input is
read."""

import csv
import gzip
import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.apps.search import build
from heliostat.apps.search.table import read_record
from heliostat.curation import making, readers, segment
from heliostat.curation.images import pictures
from heliostat.curation.images import sources as image_sources
from heliostat.curation.images.sources import ImageColumns, ImageLimits
from heliostat.curation.text import sources
from heliostat.curation.text import tasks as text_tasks
from heliostat.curation.text.documents import Document, Dropped, TextRules
from heliostat.data import manifest
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location
from heliostat.text import printable

from tests.unit import bounded
from tests.unit.build_images import image

MIB = 1 << 20


def sparse(size: int) -> bytes:
    """Writes a tar of a kilobyte or two, whose single member claims to be an image of so many bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, body in (("a.txt", b"caption"), ("a.png", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            if not body:
                info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(size)}
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def repeated(value: bytes, rows: int, column: str) -> bytes:
    """Writes a small Parquet file that has one large value in many rows."""
    sink = io.BytesIO()
    values = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value], pa.large_binary()))
    table = pa.table({column: values.cast(pa.dictionary(pa.int32(), pa.large_string())) if column == "text" else values})
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


BOMBS = {
    "a.txt.gz": lambda: gzip.compress(b"a" * (64 * MIB), 1) * 40,
    "a.jsonl.zst": lambda: pa.compress(b"a" * (64 * MIB), codec="zstd", asbytes=True) * 40,
    "b.jsonl.gz": lambda: gzip.compress(b'{"text": "x"}\n' * MIB, 1) * 40,
    "a.parquet": lambda: repeated(b"a" * (4 * MIB), 1000, "text"),
    "b.parquet.gz": lambda: gzip.compress(b"a" * (64 * MIB), 1) * 40,
    "image.parquet": lambda: repeated(b"a" * (8 * MIB), 500, "image"),
    "a.tar": lambda: sparse(2 << 30),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_bounded_memory_and_is_left_out(tmp_path, name):
    """The small file holds gigabytes. A process with 400 MiB of extra memory survives it, and reports `too_large`."""
    (tmp_path / name).write_bytes(BOMBS[name]())
    assert (tmp_path / name).stat().st_size < 16 * MIB
    limit = (2 if name == "b.jsonl.gz" else 72) * MIB
    done = bounded.read(tmp_path, name, limit)
    assert (done.code, done.out) == (0, "too_large"), done.err[-2000:]


def test_a_file_is_read_as_far_as_the_limit(tmp_path):
    """A sparse file of a terabyte costs nothing. A file of exactly the limit is read."""
    with (tmp_path / "huge.txt").open("wb") as f:
        f.truncate(1 << 40)
    (tmp_path / "fits.txt").write_bytes(b"a" * 1000)
    rules = TextRules(max_file_bytes=1000)
    found = [d for name in ("huge.txt", "fits.txt") for d in text_tasks.read_file(Location(str(tmp_path)), name, rules)]
    assert [getattr(d, "reason", "kept") for d in found] == ["too_large", "kept"]


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
@pytest.mark.parametrize("limit", [40, 41, 5000, 1 << 20])
def test_a_line_that_is_too_long_is_left_out_and_the_lines_about_it_are_kept(codec, limit):
    """This holds for any length up to the file's limit, and line numbers continue."""
    lines = [json.dumps({"text": "x" * n}).encode() for n in (10, limit - 12, limit - 11, 3 * limit + 7, 5)]
    assert [len(line) for line in lines[1:3]] == [limit, limit + 1]
    data = b"\n".join(lines)
    data = gzip.compress(data) if codec == ".gz" else pa.compress(data, codec="zstd", asbytes=True) if codec else data
    found = list(readers.read(f"a.jsonl{codec}", io.BytesIO(data), TextRules(max_document_bytes=limit + 1)))
    assert [(d.id, d.reason if isinstance(d, Dropped) else len(d.text)) for d in found] == [
        (f"a.jsonl{codec}#1", 10), (f"a.jsonl{codec}#2", limit - 12), (f"a.jsonl{codec}#3", limit - 11),
        (f"a.jsonl{codec}#4", "too_large"), (f"a.jsonl{codec}#5", 5)]  # fmt: skip


def test_what_comes_before_the_limit_of_a_file_is_kept():
    data = gzip.compress(b"".join(json.dumps({"text": f"{i}"}).encode() + b"\n" for i in range(1000)))
    found = list(readers.read("a.jsonl.gz", io.BytesIO(data), TextRules(max_file_bytes=5000)))
    assert all(isinstance(d, Document) for d in found[:-1]) and len(found) > 300
    assert found[-1] == Dropped("a.jsonl.gz", "too_large", "more than 5,000 bytes, unpacked")


# leaving the input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """Writes the input folder `in`, and a secret next to it."""
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.txt").write_text("the secret")
    (tmp_path / "secret/key.png").write_bytes(image(9, 9))
    return tmp_path / "in"


def test_a_link_that_leads_out_of_a_text_input_is_left_out(beside):
    """A link to a file, to a folder, or through another link is left out; links that stay inside are followed."""
    (beside / "good.txt").write_text("good")
    (beside / "file.txt").symlink_to(beside.parent / "secret/key.txt")
    (beside / "folder").symlink_to("../secret")
    (beside / "sub/inner.txt").symlink_to("../good.txt")
    listed = [f.path for f in sources.listing(str(beside))]
    found = {
        d.id: getattr(d, "reason", "kept") for p in listed for d in text_tasks.read_file(Location(str(beside)), p, TextRules())
    }
    assert found == {"good.txt": "kept", "sub/inner.txt": "kept", "file.txt": "outside", "folder/key.txt": "outside"}
    through = beside.parent / "alias"
    through.symlink_to(beside)
    assert sources.inside(Location(str(through)), "good.txt"), "an input may itself be named by a link"


@pytest.mark.parametrize(
    "name", ["../secret/key.png", "PARENT/secret/key.png", "sub/../../secret/key.png", "link.png", "a\0.png"]
)
def test_a_file_name_that_leads_out_of_an_image_input_is_left_out(beside, name):
    """By `..`, as an absolute path, or through a link: the image outside the input is never read."""
    (beside / "sub/link.png").symlink_to("../../secret/key.png")
    (beside / "sub/good.png").write_bytes(image(9, 9, 1))
    rows = [{"file_name": name.replace("PARENT", str(beside.parent)), "caption": "x"}, {"file_name": "good.png", "caption": "y"}]
    (beside / "sub/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = image_sources.listing(str(beside))
    found = [
        r
        for t in image_sources.tasks(str(beside), files, ImageColumns())
        for r in image_sources.read(str(beside), t, ImageColumns())
    ]
    assert [getattr(r, "reason", "kept") for r in found] == ["outside", "kept"]


def test_a_metadata_file_that_is_a_link_out_of_the_input_is_one_error(beside):
    (beside.parent / "secret/rows").write_text('{"file_name": "a.png"}')
    (beside / "metadata.jsonl").symlink_to("../secret/rows")
    with pytest.raises(ConfigError, match=r"input: metadata.jsonl: can't read this file: a link, .* that leads out"):
        list(image_sources.tasks(str(beside), image_sources.listing(str(beside)), ImageColumns()))


@pytest.mark.parametrize("path", ["../x.parquet", "/etc/x.parquet", "a/../../x", "a//b", "./a", "a\\..\\..\\b", "", "a\nb", ".."])
@pytest.mark.parametrize("where", ["path", "files", "parts", "also", "ends", "funnel"])
def test_a_manifest_that_names_a_place_outside_its_dataset_is_refused(tmp_path, path, where):
    """The digest is valid. For each place that names files, nothing outside is read or removed."""
    row = {"path": path if where == "path" else "shards/0.parquet", "row_group": 0, "rows": 1, "tokens": 0, "bytes": 1,
           "file_bytes": 1, "footer": "ab" * 16}  # fmt: skip
    named = {"path": {}, "files": {"files": {"tokenizer.json": path}}, "parts": {"parts": {path: 1}}, "also": {"also": [path]},
             "ends": {"curation": {"ends": [["0", path]]}}, "funnel": {"curation": {"funnel": path}}}  # fmt: skip
    meta = {"kind": "rows", **named[where]}
    manifest.write(Location(str(tmp_path)), [row], meta)
    with pytest.raises(DataError, match=r"manifest\.parquet: lists .*, a path outside the dataset\. Don't use"):
        manifest.read(Location(str(tmp_path)))


def test_indexing_a_dataset_writes_no_file_outside_the_index(tmp_path):
    """The record of a dataset's documents is copied to the index, and never over a file of the person who builds it."""
    home, made = tmp_path / "home", tmp_path / "home/data/set"
    made.mkdir(parents=True)
    (home / ".bashrc").write_text("mine")
    (tmp_path / ".bashrc").write_text("foreign")
    place = Location(str(home / "work/index"))
    version = manifest.Manifest(
        Location(str(made)), manifest.SCHEMA.empty_table(), {"curation": {"ends": [["0", "../../.bashrc"]]}}
    )
    with pytest.raises(DataError, match=r"'\.\./\.\./\.bashrc' is outside this folder"):
        build._ends(version, place)
    assert (home / ".bashrc").read_text() == "mine"


@pytest.mark.parametrize("change", [{"ends": [["0", "../../.bashrc"]]}, {"replaced": {"/etc/passwd": 1.0}}, {"ends": [["0"]]}])
def test_an_index_whose_record_names_a_place_outside_is_refused(tmp_path, change):
    record = dict.fromkeys(("dataset", "embedder", "settings", "documents", "passages")) | {
        "dataset": {},
        "version": 1,
        "ends": [],
    }
    (tmp_path / "index.json").write_text(json.dumps(record))
    read_record(Location(str(tmp_path)))
    (tmp_path / "index.json").write_text(json.dumps(record | change))
    found = r"\((ends\.0|replaced\./etc/passwd)\b.*\)"
    with pytest.raises(DataError, match=rf"index\.json: isn't a valid record of an index {found}\. Run `heliostat search index`"):
        read_record(Location(str(tmp_path)))


# what is said --------------------------------------------------------------------------------------------------------


def test_what_was_left_out_is_listed_with_the_reason(tmp_path):
    """For text and for images: id, reason, and detail."""
    work = Location(str(tmp_path / "work"))
    spilled = segment.Spiller(work, 1 << 20)
    spilled.leave_out("b", segment.READ, "too_large", "big")
    spilled.leave_out("a", segment.READ, "empty", "")
    record = spilled.record({})
    assert record["reasons"] == {"empty": 1, "too_large": 1} and record["examples"] == {"empty": ["a"], "too_large": ["b"]}
    made = text_tasks.list_left_out(work, 0, 1, str(tmp_path / "out"), record["left_out"])
    assert pq.read_table(tmp_path / "out" / made["listed"]).to_pylist() == [
        {"id": "a", "reason": "empty", "detail": ""}, {"id": "b", "reason": "too_large", "detail": "big"}]  # fmt: skip


def test_names_of_files_reach_the_terminal_escaped(tmp_path, caplog):
    """Escape sequences, line breaks, and characters that reverse the writing direction are shown as text."""
    evil = "a\x1b]0;owned\x07\n\r\u202egpj.txt\x9b2J"
    with caplog.at_level(logging.WARNING):
        making.log_dropped(Counter(empty=1), {"empty": [evil]}, {}, [])
    assert printable(evil) == r"a\x1b]0;owned\x07\n\r\u202egpj.txt\x9b2J" and printable(evil) in caplog.messages[0]
    (tmp_path / evil).write_text("{")
    with pytest.raises(ConfigError) as e:
        list(sources.rows(Location(str(tmp_path)), evil, 1 << 20))
    assert printable(str(e.value)) == str(e.value)
    assert printable("caf\xe9 \u0645\u0631\u062d\u0628\u0627 \U0001f600") == "caf\xe9 \u0645\u0631\u062d\u0628\u0627 \U0001f600"


@pytest.mark.parametrize("line", ["3", "[]", '"x"', "null", "[" * 200_000])
def test_a_metadata_line_that_is_no_object_is_one_error(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=r"input: metadata\.jsonl: "):
        list(image_sources.tasks(str(tmp_path), image_sources.listing(str(tmp_path)), ImageColumns()))


def test_a_csv_field_without_end_is_one_error(tmp_path):
    """This also holds after documents were read from .csv, whose fields may be longer."""
    csv.field_size_limit(1 << 30)
    (tmp_path / "metadata.csv").write_text('file_name,caption\n"' + "x" * 200_000)
    with pytest.raises(ConfigError, match=r"input: metadata\.csv: can't read this file"):
        list(image_sources.tasks(str(tmp_path), image_sources.listing(str(tmp_path)), ImageColumns()))


def test_a_caption_that_is_no_text_is_no_caption(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": 7}')
    (tmp_path / "a.png").write_bytes(image(9, 9))
    (task,) = image_sources.tasks(str(tmp_path), image_sources.listing(str(tmp_path)), ImageColumns())
    (raw,) = image_sources.read(str(tmp_path), task, ImageColumns())
    assert pictures.prepare(raw, pictures.ImageRules(((8, 8),))).reason == "no_caption"


def test_an_image_of_more_bytes_than_allowed_is_left_out_wherever_it_lies(tmp_path):
    big = image(9, 9)
    pq.write_table(pa.table({"image": [big], "caption": ["x"]}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(big)
        tar.addfile(info, io.BytesIO(big))
    for name in ("a.parquet", "b.tar"):
        task = {"kind": "archives", "parts": [{"path": name, "bytes": 0, "modified": 0}]}
        for limit, expected in ((len(big), "kept"), (len(big) - 1, "too_large")):
            (found,) = image_sources.read(str(tmp_path), task, ImageColumns(), ImageLimits(1 << 20, limit))
            assert getattr(found, "reason", "kept") == expected


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names that are not UTF-8")
def test_a_name_that_is_not_utf8_is_one_error(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt")).write_text("x")
    with pytest.raises(ConfigError, match=r"input: .*: a file name isn't UTF-8 .*Rename the file"):
        sources.listing(str(tmp_path))
