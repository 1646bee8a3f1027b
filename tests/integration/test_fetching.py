"""Tests images of a list of URLs, fetched over TLS by a Ray cluster of two nodes, whose driver is killed meanwhile."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from heliostat.chaos.nodes import LocalNodes
from heliostat.curation import reasons
from heliostat.data import manifest
from heliostat.storage.locations import Location

from tests.integration.pipelines import write_pipeline
from tests.unit.build_images import image
from tests.unit.build_tls import NAMED, UNNAMED, Secure, signed
from tests.unit.test_fetching import running

pytestmark = pytest.mark.ci

EACH, A_TASK, LIMIT_S = 60, 20, 240
COMMAND = (f"from heliostat.curation.web import lists; lists.URLS = {A_TASK}; "
           "from heliostat.cli.main import main; main()")  # fmt: skip


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))  # of the nodes, which start later
    with running(Secure(signed(tmp_path))) as made:
        yield made


def prepared(folder: Path, server: Secure, nodes: LocalNodes, killed_after: int = 1 << 30) -> dict:
    """Runs prepare. Kills the command after so many requests to the server, and then returns None."""
    said, log = folder / "said", folder / "log"
    command = [sys.executable, "-c", COMMAND, "data", "prepare", str(folder / "pipeline.yaml"), "--json"]
    end = time.monotonic() + LIMIT_S
    with said.open("w") as out, log.open("w") as errors:
        run = subprocess.Popen(command, stdout=out, stderr=errors, env=os.environ | nodes.environment)
        try:
            while run.poll() is None and time.monotonic() < end and len(server.asked) < killed_after:
                time.sleep(0.02)
        finally:
            run.kill()
            run.wait()
    if len(server.asked) >= killed_after:
        return {}
    assert said.read_text(), log.read_text()[-3000:]
    return json.loads(said.read_text().splitlines()[-1])


def test_a_list_is_fetched_over_tls_on_two_nodes_and_goes_on_where_its_driver_was_killed(tmp_path, server):
    """Requests of finished tasks aren't repeated, robots.txt is followed, and a certificate for other hosts isn't accepted."""
    rows = []
    for host in NAMED:
        for i in range(EACH):
            path = f"/{host}/{i}.png"
            server.pages[path] = image(20, 20, seed=len(rows))
            rows.append({"url": server.url(path, host), "caption": f"image number {i} of {host}"})
    server.pages["/robots.txt"] = b"User-agent: *\nDisallow: /closed/\n"
    rows += [{"url": server.url("/closed/1.png"), "caption": "not for programs"},
             {"url": server.url("/1.png", UNNAMED), "caption": "of a host that the certificate does not name"}]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fetch = {"per_second": 15, "private": True, "retries": 0}
    write_pipeline(tmp_path, "ImagePipeline", resolution=16, stages=[{"stage": "length", "min_chars": 1}],
                   columns={"others": ["url"]}, fetch=fetch)  # fmt: skip
    (tmp_path / "cluster").mkdir()
    with LocalNodes(tmp_path / "cluster", 2, 1) as nodes:
        assert prepared(tmp_path, server, nodes, killed_after=150) == {}
        time.sleep(2)  # tasks of the driver that was killed end with it
        before = len(server.asked)
        assert prepared(tmp_path, server, nodes)["documents"] == len(rows) - 2
    made = manifest.read(Location(str(tmp_path / "out")))
    asked = Counter(path for path, _ in server.asked if path.endswith(".png"))
    assert len(asked) == len(rows) - 2 and "/closed/1.png" not in asked
    twice = sum(asked.values()) - len(asked)
    assert twice <= 2 * A_TASK * 1.5 < before, "no more than the tasks that were at work"
    assert made.meta["dropped"] == {"robots": 2}
    told = {row["detail"] for table in reasons.ends(made) for row in table.to_pylist() if row["reason"] == "robots"}
    assert any("/closed/1.png" in detail for detail in told)
    assert any(UNNAMED in detail and "CERTIFICATE_VERIFY_FAILED" in detail for detail in told), told
