"""Tests `prepare` with a stage that scores documents on GPUs, on clusters of several Ray nodes: scoring overlaps reading.

A lost node, a killed driver, or a document that ends its process changes nothing in the dataset. Ray counts GPUs that the machine
doesn't have, so the model runs on CPUs.
"""

import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heliostat.chaos.nodes import LocalNodes

from tests.integration.pipelines import write_pipeline
from tests.unit.build_model import make_model

pytestmark = [pytest.mark.ci, pytest.mark.timeout(1500)]

LIMIT_S = 600
FILES, FILE_BYTES = 24, 250_000


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Writes a model, and an input whose documents are words of letters."""
    folder = tmp_path_factory.mktemp("given")
    make_model(folder / "model")
    (folder / "in").mkdir()
    rng = random.Random(0)
    for number in range(FILES):
        lines, size = list[str](), 0
        while size < FILE_BYTES:
            words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randrange(2, 9))) for _ in range(rng.randrange(20, 200)))
            lines.append(json.dumps({"text": " ".join(words)}))
            size += len(lines[-1])
        (folder / "in" / f"{number:02}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def expected(given, tmp_path_factory) -> str:
    """Returns the digest of the dataset that recorded tasks make on a cluster without GPUs."""
    folder = tmp_path_factory.mktemp("expected")
    with LocalNodes(folder, 2, 1) as nodes:
        report, log = prepared(folder / "run", given, nodes)
    assert "hf_classifier: the cluster has no node with a GPU, so these stages run on CPUs" in log
    assert not list((folder / "run/out.work/done").glob("stream/*"))
    return report["digest"]


def prepared(folder: Path, given: Path, nodes: LocalNodes, meanwhile: Callable[[subprocess.Popen[bytes]], bool] | None = None
             ) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Prepares the input; returns the report (empty if the command was killed), and the log. `meanwhile` is called until it
    returns whether it has done its part."""
    folder.mkdir(exist_ok=True)
    score = {"stage": "hf_classifier", "model": str(given / "model"), "label": "good", "max_tokens": 64, "batch": 16}
    stages = [{"stage": "length", "min_words": 25}, {"stage": "fix_text"}, score | {"min_score": 0.2},
              {"stage": "length", "max_words": 180}]  # fmt: skip
    write_pipeline(folder, input=str(given / "in"), stages=stages, memory_limit=64 << 20, chunk_tokens=2000, keep_work=True,
                   shard_bytes=2 << 20, tokenizer={"vocab_size": 300, "train_bytes": 50_000})  # fmt: skip
    end, waits = time.monotonic() + LIMIT_S, meanwhile is not None
    with (folder / "report").open("w") as out, (folder / "log").open("a") as log:
        command = [sys.executable, "-m", "heliostat", "data", "prepare", str(folder / "pipeline.yaml"), "--json"]
        run = subprocess.Popen(command, stdout=out, stderr=log, env=os.environ | nodes.environment, start_new_session=True)
        try:
            while run.poll() is None and time.monotonic() < end:
                waits = waits and meanwhile is not None and not meanwhile(run)
                time.sleep(0.05)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert not waits, (folder / "log").read_text()[-3000:]
    lines = (folder / "report").read_text().splitlines()
    return json.loads(lines[-1]) if lines else {}, (folder / "log").read_text()


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "out.work/done/stream").glob("*.json")}


def spans(folder: Path, kind: str) -> list[list[float]]:
    """Lists the times at which the stream's parts of a kind began and ended, in seconds."""
    return sorted(part["span"] for one in records(folder).values() for part in one["records"] if part["kind"] == kind)


def test_scoring_overlaps_reading_with_the_digest_of_recorded_tasks(given, expected, tmp_path):
    """A second run does nothing again: every task's record is the same."""
    with LocalNodes(tmp_path, 1, 1) as nodes:
        nodes.add(gpus=1)
        report, log = prepared(tmp_path / "run", given, nodes)
        assert report["digest"] == expected and "Running these as recorded tasks" not in log
        reading, scoring = spans(tmp_path / "run", "read"), spans(tmp_path / "run", "stages-2")
        assert len(reading) > 4 and len(scoring) >= len(reading) == len(records(tmp_path / "run"))
        assert scoring[0][0] < reading[-1][1], (reading, scoring)
        assert not [path for path in (tmp_path / "run/out.work/done").iterdir() if path.name in ("read", "stages-2", "stages-3")]
        before = records(tmp_path / "run")
        shutil.rmtree(tmp_path / "run/out")
        again, _ = prepared(tmp_path / "run", given, nodes)
    assert again["digest"] == expected and records(tmp_path / "run") == before


