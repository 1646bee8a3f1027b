"""Tests `prepare` on real Ray, real files, and a real S3 server: the dataset is the same to the last bit everywhere."""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from heliostat.chaos.proxy import FaultProxy, ProxyFault
from heliostat.curation import pieces
from heliostat.curation.prepare import prepare
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.errors import DataError, HeliostatError, StorageError
from heliostat.storage.locations import Location

from tests import stores
from tests.integration.pipelines import write_pipeline
from tests.unit.build_compressed import write_compressed

pytestmark = pytest.mark.usefixtures("ray_session")

KNOWN = "ca0b386cbf201abe334e36850b534372f982f71ccd6888580a66a6db9651c1c0"
WORDS = [f"{a}{b}" for a in ("lo", "mi", "ra", "to", "ve", "né") for b in ("sun", "ray", "mir", "lux", "ron")]
KEYS = {"name": "golden", "tokenizer": {"vocab_size": 500, "train_bytes": 60_000}, "chunk_tokens": 3000, "shard_bytes": 40_000}


def text(i: int) -> str:
    digest = hashlib.sha256(b"%d" % i).digest() * 8
    return f"document {i}\n" + " ".join(WORDS[b % len(WORDS)] for b in digest[: 20 + 2 * (i % 100)])


def make_input(folder: Path) -> list[tuple[str, str]]:
    """Writes files of all kinds with exact duplicates and bad records; returns (id, text) of every good document."""
    folder.mkdir()
    found = []
    lines = []
    for i in range(400):
        lines.append(json.dumps({"text": text(i % 350)}))
        found.append((f"a.jsonl#{len(lines)}", text(i % 350)))
        if i % 50 == 7:
            lines += ["", '{"text": 1}', "{broken", '{"text": " "}', json.dumps({"text": "a\0b"})]
    (folder / "a.jsonl").write_text("\n".join(lines))
    table = pa.table({"text": [text(i) for i in range(300, 700)], "n": range(400)})
    pq.write_table(table, folder / "b.parquet", row_group_size=70)
    found += [(f"b.parquet#{i + 1}", value) for i, value in enumerate(table["text"].to_pylist())]
    for i in range(690, 760):
        (folder / f"{i}.txt").write_text(text(i))
        found.append((f"{i}.txt", text(i)))
    (folder / "long.md").write_text("".join(text(i) for i in range(900, 980)))
    found.append(("long.md", (folder / "long.md").read_text()))
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "cut.parquet").write_bytes((folder / "b.parquet").read_bytes()[:-9])
    return found


def expected(found: list[tuple[str, str]]) -> dict[str, bytes]:
    """Computes the shards by the definition, in memory: of equal texts the smallest id, sorted by hash, split by the hash's
    share."""
    size = sum(len(value.encode()) for _, value in found)
    by_hash: dict[str, tuple[str, str]] = {}
    for id, value in sorted(found):
        by_hash.setdefault(hashlib.sha256(value.encode()).hexdigest(), (id, value))
    rows = [(digest, *by_hash[digest]) for digest in sorted(by_hash)]
    last, taken = "", 0  # the prefix of hashes at which all texts, duplicates too, are as many bytes as train the tokenizer
    for prefix, value in sorted((hashlib.sha256(value.encode()).hexdigest()[:4], value) for _, value in found):
        taken += len(value.encode())
        if taken >= 60_000:
            last = prefix
            break
    sample, taken = [], 0
    for digest, _, value in rows:
        if digest[:4] > last:
            break
        sample.append(value)
        taken += len(value.encode())
        if taken >= 60_000:
            break
    tokenizer = tokens.load(tokens.train(sample, 500, "<|endoftext|>"))
    count, shards = round(size / 40_000), dict[int, list]()
    for row in rows:
        shards.setdefault(int(row[0][:13], 16) * count >> 52, []).append(row)
    made = {}
    for number, members in shards.items():
        encoded = tokens.encode(tokenizer, [value for _, _, value in members], 0)
        places = np.array([manifest.place(digest) for digest, _, _ in members], np.int64)
        data = tokens.shard([id for _, id, _ in members], encoded, 3000, places)
        made[f"shards/{number:05d}/{hashlib.sha256(data).hexdigest()[:16]}.parquet"] = data
    return made


def test_a_dataset_without_stages_is_bitwise_what_it_always_was_and_is_not_made_twice(tmp_path):
    """By the definition, for any split of the work. A rerun, with force and from another place, gives the same bits."""
    found = make_input(tmp_path / "in")
    yaml = write_pipeline(tmp_path, **KEYS)
    report = prepare(yaml, [])
    assert report["dropped"] == {"binary": 8, "corrupt": 1, "empty": 8, "invalid_json": 8, "no_text": 8, "not_utf8": 1}
    made, shards = manifest.read(Location(str(tmp_path / "out"))), expected(found)
    assert sorted(set(made.paths)) == sorted(shards) and len(shards) > 5
    assert all((tmp_path / "out" / path).read_bytes() == data for path, data in shards.items())
    assert report["duplicates"] == len(found) - len({value for _, value in found}) == 110
    listed = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert len(listed) == 34 and listed == sorted(listed, key=lambda row: (row["reason"], row["id"]))
    if pa.__version__.startswith("25.0.") and sys.platform == "linux":  # the digest names Arrow's version, as its files do
        assert report["digest"] == KNOWN
    assert made.meta["bytes"] == sum(len(t.encode()) for t in {value for _, value in found}) and made.tokens == report["tokens"]
    assert 3 < made.meta["unigram_entropy"] < 7 and 300 < made.meta["vocab_size"] <= 500

    assert prepare(yaml, [])["up_to_date"]
    forced = prepare(yaml, [], force=True)
    (tmp_path / "in").rename(tmp_path / "moved")
    for file in (tmp_path / "moved").glob("*.txt"):
        os.utime(file, (1, 1))
    moved = prepare(yaml, [f"input={tmp_path}/moved", f"output={tmp_path}/other"])
    assert [(r["up_to_date"], r["digest"]) for r in (forced, moved)] == [(False, report["digest"])] * 2


