"""Tests an index of a curated dataset on Ray, with the index on S3: from an answer's source to the shard and the record of its
making.

Also tests a killed driver, and a document that must be removed.
"""

import json
import os
import signal

import pytest
from heliostat.curation.prepare import prepare
from heliostat.data import manifest
from heliostat.inference.batch.run import WORK
from heliostat.storage.locations import Location

from tests import stores
from tests.integration import commands
from tests.integration.answers import ask
from tests.integration.pipelines import write_pipeline
from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model

pytestmark = pytest.mark.timeout(400)
TOPICS = ("astrolabe", "barometer", "chronograph", "dynamometer", "eudiometer", "fluxgate", "gyroscope", "hydrometer")


def text(number: int) -> str:
    topic = TOPICS[number % len(TOPICS)]
    return "".join(f"Line {i} tells how the {topic} number {number} was built.\n" for i in range(60))


@pytest.fixture(scope="module")
def dataset(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    (folder / "in").mkdir()
    rows = [{"text": text(i), "url": f"https://example.org/{i}"} for i in range(64)]
    (folder / "in" / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(write_pipeline(folder, output=str(folder / "data"), tokenizer={"vocab_size": 512}, chunk_tokens=1024,
                           shard_bytes=50_000, columns=["url"], stages=[{"stage": "length", "min_words": 10}]), [])  # fmt: skip
    return folder / "data"


def test_from_an_answers_source_to_its_shard_and_record_and_without_it_once_it_is_forgotten(
    dataset, s3_server, tracking, tmp_path, capsys
):
    """`ask` gives the same id, shard, and row group as `trace`. After `forget` and an update, the index has all other
    documents."""
    out = f"s3://retrieval/tools?{stores.bucket(s3_server, 'retrieval')}"
    made = ask(capsys, "search", "index", str(dataset), "--out", out, "--chunk-tokens", "128", "--overlap", "16")
    assert (made["documents"], made["added"], made["deleted"]) == (64, 64, 0) and made["passages"] > 128
    assert ask(capsys, "search", "index", str(dataset), "--out", out, "--chunk-tokens", "128", "--overlap", "16")["new"] == 0

    asked = ("Who built gyroscope number 38?", "--mode", "bm25")
    best = ask(capsys, "search", "ask", out, *asked)["passages"][0]
    assert best["columns"] == {"url": "https://example.org/38"} and text(38)[best["begin"] : best["end"]] == best["text"]
    told = ask(capsys, "data", "trace", str(dataset), "--id", best["document"], "--mlflow", tracking)["documents"][0]
    assert told["columns"] == best["columns"] and told["read"]["line"] == 39
    assert told["shard"]["path"] == best["shard"] and told["shard"]["pieces"][0]["row_group"] == best["row_group"]

    without = str(tmp_path / "without")
    ask(capsys, "data", "forget", str(dataset), "--id", best["document"], "--out", without, "--mlflow", tracking)
    after = ask(capsys, "search", "index", without, "--out", out, "--chunk-tokens", "128", "--overlap", "16")
    assert (after["added"], after["deleted"], after["kept"]) == (0, 1, 63)
    assert after["new"] < len(set(manifest.read(Location(without)).paths))
    found = ask(capsys, "search", "ask", out, *asked, "--top", "50")["passages"]
    assert found and best["document"] not in {passage["document"] for passage in found}
    assert {passage["shard"] for passage in found} <= set(manifest.read(Location(without)).paths)


@pytest.mark.slow  # a Ray of its own for each driver
def test_a_driver_that_is_killed_goes_on_and_answers_by_meaning(dataset, tmp_path, monkeypatch, capsys):
    """SIGKILL arrives after its first units, with the embedder. Finished work isn't repeated, and each passage appears once."""
    model, out = write_model(tmp_path, BASE["model"], 64), tmp_path / "index"
    words = ["search", "index", str(dataset), "--out", str(out), "--embedder", str(model), "--chunk-tokens", "128"]
    words += ["--workers", "1"]
    driver = commands.start(*words, log=tmp_path / "driver.log", RAY_ADDRESS="")
    try:
        driver.until(lambda: list((out / WORK).glob("done/passages/*.json")), "unit", 120)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(60)
    assert not (out / "index.json").exists()
    made = ask(capsys, *words)
    units = len(list((out / WORK).glob("done/passages/*.json")))
    assert made["new"] < units and made["unembedded"] == 0
    found = ask(capsys, "search", "ask", str(out), "the fluxgate", "--mode", "hybrid", "--top", "500")["passages"]
    places = [(passage["document"], passage["number"]) for passage in found]
    assert len(places) == len(set(places)) and "fluxgate" in found[0]["text"]
