"""Tests that a provider's notice, read from a metadata service over HTTP, drains only the Ray node that it is for."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from heliostat.chaos.nodes import LocalNodes
from heliostat.cluster import spot

from tests.unit.build_peer import peer

LEAVING = """
import json, ray
ray.init(log_to_driver=False)
from ray._private.state import state
leaving = state.get_draining_nodes()  # one without work is gone at once
print(json.dumps(sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] in leaving or not n["Alive"])))
"""

AROUND = """
import json, ray
from heliostat.cluster.nodes import except_on
ray.init(log_to_driver=False)
nodes = {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes()}
lost = nodes["127.0.0.2"]
where = ray.remote(lambda: ray.get_runtime_context().get_node_id()).options(label_selector=except_on({lost}, {}))
ran = set(ray.get([where.remote() for _ in range(6)], timeout=150))
print(json.dumps([ran == {nodes["127.0.0.3"]}, except_on(set(nodes.values()), {"a": "b"}), except_on({lost}, {"a": "b"})]))
"""


class Metadata(ThreadingHTTPServer):
    """Answers like EC2 (IMDSv2) and Google Cloud: without a notice, until `announced` is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.announced = threading.Event()
        self.asked = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Metadata

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.server.asked.set()

    def do_PUT(self) -> None:
        valid = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self.answer(200, "t0ken") if valid else self.answer(400)

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "t0ken":
                self.answer(401)
            elif self.server.announced.is_set():
                at = datetime.now(UTC) + timedelta(seconds=60)
                self.answer(200, json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}))
            else:
                self.answer(404)
        elif self.path == "/computeMetadata/v1/instance/preempted":
            right = self.headers.get("Metadata-Flavor") == "Google"
            self.answer(200, "TRUE" if self.server.announced.is_set() else "FALSE") if right else self.answer(403)
        else:
            self.answer(404)


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNodes]:
    with LocalNodes(tmp_path_factory.mktemp("nodes"), 2, cpus=1) as started:
        yield started


def told(nodes: LocalNodes, program: str) -> list[Any]:
    out = subprocess.run([sys.executable, "-c", program], env={**os.environ, **nodes.environment}, capture_output=True, text=True,
                         timeout=200, check=True)  # fmt: skip
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.ci
def test_data_is_read_on_other_nodes_than_a_lost_one_that_ray_takes_for_living(nodes: LocalNodes):
    """If others with the labels exist. Otherwise the run waits for the lost node, which may return."""
    assert told(nodes, AROUND) == [True, {"a": "b"}, {"a": "b"}]


@pytest.mark.ci
@pytest.mark.parametrize(("cloud", "address"), [("aws", "127.0.0.2"), ("gcp", "127.0.0.3")])
def test_a_spot_notice_drains_the_node_and_no_other(
    cloud: str, address: str, nodes: LocalNodes, metadata: Metadata, tmp_path: Path
):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "heliostat.cluster.spot", cloud, "--url", metadata.url, "--node-ip", address]
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, **nodes.environment}, stderr=out)
    try:
        assert metadata.asked.wait(60), log.read_text()
        time.sleep(0.5)
        assert process.poll() is None, log.read_text()  # no notice, no drain
        metadata.announced.set()
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "is draining" in log.read_text()
    assert told(nodes, LEAVING) == ["127.0.0.2", "127.0.0.3"][: 1 if cloud == "aws" else 2]  # one after the other


def test_an_answer_that_is_none_does_not_end_the_watch():
    """It counts as no answer, is logged once, and is requested again."""
    with peer(b"nonsense\r\n\r\n") as url, pytest.raises(OSError, match="BadStatusLine"):
        spot.get(f"{url}/x")