def test_changed_input_config_and_lost_shard(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.txt").write_text(text(i))
    yaml, output = write_pipeline(tmp_path, **KEYS), Location(str(tmp_path / "out"))
    first = prepare(yaml, [])
    (tmp_path / "in" / "3.txt").write_text(text(3).upper())  # as many bytes
    second = prepare(yaml, [])
    assert not second["up_to_date"] and second["digest"] != first["digest"]
    third = prepare(yaml, ["shard_bytes=1000000", "keep_days=0"])
    (path,) = set(manifest.read(output).chunks["path"].to_pylist())
    whole = output.join(path).read()
    assert third["shards"] == 1 and output.join("shards").files() == [(path.removeprefix("shards/"), len(whole))]
    output.join(path).write(b"cut")
    assert prepare(yaml, ["shard_bytes=1000000"])["digest"] == third["digest"] and output.join(path).read() == whole
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_bytes(output.join("tokenizer.json").read())
    again = prepare(
        write_pipeline(tmp_path, **{**KEYS, "tokenizer": {"path": str(tmp_path / "hf")}}), [f"output={tmp_path}/other"]
    )
    assert again["tokens"] == third["tokens"] and again["digest"] != third["digest"]
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == output.join("tokenizer.json").read()


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(" ")
    with pytest.raises(HeliostatError, match=r"no document of 1 file remains \(dropped: 1 empty\)"):
        prepare(write_pipeline(tmp_path, **KEYS), [])
    with pytest.raises(DataError):
        manifest.read(Location(str(tmp_path / "out")))


def test_a_folder_on_s3_gives_the_digest_of_the_same_folder_on_disk(tmp_path, s3_server):
    make_input(tmp_path / "in")
    query = stores.bucket(s3_server, "prepare")
    place = Location(f"s3://prepare/in?{query}")
    pafs.copy_files(str(tmp_path / "in"), place.path, destination_filesystem=place.fs)
    here, there = f"s3://prepare/in?{query}", f"s3://prepare/out/x?{query}"
    first = prepare(write_pipeline(tmp_path, **KEYS, input=here, output=there), [])
    assert first["digest"] == prepare(write_pipeline(tmp_path, **KEYS), [])["digest"]
    assert prepare(write_pipeline(tmp_path, **KEYS, input=here, output=there), [])["up_to_date"]
    some = prepare(write_pipeline(tmp_path, **KEYS, input=f"s3://prepare/in/**/7*.txt?{query}", output=there), [])
    assert some["documents"] == 60 and not some["up_to_date"]
    with pytest.raises(StorageError, match=r"output: .*no bucket 'nowhere'"):
        prepare(write_pipeline(tmp_path, **KEYS, output=f"s3://nowhere/x?{query}"), [])


def test_compressed_files_on_s3_are_read_in_parts(tmp_path, s3_server, monkeypatch):
    write_compressed(tmp_path / "in")
    whole = prepare(write_pipeline(tmp_path, **KEYS), [])
    query = stores.bucket(s3_server, "compressed")
    place = Location(f"s3://compressed/in?{query}")
    pafs.copy_files(str(tmp_path / "in"), place.path, destination_filesystem=place.fs)
    monkeypatch.setattr(pieces, "LEAST", 1 << 14)
    monkeypatch.setattr(pieces, "MOST", 1 << 14)
    pipeline = write_pipeline(tmp_path, **KEYS, input=place.uri, output=str(tmp_path / "parts"), keep_work=True)
    assert prepare(pipeline, [])["digest"] == whole["digest"]
    done = tmp_path / "parts.work" / "done"
    assert len(list((done / "survey").iterdir())) > 8 and len(list((done / "read").iterdir())) > 8


@pytest.mark.slow
def test_a_store_that_answers_503_in_bursts_changes_nothing_of_a_dataset(tmp_path, s3_server):
    """Each request of the driver and its tasks passes a proxy, which rejects one of five, and all requests in every third
    second."""
    (tmp_path / "in").mkdir()
    for part in range(4):
        lines = (json.dumps({"text": text(i)}) for i in range(100 * part, 100 * part + 100))
        (tmp_path / "in" / f"{part}.jsonl").write_text("\n".join(lines))
    place = Location(f"s3://bursts/in?{stores.bucket(s3_server, 'bursts')}")
    pafs.copy_files(str(tmp_path / "in"), place.path, destination_filesystem=place.fs)
    over = threading.Event()
    with FaultProxy(s3_server, seed=1) as proxy:
        some = ProxyFault("status", rate=0.2)

        def bursts() -> None:
            while not over.wait(2.0):
                proxy.faults = (ProxyFault("status"),)
                over.wait(1.0)
                proxy.faults = (some,)

        proxy.faults, query = (some,), f"endpoint_override={proxy.endpoint}&scheme=http"
        thread = threading.Thread(target=bursts)
        thread.start()
        try:
            made = prepare(
                write_pipeline(tmp_path, **KEYS, input=f"s3://bursts/in?{query}", output=f"s3://bursts/out?{query}"), []
            )
        finally:
            over.set()
            thread.join()
        assert proxy.injected[some] > 5
    assert made["digest"] == prepare(write_pipeline(tmp_path, **KEYS), [])["digest"]
