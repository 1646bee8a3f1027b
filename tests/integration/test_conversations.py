"""Tests pipelines of conversations and preferences on real Ray, with input and output in an object store."""

import contextlib
import csv
import io
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import reasons
from heliostat.curation.prepare import prepare
from heliostat.data import manifest
from heliostat.data.conversations import FACT
from heliostat.storage.locations import Location

from tests import stores
from tests.integration import commands
from tests.integration.pipelines import write_pipeline
from tests.unit import build_chat_templates as chat
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("ray_session")


def write_input(place: Location, files: int) -> None:
    """Writes 180 conversations as JSON lines in some files, as CSV, and as Parquet. The last 20 of each repeat others."""
    numbers = [*range(40), *range(20)]
    answer = {"role": "assistant", "content": "amber"}
    lines = [json.dumps({"messages": [{"role": "user", "content": f"which word {n}?"}, answer]}) for n in numbers]
    size = -(-len(lines) // files)
    for number in range(files):
        place.join(f"lines/{number}.jsonl").write("\n".join(lines[number * size : (number + 1) * size]).encode())
    text = io.StringIO()
    csv.writer(text).writerows([("prompt", "completion"), *((f"which of {n},\nthe first?", "birch") for n in numbers)])
    place.join("table.csv").write(text.getvalue().encode())
    sink = pa.BufferOutputStream()
    rows = {"instruction": [f"say {n}" for n in numbers], "input": ["first"] * 60, "output": [str(n) for n in numbers]}
    pq.write_table(pa.table(rows), sink, row_group_size=16)
    place.join("table.parquet").write(sink.getvalue().to_pybytes())


def contents(dataset: manifest.Manifest) -> Counter[bytes]:
    """Counts the rows of a dataset by their tokens and masks."""
    rows = [row for path in dict.fromkeys(dataset.paths)
            for row in pq.read_table(io.BytesIO(dataset.location.join(path).read())).to_pylist()]  # fmt: skip
    return Counter(json.dumps([row["tokens"], row["trained"]]).encode() for row in rows)


def test_conversations_from_a_store_become_the_same_packs_and_are_not_made_twice(tmp_path: Path, s3_server: str) -> None:
    model = chat.folder(tmp_path / "model", chat.DEFAULT_SYSTEM)
    uri = f"s3://conversations/{{}}?{stores.bucket(s3_server, 'conversations')}".format
    write_input(Location(uri("in")), 3)
    keys = {"model": str(model), "sequence_length": 256, "stages": [{"stage": "length", "min_words": 2}], "shard_bytes": 2000}
    yaml = write_pipeline(tmp_path, "ConversationPipeline", input=uri("in"), output=uri("out"), **keys)
    report = prepare(yaml, [])
    facts = report["conversations"]
    assert report["documents"] == 120 == facts["counts"]["conversations"] and report["duplicates"] == 60 and report["shards"] > 1
    assert facts["counts"]["trained_ends"] == facts["counts"]["turns"] == 120 and not report["dropped"]
    assert prepare(yaml, [])["up_to_date"]
    made = manifest.read(Location(uri("out")))
    assert made.meta[FACT] == facts and reasons.end_of(made, "table.csv#1")[0]["reason"] == "kept"

    again = prepare(yaml, [f"output={tmp_path}/here", "memory_limit=64MiB"])
    assert again["digest"] == report["digest"]
    Location(uri("in")).delete()
    write_input(Location(uri("in")), 1)  # other ids, but the same conversations
    other = prepare(yaml, [f"output={tmp_path}/other"])
    assert contents(manifest.read(Location(f"{tmp_path}/other"))) == contents(made) and other["documents"] == 120


def test_pairs_from_a_store_become_preferences(tmp_path: Path, s3_server: str) -> None:
    model = chat.folder(tmp_path / "model", chat.DEFAULT_SYSTEM)
    uri = f"s3://pairs/in?{stores.bucket(s3_server, 'pairs')}"
    pairs = [{"prompt": f"which {n % 7}?", "chosen": f"amber {n}", "rejected": "birch"} for n in range(50)]
    Location(uri).join("a.jsonl").write("\n".join(map(json.dumps, pairs)).encode())
    keys = {"input": uri, "model": str(model), "sequence_length": 128}
    report = prepare(write_pipeline(tmp_path, "PreferencePipeline", **keys), [])
    assert report["conversations"]["form"] == "preferences" and report["documents"] == 50 and not report["dropped"]


@pytest.mark.ci
@pytest.mark.parametrize("pipeline", ["ConversationPipeline", "PreferencePipeline"])
def test_killed_in_the_middle_the_same_digest(tmp_path: Path, pipeline: str) -> None:
    """The driver and all its processes are killed after a few tasks. The next run finishes their work."""
    model, place = chat.folder(tmp_path / "model", chat.DEFAULT_SYSTEM), Location(str(tmp_path / "in"))
    if pipeline == "ConversationPipeline":
        write_input(place, 3)
    else:
        pairs = [{"prompt": f"which {n % 7}?", "chosen": f"amber {n}", "rejected": "birch"} for n in range(200)]
        place.join("a.jsonl").write("\n".join(map(json.dumps, pairs)).encode())
    keys = {"input": place.path, "output": str(tmp_path / "out"), "sequence_length": 256, "shard_bytes": 2000}
    yaml, log = write_pipeline(tmp_path, pipeline, model=str(model), **keys), tmp_path / "driver.log"
    command, done = ["data", "prepare", str(yaml), "--json"], tmp_path / "out.work/done"
    run = commands.start(*command, log=log)
    try:
        until(lambda: len(list(done.glob("*/*.json"))) >= 2 or run.poll() is not None, "records")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert run.returncode == -signal.SIGKILL, "it ended by itself"
    report = json.loads(commands.run(*command, log=log, timeout=240).out.splitlines()[-1])
    assert not report["up_to_date"] and prepare(yaml, [f"output={tmp_path}/whole"])["digest"] == report["digest"]