def test_a_node_that_dies_in_the_middle_changes_nothing(given, expected, tmp_path):
    """The node has one of the two GPUs. Other nodes do its work."""
    with LocalNodes(tmp_path, 1, 1) as nodes:
        nodes.add(gpus=1)
        nodes.add(gpus=1)

        def lose(run: subprocess.Popen[bytes]) -> bool:
            if done := len(records(tmp_path / "run")) >= 2:
                nodes.nodes.pop().kill()
            return done

        report, log = prepared(tmp_path / "run", given, nodes, lose)
    assert report["digest"] == expected, log
    assert len(records(tmp_path / "run")) > 2


def test_a_run_whose_driver_is_killed_continues(given, expected, tmp_path):
    with LocalNodes(tmp_path, 1, 1) as nodes:
        nodes.add(gpus=1)

        def kill(run: subprocess.Popen[bytes]) -> bool:
            if done := len(records(tmp_path / "run")) >= 2:
                os.killpg(run.pid, signal.SIGKILL)
            return done

        none, _ = prepared(tmp_path / "run", given, nodes, kill)
        before = records(tmp_path / "run")
        report, log = prepared(tmp_path / "run", given, nodes)
    after = records(tmp_path / "run")
    assert not none and report["digest"] == expected, log
    assert 2 <= len(before) < len(after) and before == {name: after[name] for name in before}


REPORTS = """
import sys
from heliostat.cluster.ray_internals import state_client
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
group = NodeGroupConfig(resources={"GPU": 1, "CPU": 1}, min_count=0, max_count=1, name="gpus")
state_client(sys.argv[1]).report_cluster_config(ClusterConfig(node_group_configs=[group]).SerializeToString())
"""


def test_a_run_waits_for_a_gpu_that_the_autoscaler_can_add(given, expected, tmp_path):
    """An autoscaler reports its configuration, as Ray's does on clouds. The test adds the node."""
    with LocalNodes(tmp_path, 1, 1) as nodes:
        subprocess.run([sys.executable, "-c", REPORTS, nodes.address], env=os.environ | nodes.environment, check=True)

        def add(run: subprocess.Popen[bytes]) -> bool:
            if waits := "waiting up to 600 s for a GPU" in (tmp_path / "run/log").read_text():
                nodes.add(gpus=1)
            return waits

        report, log = prepared(tmp_path / "run", given, nodes, add)
    assert report["digest"] == expected and "run on CPUs" not in log
    assert len(records(tmp_path / "run")) > 4


def test_documents_that_end_their_process_are_left_out_as_by_recorded_tasks(given, tmp_path):
    """One document ends the process that reads, the other the actor that scores. The stream finishes all tasks without these."""
    answers = []
    for gpus in (0, 1):
        (tmp_path / f"on{gpus}").mkdir()
        with LocalNodes(tmp_path / f"on{gpus}", 1, 1) as nodes:
            nodes.add(gpus=gpus)
            command = [sys.executable, "-m", "tests.integration.poisoned", str(tmp_path / f"work{gpus}"), str(given / "model")]
            run = subprocess.run(command, env=os.environ | nodes.environment, capture_output=True, timeout=LIMIT_S, check=False)
        assert run.returncode == 0, run.stderr.decode()[-3000:]
        (answer,) = (line for line in run.stdout.splitlines() if line.startswith(b"{"))  # Ray prints other lines
        answers.append(json.loads(answer))
    plain, streamed = answers
    assert plain.pop("streamed") == 0 < streamed.pop("streamed") <= 10
    assert plain == streamed
    crashed = {id: stage for id, (stage, reason) in plain["dropped"].items() if reason == "crashed"}
    assert crashed == {"d033": "finish", "d048": "finish"}
