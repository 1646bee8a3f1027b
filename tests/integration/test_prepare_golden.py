"""What a dataset without stages is, to the last bit: the digest of a known input, and the same made by ten lines without Ray."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation.prepare import prepare
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.storage.locations import Location

pytestmark = pytest.mark.usefixtures("ray_session")

KNOWN = "ca0b386cbf201abe334e36850b534372f982f71ccd6888580a66a6db9651c1c0"
WORDS = [f"{a}{b}" for a in ("lo", "mi", "ra", "to", "ve", "né") for b in ("sun", "ray", "mir", "lux", "ron")]


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


def make_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    config = {
        "name": "golden",
        "pipeline": "heliostat.pipelines:TextPipeline",
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "tokenizer": {"vocab_size": 500, "train_bytes": 60_000},
        "chunk_tokens": 3000,
        "shard_bytes": 40_000,
    }
    path.write_text(json.dumps(config))
    return path


def expected(found: list[tuple[str, str]]) -> dict[str, bytes]:
    """Makes the shards by the definition: of equal texts the smallest id, by hash, cut by the hash's share; all in memory."""
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


def test_a_dataset_without_stages_is_bitwise_what_it_always_was(tmp_path):
    found = make_input(tmp_path / "in")
    report = prepare(make_yaml(tmp_path), [])
    assert report["dropped"] == {"binary": 8, "corrupt": 1, "empty": 8, "invalid_json": 8, "no_text": 8, "not_utf8": 1}
    made, shards = manifest.read(Location(str(tmp_path / "out"))), expected(found)
    assert sorted(set(made.paths)) == sorted(shards) and len(shards) > 5
    assert all((tmp_path / "out" / path).read_bytes() == data for path, data in shards.items())
    assert report["duplicates"] == len(found) - len({value for _, value in found}) == 110
    listed = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert len(listed) == 34 and listed == sorted(listed, key=lambda row: (row["reason"], row["id"]))
    if pa.__version__.startswith("25.0.") and sys.platform == "linux":  # the digest names Arrow's version, as its files do
        assert report["digest"] == KNOWN
