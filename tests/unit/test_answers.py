"""Tests that a dataset's answers for its documents, and for a missing document, are the same on disk and on S3."""

import json
from typing import Any

import pytest
from heliostat.curation import forget, reasons
from heliostat.curation.text import trace
from heliostat.data import manifest
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location

from tests.unit.build_curation import spelled
from tests.unit.build_pipeline import Here, make_dataset

DIGESTS: dict[str, str] = {}


def text(number: int) -> str:
    return " ".join(f"word{spelled(number)}x{spelled(i)}" for i in range(60 + number))


def make(place: Location) -> Manifest:
    rows = [{"text": text(i), "url": f"http://h/{i}"} for i in range(12)]
    rows += [{"text": text(3) + " more", "url": "http://h/near"}, {"text": "short", "url": "http://h/short"}]
    place.join("in/a.jsonl").write("".join(json.dumps(row) + "\n" for row in rows).encode())
    keys: dict[str, Any] = {"name": "x", "input": place.join("in").uri, "output": place.join("data").uri}
    stages = [{"stage": "length", "min_words": 10}, {"stage": "minhash"}]
    pipeline = Here(**keys, columns=["url"], stages=stages, tokenizer={"vocab_size": 300}, shard_bytes=2000)
    pipeline.check()
    return make_dataset(pipeline)


def test_a_document_is_traced_and_forgotten_wherever_the_dataset_lies(place):
    made = make(place)
    (near,) = trace.find(made, url="http://h/3")
    told = trace.trace(made, near)
    assert told["notes"] == [] and told["read"] == {"file": "a.jsonl", "line": 4}
    assert [(s["stage"], s["did"]) for s in told["stages"]] == [("read", "kept"), ("0 length", "kept"), ("1 minhash", "dropped")]
    assert told["kept"] == "a.jsonl#13" and told["shard"]["pieces"][0]["tokens"] > 60
    (kept,) = trace.find(made, text=text(5).encode())
    assert trace.trace(made, kept)["kept"] == kept["id"] == "a.jsonl#6"
    output = place.join("less")
    forget.check(made, output)
    target, found = forget.one([kept], "--text")
    less = forget.forget(made, target, found, output)
    assert manifest.read(output).digest == less.digest != made.digest
    assert (less.meta["documents"], made.meta["documents"]) == (11, 12)
    (gone,) = trace.find(less, id="a.jsonl#6")
    assert gone["reason"] == "forgotten" and trace.trace(less, gone)["shard"] is None
    (other,) = trace.find(less, url="http://h/7")
    assert trace.trace(less, other)["shard"]["pieces"]
    assert [
        e for part in reasons.funnel(less).values() for es in part["examples"].values() for e in es if e[1] == "a.jsonl#6"
    ] == []
    for name, digest in (("made", made.digest), ("less", less.digest)):
        assert DIGESTS.setdefault(name, digest) == digest, "the place plays no part"
    with pytest.raises(ConfigError, match="overlap"):
        forget.check(made, place.join("data/x"))
    place.join("other/file").write(b"x")
    with pytest.raises(ConfigError, match="isn't empty"):
        forget.check(made, place.join("other"))
