"""Tests `prepare` on clusters of one, two, and three Ray nodes, with lost workers and nodes: the digest is always the same."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from heliostat.chaos.nodes import LocalNodes
from heliostat.curation import linear

from tests.benchmarks.broken.rounds import at_work
from tests.benchmarks.prepare_chaos import make_input
from tests.integration.pipelines import write_pipeline

pytestmark = pytest.mark.ci

LIMIT_S = 240
STAGES = [{"stage": "length", "min_words": 65}, {"stage": "minhash"}]
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'


def lose_worker(nodes: LocalNodes, node: int) -> bool:
    for process in at_work([nodes.nodes[node].process.pid])[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            return True
    return False


def lose_node(nodes: LocalNodes, node: int) -> bool:
    nodes.nodes.pop(node).kill()
    return True


def prepared(folder: Path, given: Path, nodes: LocalNodes, lose, stages=STAGES) -> tuple[str, set[str], bool]:
    """Prepares the input. When the last node runs a task, kills a part of the node; returns (digest, addresses of the nodes that
    ran tasks, whether something was killed)."""
    folder.mkdir()
    write_pipeline(folder, input=str(given), stages=stages, memory_limit=100_000_000, chunk_tokens=2000, shard_bytes=5_000_000,
                   tokenizer={"vocab_size": 400, "train_bytes": 50_000})  # fmt: skip
    worked, lost, end = set[str](), False, time.monotonic() + LIMIT_S
    with (folder / "said").open("w") as said, (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "heliostat", "data", "prepare", str(folder / "pipeline.yaml"), "--json"]
        run = subprocess.Popen(command, stdout=said, stderr=log, env=os.environ | nodes.environment)
        try:
            while run.poll() is None and time.monotonic() < end:
                busy = [number for number, node in enumerate(nodes.nodes) if number and at_work([node.process.pid])]
                worked |= {nodes.nodes[number].address for number in busy}
                if lose and not lost and busy and busy[-1] == len(nodes.nodes) - 1:
                    lost = lose(nodes, busy[-1])
                time.sleep(0.02)
        finally:
            run.kill()
            run.wait()
    assert (folder / "said").read_text(), (folder / "log").read_text()[-3000:]
    return json.loads((folder / "said").read_text().splitlines()[-1])["digest"], worked, lost


def test_one_digest_on_one_two_and_three_nodes_with_a_worker_and_a_node_lost(tmp_path):
    """Tasks end in any order, and another node repeats the work of a lost worker or node.

    The dataset has one shard, fewer than nodes: its task requests no more CPUs than a node has.
    """
    make_input(tmp_path / "in", 1200)
    found = dict[int, str]()
    for count, lose in ((1, None), (2, lose_worker), (3, lose_node)):
        (tmp_path / f"cluster{count}").mkdir()
        with LocalNodes(tmp_path / f"cluster{count}", count, 1) as nodes:
            digest, worked, lost = prepared(tmp_path / f"on{count}", tmp_path / "in", nodes, lose)
        assert len(worked) == count and lost is bool(lose), (count, worked, lost)
        found[count] = digest
    assert len(set(found.values())) == 1, found


@pytest.mark.skipif(subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0, reason="needs mounts of its own")
def test_a_stage_runs_on_a_node_that_lacks_its_model(tmp_path, monkeypatch):
    """It has an empty folder in the model's place, and copies the model from the work folder, once.

    It is the only node that runs tasks. Next to a node with the model, it might get no task that needs it.
    """
    make_input(tmp_path / "in", 1200)
    model, cache = tmp_path / "model", tmp_path / "cache"
    cache.mkdir()
    linear.LinearScorer(np.zeros(16, np.float32), 5.0, linear.NgramCounter(1, 4, 100)).save(model, {})
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    stages = [{"stage": "classifier", "model": str(model)}, {"stage": "length", "min_words": 65}]
    found = list[str]()
    for lacks in (False, True):
        folder = tmp_path / f"lacks-{lacks}"
        (folder / "cluster").mkdir(parents=True)
        with LocalNodes(folder / "cluster", 0, 1) as nodes:
            with monkeypatch.context() as environment:
                if lacks:
                    nodes.inside = ("unshare", "-m", "sh", "-c", HIDE, str(model))
                    environment.setenv("TMPDIR", str(cache))
                nodes.add()
            digest, worked, _ = prepared(folder / "run", tmp_path / "in", nodes, None, stages)
        assert len(worked) == 1
        assert ("copied to the work folder" in (folder / "run" / "log").read_text()) is lacks
        found.append(digest)
    copies = [p.relative_to(cache) for p in cache.rglob("*") if p.is_file() and p.parent.name == "model"]
    assert sorted(p.name for p in copies) == ["classifier.json", "weights.safetensors"] and len({p.parts[1] for p in copies}) == 1
    assert found[0] == found[1]


LATE = """
import sys, time
from pathlib import Path
import ray
from heliostat.storage.locations import Location
from heliostat.tasks import calls, crew
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import Work
calls.LATE_S, crew.LATE_LOOK_S = 1.0, 0.2

def work(folder, number, mark):
    if number == 11 and not Path(mark).exists():
        Path(mark).write_text(ray.get_runtime_context().get_node_id())
        time.sleep(100)
    return {"node": ray.get_runtime_context().get_node_id()}

ray.init(address="auto", log_to_driver=False)
with Flow(Work(Location(sys.argv[1] + "/work"))) as flow:
    tasks = (Task(f"{n:032}", {"number": n, "mark": sys.argv[1] + "/mark"}) for n in range(12))
    records = flow.all("some", work, tasks)
    print(len(records), len(flow.repeated), records[11]["node"] != Path(sys.argv[1], "mark").read_text())
print(len(flow.repeated), "ended")
"""


def test_a_late_task_is_repeated_on_another_node_and_the_late_one_ends(tmp_path):
    """Ray cancels the late task only when the flow ends, and the driver survives this."""
    (tmp_path / "cluster").mkdir()
    with LocalNodes(tmp_path / "cluster", 2, 1) as nodes:
        command = [sys.executable, "-c", LATE, str(tmp_path)]
        run = subprocess.run(command, env=os.environ | nodes.environment, capture_output=True, text=True, timeout=90, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n")[:2] == ["12 1 True", "0 ended"], run.stdout
