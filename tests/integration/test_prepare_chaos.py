"""`prepare` on two nodes with a document that ends its process, a worker killed, a node lost, and a store that answers 503."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from heliostat.chaos.nodes import LocalNodes
from heliostat.chaos.proxy import FaultProxy, ProxyFault
from heliostat.chaos.servers import s3_server
from heliostat.data import manifest
from heliostat.storage.locations import Location

from tests.benchmarks.broken.rounds import at_work

pytestmark = pytest.mark.slow

LIMIT_S = 540.0
DOCUMENTS, FILES = 6000, 12
AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
POISON = {"3.jsonl#41": "DEADLY", "7.jsonl#300": "DEADLY", "9.jsonl#7": "WRONG"}
# what a parser's bug does: the process of the stage `length` ends at DEADLY, and raises at WRONG
SITE = """
import importlib.abc, importlib.util, os, signal, sys

def judged(judge, document):
    if "DEADLY" in document.text:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "WRONG" in document.text:
        raise ValueError("an index that is out of range")
    return judge(document)

class Breaking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "heliostat.curation.stages.length":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            real = module.Length.open

            def opened(self):
                work = real(self)
                return lambda documents: [judged(lambda d: work([d])[0], d) for d in documents]

            module.Length.open = opened

        spec.loader.exec_module = executed
        return spec

sys.meta_path.insert(0, Breaking())
"""


def make_input(folder: Path) -> set[str]:
    """Writes documents that all differ; returns their ids."""
    folder.mkdir()
    rng, ids = random.Random(0), set[str]()
    for part in range(FILES):
        with (folder / f"{part}.jsonl").open("w") as f:
            for line in range(1, DOCUMENTS // FILES + 1):
                id = f"{part}.jsonl#{line}"
                text = " ".join(f"w{rng.randrange(100_000)}" for _ in range(150 + rng.randrange(150)))
                f.write(json.dumps({"text": f"{text} {POISON.get(id, '')}"}) + "\n")
                ids.add(id)
    return ids


@contextlib.contextmanager
def bursts(proxy: FaultProxy) -> Iterator[None]:
    """Lets the store refuse half of all requests for two seconds, again and again."""
    ended = threading.Event()

    def act() -> None:
        while not ended.wait(6.0):
            proxy.faults = (ProxyFault("status", rate=0.5),)
            ended.wait(2.0)
            proxy.faults = ()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def strike(run: subprocess.Popen[bytes], nodes: LocalNodes) -> dict[str, int]:
    """Kills two workers, and then a node in whose place another joins, each while it is at work."""
    struck, end = Counter[str](), time.monotonic() + LIMIT_S
    while run.poll() is None and time.monotonic() < end:
        busy = [(node, found) for node in nodes.nodes[1:] if (found := at_work([node.process.pid]))]
        if busy and struck["worker"] < 2:
            with contextlib.suppress(psutil.NoSuchProcess):
                busy[0][1][0].kill()
                struck["worker"] += 1
            time.sleep(3.0)
        elif busy and not struck["node"]:
            node = busy[-1][0]
            node.kill()
            nodes.nodes.remove(node)
            nodes.add()
            struck["node"] += 1
        time.sleep(0.02)
    return dict(struck)


def test_no_document_is_lost_or_repeated_but_those_that_crash_which_are_listed(tmp_path, monkeypatch):
    ids = make_input(tmp_path / "in")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    for name, value in {**AWS, "PYTHONPATH": f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "nodes").mkdir()
    with s3_server(tmp_path) as store, FaultProxy(store.endpoint) as proxy, LocalNodes(tmp_path / "nodes", 2, 1) as nodes:
        fs = pafs.S3FileSystem(endpoint_override=store.endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
        fs.create_dir("chaos")
        query = f"endpoint_override={proxy.endpoint}&scheme=http"
        pipeline = {"name": "chaos", "pipeline": "heliostat.pipelines:TextPipeline", "input": str(tmp_path / "in"),
                    "output": f"s3://chaos/out?{query}", "work": f"s3://chaos/work?{query}", "memory_limit": 100_000_000,
                    "stages": [{"stage": "length", "min_words": 10}], "shard_bytes": 50_000_000, "chunk_tokens": 50_000,
                    "tokenizer": {"vocab_size": 400, "train_bytes": 50_000}}  # fmt: skip
        (tmp_path / "pipeline.yaml").write_text(json.dumps(pipeline))
        start = time.monotonic()
        with (tmp_path / "said").open("wb") as said, (tmp_path / "log").open("wb") as log, bursts(proxy):
            command = [sys.executable, "-m", "heliostat", "prepare", str(tmp_path / "pipeline.yaml"), "--json"]
            run = subprocess.Popen(command, stdout=said, stderr=log, env=os.environ | nodes.environment)
            try:
                struck = strike(run, nodes)
            finally:
                run.kill()
                run.wait()
        told = (tmp_path / "log").read_text()
        result = json.loads((tmp_path / "said").read_text().splitlines()[-1])
        assert "error" not in result, (result, told[-3000:])
        output = Location(f"s3://chaos/out?endpoint_override={store.endpoint}&scheme=http")
        made = Counter(id for path in sorted(set(manifest.read(output).paths)) for id in documents(output, path))
        listed = pq.read_table(output.join("quarantine.parquet").open()).to_pylist()
    sys.stdout.write(
        f"{time.monotonic() - start:.0f} s; struck {struck}, 503: {sum(proxy.injected.values())} of {proxy.requests}; {result}"
    )
    assert struck == {"worker": 2, "node": 1} and sum(proxy.injected.values()) > 0
    assert set(made) == ids - POISON.keys() and set(made.values()) == {1}, "none is lost, and none is repeated"
    assert result["dropped"] == {"crashed": 3} and {row["id"]: row["reason"] for row in listed} == dict.fromkeys(
        POISON, "crashed"
    )
    assert {row["detail"] for row in listed if row["id"] == "9.jsonl#7"} == {"ValueError: an index that is out of range"}
    assert told.count("ends its process at 0 length and is left out") == 2


def documents(output: Location, path: str) -> list[str]:
    """Lists the documents of a shard; one that is cut has several rows, one after another."""
    found = pq.read_table(output.join(path).open(), columns=["document"])["document"].to_pylist()
    return [id for i, id in enumerate(found) if not i or found[i - 1] != id]
