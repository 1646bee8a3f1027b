"""`prepare` on real Ray, real files and a real S3 server: digests that repeat, broken files, interrupted and repeated runs."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from heliostat.curation import pieces
from heliostat.curation.prepare import prepare
from heliostat.data import manifest
from heliostat.errors import DataError, HeliostatError, StorageError
from heliostat.storage.locations import Location
from tokenizers import Tokenizer

pytestmark = pytest.mark.usefixtures("ray_session")

TEXTS = [f"document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(60)) for i in range(60)]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def make_input(folder: Path) -> None:
    """Ten documents of every kind, one duplicate, and one broken file of every kind."""
    (folder / "sub").mkdir(parents=True)
    for i in range(0, 10):
        (folder / f"{i}.txt").write_text(TEXTS[i])
    for i in range(10, 20):
        (folder / "sub" / f"{i}.md.gz").write_bytes(gzip.compress(TEXTS[i].encode(), mtime=0))
    for i in range(20, 30):
        (folder / f"{i}.py.zst").write_bytes(zstd(TEXTS[i].encode()))
    lines = b"\n".join(json.dumps({"text": t}).encode() for t in TEXTS[30:40])
    (folder / "a.jsonl").write_bytes(lines + b'\n{"text": \n{"other": 1}\n')
    pq.write_table(pa.table({"text": TEXTS[40:50], "n": range(10)}), folder / "b.parquet", row_group_size=3)
    for i in range(50, 60):
        (folder / f"{i}.rst").write_text(TEXTS[i])
    (folder / "z.txt").write_text(TEXTS[45])  # also b.parquet#6
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "zero.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(999))[:-9])
    (folder / "cut.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-9])
    (folder / "cut.txt.zst").write_bytes(zstd(os.urandom(999))[:-9])
    (folder / "picture.png").write_bytes(b"not for us")


DROPPED = {"binary": 1, "corrupt": 3, "empty": 1, "invalid_json": 1, "no_text": 1, "not_utf8": 1}


def shuffled(items: list, parts: int) -> list[list]:
    """Deals the items out to parts, the last first."""
    return [items[i::parts][::-1] for i in reversed(range(parts))]


def make_yaml(tmp_path: Path, **more: object) -> Path:
    path = tmp_path / "pipeline.yaml"
    config = {
        "name": "test",
        "pipeline": "heliostat.pipelines:TextPipeline",
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "tokenizer": {"vocab_size": 400, "train_bytes": 10_000},
        "chunk_tokens": 1000,
        "shard_bytes": 6000,
    }
    path.write_text(json.dumps(config | more))
    return path


def documents_of(output: Location) -> dict[str, str]:
    """id -> decoded text, straight from the shards."""
    tokenizer = Tokenizer.from_str(output.join("tokenizer.json").read().decode())
    made, found = manifest.read(output), {}
    for path in sorted(set(made.chunks["path"].to_pylist())):
        for row in pq.read_table(pa.BufferReader(output.join(path).read())).to_pylist():
            assert row["tokens"][-1] == made.meta["end_of_document"] and row["document"] not in found
            found[row["document"]] = tokenizer.decode(row["tokens"][:-1], skip_special_tokens=False)
    return found


def test_every_kind_of_file(tmp_path):
    make_input(tmp_path / "in")
    report = prepare(make_yaml(tmp_path), [])
    found = documents_of(Location(str(tmp_path / "out")))
    assert sorted(found.values()) == sorted(TEXTS)
    assert {"0.txt", "sub/10.md.gz", "20.py.zst", "a.jsonl#1", "b.parquet#6", "50.rst"} <= set(found)
    assert "z.txt" not in found, "the smallest id of a duplicate stays"
    assert report["dropped"] == DROPPED and report["duplicates"] == 1 and report["documents"] == 60
    assert report["shards"] > 1 and report["chunks"] > report["shards"] and not report["up_to_date"]
    made = manifest.read(Location(str(tmp_path / "out")))
    assert made.meta["bytes"] == sum(len(t.encode()) for t in TEXTS) and made.tokens == report["tokens"]
    assert 3 < made.meta["unigram_entropy"] < 6 and 300 < made.meta["vocab_size"] <= 400
    json.dumps(report)


def test_same_digest_twice_and_elsewhere(tmp_path):
    make_input(tmp_path / "in")
    yaml = make_yaml(tmp_path)
    first = prepare(yaml, [])
    again = prepare(yaml, [])
    assert again["up_to_date"] and again["digest"] == first["digest"]
    forced = prepare(yaml, [], force=True)
    assert not forced["up_to_date"] and forced["digest"] == first["digest"]
    (tmp_path / "in").rename(tmp_path / "moved")
    for file in (tmp_path / "moved").glob("*.txt"):
        os.utime(file, (1, 1))
    moved = prepare(yaml, [f"input={tmp_path}/moved", f"output={tmp_path}/other"])
    assert not moved["up_to_date"] and moved["digest"] == first["digest"]
    names = [name for name, _ in Location(f"{tmp_path}/out/shards").files()]
    assert len(names) == first["shards"]
    for name in names:
        assert (tmp_path / "out" / "shards" / name).read_bytes() == (tmp_path / "other" / "shards" / name).read_bytes()


def test_digest_does_not_depend_on_how_the_work_is_cut(tmp_path, monkeypatch):
    make_input(tmp_path / "in")
    yaml = make_yaml(tmp_path, tokenizer={"vocab_size": 300, "train_bytes": 5000})
    first = prepare(yaml, [])
    monkeypatch.setattr(pieces, "cut", lambda files, *_: (list(part) for part in shuffled(list(files), 9)))
    assert prepare(yaml, [], force=True)["digest"] == first["digest"]


def test_changed_input_config_and_lost_shard(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.txt").write_text(TEXTS[i])
    yaml, output = make_yaml(tmp_path), Location(str(tmp_path / "out"))
    first = prepare(yaml, [])
    (tmp_path / "in" / "3.txt").write_text(TEXTS[3].upper())  # as many bytes
    second = prepare(yaml, [])
    assert not second["up_to_date"] and second["digest"] != first["digest"]
    assert TEXTS[3].upper() in documents_of(output).values()
    third = prepare(yaml, ["shard_bytes=1000000", "keep_days=0"])
    (path,) = set(manifest.read(output).chunks["path"].to_pylist())
    assert third["shards"] == 1 and output.join("shards").files() == [
        (path.removeprefix("shards/"), len(output.join(path).read()))
    ]
    output.join(path).write(b"cut")
    assert prepare(yaml, ["shard_bytes=1000000"])["digest"] == third["digest"]
    assert len(documents_of(output)) == 20


def test_an_interrupted_run_leaves_the_dataset_that_was_there(tmp_path, monkeypatch):
    """A file lies where a shard's folder has to go, so one upload fails for real after others have succeeded or not."""
    code = (
        "from heliostat.curation.prepare import place\nfrom heliostat.curation import TextPipeline\n\n"
        "class Obstructed(TextPipeline):\n    def write(self, output, inputs):\n"
        "        from pathlib import Path\n"
        "        Path(output.join('shards', '00030').path).touch()\n"
        "        return super().write(output, inputs)\n"
    )
    (tmp_path / "obstructed.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    make_input(tmp_path / "in")
    yaml, output = make_yaml(tmp_path), Location(str(tmp_path / "out"))
    digest, before = prepare(yaml, [])["digest"], output.join("shards").files()
    with pytest.raises(HeliostatError, match="a file lies where a folder is needed") as e:
        prepare(yaml, ["pipeline=obstructed:Obstructed", "shard_bytes=500"])
    assert not isinstance(e.value, DataError)
    assert output.join("shards").files() == sorted([*before, ("00030", 0)])
    assert manifest.read(output).digest == digest and sorted(documents_of(output).values()) == sorted(TEXTS)
    assert prepare(yaml, [])["up_to_date"]


def test_existing_tokenizer_gives_the_same_tokens(tmp_path):
    make_input(tmp_path / "in")
    first = prepare(make_yaml(tmp_path), [])
    (tmp_path / "hf").mkdir()
    (tmp_path / "out" / "tokenizer.json").rename(tmp_path / "hf" / "tokenizer.json")
    second = prepare(make_yaml(tmp_path, tokenizer={"path": str(tmp_path / "hf")}), [f"output={tmp_path}/other"])
    assert second["tokens"] == first["tokens"] and second["digest"] != first["digest"]
    assert (tmp_path / "other" / "tokenizer.json").read_text() == (tmp_path / "hf" / "tokenizer.json").read_text()


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(" ")
    with pytest.raises(HeliostatError, match=r"nothing is left of 1 files; dropped: {'empty': 1}"):
        prepare(make_yaml(tmp_path), [])
    with pytest.raises(DataError):
        manifest.read(Location(str(tmp_path / "out")))


def test_s3(tmp_path, s3_server):
    make_input(tmp_path / "in")
    query = f"endpoint_override={s3_server}&scheme=http"
    fs = pafs.S3FileSystem(endpoint_override=s3_server, scheme="http", region="us-east-1", allow_bucket_creation=True)
    fs.create_dir("prepare")
    pafs.copy_files(str(tmp_path / "in"), "prepare/in", destination_filesystem=fs)
    here, there = f"s3://prepare/in?{query}", f"s3://prepare/out/x?{query}"
    first = prepare(make_yaml(tmp_path, input=here, output=there), [])
    assert first["digest"] == prepare(make_yaml(tmp_path), [])["digest"]
    assert prepare(make_yaml(tmp_path, input=here, output=there), [])["up_to_date"]
    assert sorted(documents_of(Location(there)).values()) == sorted(TEXTS)
    some = prepare(make_yaml(tmp_path, input=f"s3://prepare/in/**/*.md.gz?{query}", output=there), [])
    assert some["documents"] == 10 and not some["up_to_date"]
    with pytest.raises(StorageError, match=r"output: .*there is no bucket 'nowhere'"):
        prepare(make_yaml(tmp_path, output=f"s3://nowhere/x?{query}"), [])
